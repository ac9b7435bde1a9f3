"""Losses and metrics over real tokens. Shapes: B batch, T tokens, V vocabulary."""

import keras
from keras import ops

from keras_llama.layers import register


def token_loss():
    """Cross-entropy of logits (B, T, V) against ids (B, T): the mean over tokens of non-zero weight.

    Keras' default divides by B x T, padding included, so that the loss and its gradient would
    depend on how much padding a batch holds.
    """
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight", dtype="float32"
    )


@register
class Perplexity(keras.metrics.Mean):
    """exp of the mean cross-entropy per real token, exact over batches of any size and padding.

    >>> metric = Perplexity()
    >>> metric.update_state(np.array([[1]]), np.zeros((1, 1, 4), "float32"))
    >>> round(float(metric.result()), 3)
    4.0
    """

    def __init__(self, name="perplexity", dtype="float32"):
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        logits = ops.cast(y_pred, "float32")
        entropy = keras.losses.sparse_categorical_crossentropy(y_true, logits, from_logits=True)
        super().update_state(entropy, sample_weight=sample_weight)

    def result(self):
        return ops.exp(super().result())

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype}
