"""Losses and metrics over real tokens. Shapes: B batch, T tokens, V vocabulary."""

import keras
from keras import ops

from keras_llama.config import invalid
from keras_llama.layers import register


@register
class TokenCrossentropy(keras.losses.Loss):
    """Cross-entropy of logits (B, T, V) against ids (B, T): the mean over tokens of non-zero weight.

    Keras' default divides by B x T, padding included, so that the loss and its gradient would
    depend on how much padding a batch holds.

    Args:
        label_smoothing: share e of the target that is spread evenly over the vocabulary (Szegedy et al.,
            2016, https://arxiv.org/abs/1512.00567).

    Raises:
        ValueError: if `label_smoothing` is outside [0, 1).

    >>> loss = TokenCrossentropy(label_smoothing=0.1)
    >>> round(float(loss(np.array([[1]]), np.array([[[0.0, 2.0]]]))), 3)
    0.227
    """

    def __init__(self, label_smoothing=0.0, name="token_crossentropy"):
        if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
            raise invalid("`label_smoothing` must be a number.", label_smoothing=label_smoothing)
        if not 0 <= label_smoothing < 1:
            raise invalid("`label_smoothing` must lie in [0, 1).", label_smoothing=label_smoothing)
        super().__init__(name=name, reduction="mean_with_sample_weight", dtype="float32")
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        if not self.label_smoothing:
            return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        targets = ops.one_hot(ops.cast(y_true, "int32"), y_pred.shape[-1], dtype="float32")
        return keras.losses.categorical_crossentropy(
            targets, y_pred, from_logits=True, label_smoothing=self.label_smoothing
        )

    def get_config(self):
        return {"label_smoothing": self.label_smoothing, "name": self.name}


def token_metrics():
    """Perplexity and accuracy over the tokens of non-zero weight."""
    return [Perplexity(), keras.metrics.SparseCategoricalAccuracy(name="accuracy", dtype="float32")]


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
