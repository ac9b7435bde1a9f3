"""Losses and metrics over real tokens, and of spans of them.

Shapes: B batch, T tokens, D hidden, V vocabulary, R rows of a chunk.
"""

import itertools

import keras
from keras import ops

from keras_llama import backend
from keras_llama.config import invalid
from keras_llama.layers import register


@register
class TokenCrossentropy(keras.losses.Loss):
    """Cross-entropy of logits (B, T, V) against ids (B, T): the mean over tokens of non-zero weight.

    Keras' default divides by B x T, padding included, so that the loss and its gradient would
    depend on how much padding a batch holds. `fit` of a language model computes the same without ever holding
    its logits, by `linear_crossentropy`.

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


def linear_crossentropy(hidden, kernel, targets, weights, label_smoothing=0.0, training=True, frozen=False):
    """`TokenCrossentropy` of the logits hidden kernel^T, which works its gradient out in the same pass.

    It goes over the tokens in chunks: neither logits nor their gradient are ever held as a whole, and tokens of
    weight 0 are not computed.

    Args:
        hidden: (B, T, D), in the dtype to multiply in.
        kernel: (V, D).
        targets: int (B, T).
        weights: float32 (B, T).
        label_smoothing: as in `TokenCrossentropy`.
        training: whether a gradient is wanted.
        frozen: whether none is wanted by `kernel`, whose gradient is the largest array of all.

    Returns:
        The loss (), and of each token its cross-entropy without smoothing and whether its target has the highest
        logit, float32 (B, T), 0 where the weight is; these two have no gradient.

    >>> hidden, kernel = ops.convert_to_tensor([[[1.0, 2.0]]]), ops.convert_to_tensor([[0.0, 0.0], [0.0, 1.0]])
    >>> loss, entropy, right = linear_crossentropy(hidden, kernel, ops.ones((1, 1), "int32"), ops.ones((1, 1)))
    >>> round(float(loss), 3), float(right[0, 0])
    (0.127, 1.0)
    """
    shape = ops.shape(hidden)
    rows = (1, -1)  # as one text: what there is for columns of a cache serves for them
    targets, weights = ops.reshape(ops.cast(targets, "int32"), rows), ops.reshape(ops.cast(weights, "float32"), rows)
    # Weights of up to 1 in the chunks, and the division by their sum after them: float16 would lose small gradients.
    weights /= ops.maximum(ops.max(weights), keras.config.epsilon())
    total = ops.maximum(ops.sum(weights), keras.config.epsilon())
    arrays = (ops.reshape(hidden, (*rows, shape[-1])), ops.convert_to_tensor(kernel))
    constant, multiplier = (ops.stop_gradient(array) for array in arrays)
    wanted = (1 if frozen else 2) if training else 0
    loss, scores, gradients = _in_chunks(constant, multiplier, targets, weights, label_smoothing, wanted)
    if training:
        loss = backend.with_gradients(loss, arrays[:wanted], gradients)
    loss /= total
    return loss, *(ops.reshape(score, shape[:2]) for score in scores)


def rows_of_chunk(vocabulary: int) -> int:
    """How many tokens' logits are held at a time: 128 MiB, but enough of them for a fast product.

    >>> rows_of_chunk(49_152), rows_of_chunk(1_000_000)
    (682, 128)
    """
    return max(128, 2**25 // vocabulary)


def _in_chunks(hidden, kernel, targets, share, smoothing, wanted):
    """The loss summed (), (cross-entropy, right) of each token (1, T), and the first `wanted` of the two gradients."""
    length, (vocabulary, width) = ops.shape(targets)[1], kernel.shape
    count = -(-length // rows_of_chunk(vocabulary))  # `length` is open in TensorFlow's graph
    rows = -(-length // count)
    padding = count * rows - length
    multiplier = ops.cast(kernel, hidden.dtype)
    # Tokens that count come first, and the loop ends behind them.
    counted = ops.not_equal(share[0], 0)
    order = ops.argsort(ops.cast(ops.logical_not(counted), "int32"))
    chunks = (ops.sum(ops.cast(counted, "int32")) + rows - 1) // rows

    def ordered(x):
        return ops.pad(ops.take(x, order, axis=1), [[0, 0], [0, padding], *[[0, 0]] * (len(x.shape) - 2)])

    hidden, targets, share = ordered(hidden), ordered(targets), ordered(share)

    def chunk(i, loss, entropies, rights, *gradients):
        place = i * rows
        some, target, weight = (backend.columns(x, place, rows)[0] for x in (hidden, targets, share))
        logits = ops.matmul(some, ops.transpose(multiplier))
        spread = 0.0
        if smoothing:  # first, for torch writes over the logits
            spread = smoothing * _above_mean(ops.cast(logits, "float32"), target)
        entropy, error, hits = backend.softmax_error(logits, target, weight, smoothing)
        right = ops.cast(hits, "float32")
        scores = (backend.write(x, new[None], place) for x, new in ((entropies, entropy), (rights, right)))
        loss += ops.sum(weight * (entropy + spread))
        if wanted:
            by_hidden, *by_kernel = gradients
            by_row = ops.cast(ops.matmul(error, multiplier), "float32")
            by_kernel = [
                old + ops.cast(ops.matmul(ops.transpose(error[:, start:end]), some), "float32")
                for old, (start, end) in zip(by_kernel, parts, strict=True)
            ]
            gradients = (backend.write(by_hidden, by_row[None], place), *by_kernel)
        return (i + 1, loss, *scores, *gradients)

    nothing = ops.zeros(ops.shape(targets), "float32")
    # The gradient by the kernel in parts: of what is added to one, no more than a part is held.
    cuts = [vocabulary * i // 8 for i in range(9)]
    parts = list(itertools.pairwise(cuts)) if wanted > 1 else []
    shapes = [ops.shape(hidden)][:wanted] + [(end - start, width) for start, end in parts]
    gradients = [ops.zeros(shape, "float32") for shape in shapes]
    first = (ops.zeros((), "int32"), ops.zeros((), "float32"), nothing, nothing, *gradients)
    _, loss, *arrays = backend.one_by_one(lambda i, *_: i < chunks, chunk, first)
    place = ops.argsort(order)
    entropy, right, *by_hidden = (ops.take(x, place, axis=1) for x in arrays[: len(arrays) - len(parts)])
    by_kernel = [ops.concatenate(arrays[-len(parts) :])] if parts else []
    return loss, (entropy, right), (*by_hidden, *by_kernel)


def _above_mean(logits, targets):
    """By how much the logits of the targets (R,) are above the mean of theirs (R, V)."""
    return ops.squeeze(ops.take_along_axis(logits, targets[:, None], axis=-1), -1) - ops.mean(logits, axis=-1)


def token_metrics():
    """Perplexity and accuracy over the tokens of non-zero weight."""
    return [Perplexity(), TokenAccuracy()]


class TokenMetric(keras.metrics.Mean):
    """The mean over tokens of something that `linear_crossentropy` gives as well as logits do."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        logits, targets = ops.cast(y_pred, "float32"), ops.cast(y_true, "int32")
        entropy = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
        right = ops.cast(ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), targets), "float32")
        self.add(entropy, right, sample_weight)

    def add(self, entropy, right, weights):
        """Counts tokens in, all arguments (B, T)."""
        raise NotImplementedError

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype}


