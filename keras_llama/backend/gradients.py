"""Functions with a gradient of their own, each written for every backend."""

import keras

from keras_llama.backend.device import name


def silu(x):
    """x sigmoid(x).

    TensorFlow's own is a custom gradient, and such a one is registered anew with each graph that is traced, for good:
    neither the graph nor the weights that it reads would ever be freed (TensorFlow 2.21).
    """
    return x * keras.ops.sigmoid(x) if name() == "tensorflow" else keras.ops.silu(x)


def softmax_error(logits, targets):
    """Cross-entropy of float32 logits (C, V) against ids (C,), and its gradient: (C,), softmax - one-hot (C, V).

    By the fewest passes over the logits; torch writes the gradient over them.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(features=logits, labels=targets)
    if name() == "jax":
        import jax

        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        target = jax.nn.one_hot(targets, logits.shape[-1], dtype="bool")
        chosen = jax.numpy.sum(jax.numpy.where(target, logits, 0.0), axis=-1)
        return total[:, 0] - chosen, jax.numpy.exp(logits - total) - target
    import torch

    total = torch.logsumexp(logits, -1, keepdim=True)
    index = targets[:, None].long()
    entropy = (total - logits.gather(1, index))[:, 0]
    error = logits.sub_(total).exp_()
    return entropy, error.scatter_add_(1, index, -torch.ones_like(total))
