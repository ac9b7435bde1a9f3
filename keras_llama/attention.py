"""Who attends to whom, and attention itself: functions, no weights.

Shapes: B batch, T query length, S key length, N heads, K key/value heads, H head_dim. A padding
mask is an integer per token: 0 padding, n = segment n; an ordinary batch holds 0 and 1 only.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator
from typing import Any

from keras import ops

from keras_llama import backend

_FIRST = 256  # columns


def same_segment(query_segments, key_segments):
    """True where query and key stand in one segment: (B, T), (B, S) -> bool (B, T, S).

    Padding is a segment of its own: no real token sees it, and a padding token sees padding, so
    no row of the softmax is ever empty.
    """
    return ops.equal(ops.expand_dims(query_segments, 2), ops.expand_dims(key_segments, 1))


def not_later(query_columns, key_columns):
    """True where the key stands at or before the query: (T,), (S,) -> bool (1, T, S)."""
    return ops.expand_dims(ops.less_equal(key_columns[None, :], query_columns[:, None]), 0)


def same_segment_or_all(query_segments, key_segments):
    """`same_segment`, but a query of whose segment there is no key sees every key: bool (B, T, S).

    In cross-attention padding may meet a source without padding, and the softmax must not be empty.
    """
    same = same_segment(query_segments, key_segments)
    return ops.logical_or(same, ops.logical_not(ops.any(same, axis=-1, keepdims=True)))


def positions(seen):
    """Place of each query within its segment, from the keys it sees: bool (B, T, S) -> int32 (B, T).

    `seen` is `same_segment` and `not_later`: counting its keys gives one formula for padding on
    either side, for packed segments and for a cache.
    """
    return ops.sum(ops.cast(seen, "int32"), axis=-1) - 1


def attend(query, key, value, mask, training=False):
    """Scaled dot-product attention with grouped keys and values; the only caller of the backend's fused kernel.

    softmax(query key^T / sqrt(H)) value (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762),
    the softmax in float32 whatever the dtype of the inputs.

    Args:
        query: (B, T, N, H).
        key, value: (B, K, S, H); N is a multiple of K (Ainslie et al., 2023, https://arxiv.org/abs/2305.13245).
        mask: bool (B, T, S), True where the query may look.
        training: whether a gradient is wanted; the weights (B, N, T, S) are then computed again for it, not kept.

    Returns:
        (B, T, N, H) in the dtype of `query`.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(weights(ops.cast(query, "float32"), ops.cast(key, "float32"), mask))
    if backend.fuses_attention():
        return _fused(query, key, value, mask, training)
    summed = (backend.remat(_plain) if training else _plain)(query, key, value, mask)
    # Out here: the gradient of a `reshape` asks for the shape of what it was given, which would be computed again.
    rows, length, heads, width = ops.shape(query)
    return ops.transpose(ops.reshape(summed, (rows, heads, length, width)), (0, 2, 1, 3))


def attend_to_first(query, key, value, mask, count):
    """`attend` where no query sees a key from column `count` on, an int32 of a step that is compiled once.

    Of S columns, which are there for all that a text may become, it reads the first 256, 512, 1,024 ..., so at most
    twice what is filled, or 256; all of them where S is open, as in a SavedModel without XLA, and on torch.
    """
    columns = key.shape[2]
    if columns is None or columns <= _FIRST or not backend.has_branches():
        return attend(query, key, value, mask)
    sizes = list(itertools.takewhile(lambda size: size < columns, (_FIRST << i for i in itertools.count())))

    def reading(size):
        return lambda query, key, value, mask: attend(query, key[:, :, :size], value[:, :, :size], mask[:, :, :size])

    larger = ops.sum(ops.cast(count > ops.convert_to_tensor(sizes, "int32"), "int32"))
    return ops.switch(larger, [reading(size) for size in (*sizes, columns)], query, key, value, mask)


def _fused(query, key, value, mask, training):
    """`attend` by the kernel."""
    rows, length, heads, width = ops.shape(query)
    if length == 1:  # then the group's queries go as so many queries of one head, and no key is repeated
        groups = key.shape[1]
        query = ops.reshape(query, (rows, groups, heads // groups, width))
        return ops.reshape(backend.fused_attention(query, key, value, mask, training), (rows, 1, heads, width))
    query = ops.transpose(query, (0, 2, 1, 3))
    return ops.transpose(backend.fused_attention(query, key, value, mask, training), (0, 2, 1, 3))


def _plain(query, key, value, mask):
    """Sums of values by the weights, (B, K, N/K * T, H)."""
    shares = weights(query, key, mask)
    rows, heads, length = ops.shape(shares)[:3]
    groups = value.shape[1]
    shares = ops.reshape(shares, (rows, groups, heads // groups * length, ops.shape(value)[2]))
    return ops.cast(ops.matmul(ops.cast(shares, value.dtype), value), query.dtype)


def weights(query, key, mask):
    """softmax(query key^T / sqrt(H)), float32 (B, N, T, S): what `attend` weighs values with.

    The queries of a group go through one product with their key, which is never repeated.
    """
    # No size is left to `reshape` to infer: it cannot where there are no rows.
    rows, length = ops.shape(query)[:2]
    heads, groups, width = query.shape[2], key.shape[1], query.shape[3]
    grouped = ops.reshape(query, (rows, length, groups, heads // groups, width))
    grouped = ops.reshape(ops.transpose(grouped, (0, 2, 3, 1, 4)), (rows, groups, heads // groups * length, width))
    scores = ops.cast(ops.matmul(grouped, ops.transpose(key, (0, 1, 3, 2))), "float32") * width**-0.5
    scores = ops.reshape(scores, (rows, heads, length, ops.shape(key)[2]))
    if scores.shape[-1] == 1:
        return ops.ones_like(scores)  # Keras warns of a softmax over one
    # Added, not chosen by: the gradient then passes as it is.
    return ops.softmax(scores + ops.expand_dims(ops.where(mask, 0.0, -1e30), 1), axis=-1)


_recorded: contextvars.ContextVar[list | None] = contextvars.ContextVar("recorded", default=None)


@contextlib.contextmanager
def record() -> Iterator[list[Any]]:
    """Collects the `weights` of every call of `attend` inside, in the order of the calls; for eager calls."""
    collected: list[Any] = []
    token = _recorded.set(collected)
    try:
        yield collected
    finally:
        _recorded.reset(token)