@register
class Perplexity(TokenMetric):
    """exp of the mean cross-entropy per real token, exact over batches of any size and padding.

    >>> metric = Perplexity()
    >>> metric.update_state(np.array([[1]]), np.zeros((1, 1, 4), "float32"))
    >>> round(float(metric.result()), 3)
    4.0
    """

    def __init__(self, name="perplexity", dtype="float32"):
        super().__init__(name=name, dtype=dtype)

    def add(self, entropy, right, weights):
        super(TokenMetric, self).update_state(entropy, sample_weight=weights)

    def result(self):
        return ops.exp(super().result())


@register
class TokenAccuracy(TokenMetric):
    """How many real tokens have the highest logit of all.

    >>> metric = TokenAccuracy()
    >>> metric.update_state(np.array([[1, 0]]), np.array([[[0.0, 2.0], [0.0, 2.0]]]))
    >>> float(metric.result())
    0.5
    """

    def __init__(self, name="accuracy", dtype="float32"):
        super().__init__(name=name, dtype=dtype)

    def add(self, entropy, right, weights):
        super(TokenMetric, self).update_state(right, sample_weight=weights)


class PassDivergence(keras.losses.Loss):
    """How far the logits (B, C) of two passes are apart: the mean of their divergences both ways.

    Kullback and Leibler's, of probabilities p, q and logits z, w: the sum of (p - q) (z - w) / 2 over the classes, for
    a softmax, whose normalisers cancel, as for a sigmoid each; of sigmoids the mean, as of their cross-entropy.

    Args:
        probabilities: logits (B, C) -> probabilities (B, C).
        over_classes: `ops.sum` or `ops.mean`.
    """

    def __init__(self, probabilities, over_classes):
        super().__init__(name="pass_divergence", dtype="float32")
        self.probabilities, self.over_classes = probabilities, over_classes

    def call(self, y_true, y_pred):
        apart = (self.probabilities(y_true) - self.probabilities(y_pred)) * (y_true - y_pred)
        return self.over_classes(apart, axis=-1) / 2


@register
class SpanCrossentropy(keras.losses.Loss):
    """Cross-entropy of logits (B, T, 2) of where a span starts and ends: the mean of both, each a softmax over tokens.

    Targets (B, T, 2) are 0 at a token that cannot be the one, 1 at one that can, 2 at one that is. Where several are,
    the probability of any of them counts (Clark and Gardner, 2018, https://arxiv.org/abs/1710.10723).

    >>> loss = SpanCrossentropy()
    >>> round(float(loss(np.array([[[0, 0], [2, 1], [1, 2]]]), np.zeros((1, 3, 2), "float32"))), 3)  # log 2
    0.693
    """

    def __init__(self, name="span_crossentropy"):
        super().__init__(name=name, dtype="float32")

    def call(self, y_true, y_pred):
        possible, right = (ops.logsumexp(_only(y_pred, y_true, least), axis=1) for least in (1, 2))
        return ops.mean(possible - right, axis=-1)

    def get_config(self):
        return {"name": self.name}


@register
class SpanAccuracy(keras.metrics.Mean):
    """How many rows have both the start and the end where they should be; targets as `SpanCrossentropy` takes them.

    >>> metric = SpanAccuracy()
    >>> logits = np.array([[[2.0, 0.0], [1.0, 3.0]], [[0.0, 0.0], [1.0, 3.0]]])
    >>> metric.update_state(np.array([[[2, 1], [1, 2]]] * 2), logits)
    >>> float(metric.result())
    0.5
    """

    def __init__(self, name="accuracy", dtype="float32"):
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true = ops.convert_to_tensor(y_true)
        best = ops.argmax(_only(ops.cast(y_pred, "float32"), y_true, 1), axis=1)  # (B, 2)
        found = ops.take_along_axis(y_true, ops.expand_dims(best, 1), axis=1)
        right = ops.all(ops.greater_equal(found, 2), axis=(1, 2))
        super().update_state(ops.cast(right, "float32"), sample_weight=sample_weight)

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype}


def _only(logits, targets, least):
    """Logits of the tokens whose target is at least so much; others far below."""
    return ops.where(ops.greater_equal(targets, least), logits, -1e9)
