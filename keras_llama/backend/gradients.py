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
    """Cross-entropy of float32 logits (R, V) against ids (R,), its gradient softmax - one-hot (R, V), and hits (R,).

    By the fewest passes over the logits; torch writes the gradient over them.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        # A fourth of the time that TensorFlow's own cross-entropy takes on a CPU.
        best = tf.argmax(logits, axis=-1, output_type="int32")
        shares = tf.nn.softmax(logits)
        top, chosen, largest = (
            tf.gather(x, i, batch_dims=1) for x, i in ((logits, best), (logits, targets), (shares, best))
        )
        places = tf.stack([tf.range(tf.shape(targets)[0]), targets], axis=1)
        error = tf.tensor_scatter_nd_sub(shares, places, tf.ones_like(chosen))
        return top - tf.math.log(largest) - chosen, error, tf.equal(best, targets)  # the largest share is 1 / sum
    if name() == "jax":
        import jax

        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        target = jax.nn.one_hot(targets, logits.shape[-1], dtype="bool")
        chosen = jax.numpy.sum(jax.numpy.where(target, logits, 0.0), axis=-1)
        hits = jax.numpy.argmax(logits, axis=-1) == targets
        return total[:, 0] - chosen, jax.numpy.exp(logits - total) - target, hits
    import torch

    index = targets[:, None].long()
    hits = torch.argmax(logits, -1) == targets
    sums = torch.logsumexp(logits, -1, keepdim=True)
    entropy = (sums - logits.gather(1, index))[:, 0]
    error = logits.sub_(sums).exp_()
    return entropy, error.scatter_add_(1, index, -torch.ones_like(sums)), hits
