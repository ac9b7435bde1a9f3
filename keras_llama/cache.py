"""The key/value cache: a plain tuple of (key, value) pairs, one per block, each (B, K, S, H).

A head's columns lie together, as its products read them.

Cache in, cache out: nothing here changes its argument.
"""

from keras import ops

from keras_llama import backend
from keras_llama.config import LlamaConfig


def make(config: LlamaConfig, batch_size, length, dtype="float32"):
    """An empty cache for `length` columns: `num_layers` pairs of zeros (B, K, S, H)."""
    shape = (batch_size, config.num_key_value_heads, length, config.head_dim)
    return tuple((ops.zeros(shape, dtype), ops.zeros(shape, dtype)) for _ in range(config.num_layers))


def append(pair, key, value, index):
    """Writes new keys and values (B, K, T, H) at column `index` of one block's pair (B, K, S, H)."""
    return tuple(
        backend.write(old, ops.cast(new, old.dtype), index, axis=2) for old, new in zip(pair, (key, value), strict=True)
    )


def grow(cache, length):
    """The cache with empty columns behind its own, `length` in all."""
    return tuple(tuple(ops.pad(x, [[0, 0], [0, 0], [0, length - x.shape[2]], [0, 0]]) for x in pair) for pair in cache)


def widened(array, length):
    """An array (..., S) with zeros behind its columns, `length` in all."""
    before = [[0, 0]] * (len(array.shape) - 1)
    return ops.pad(array, [*before, [0, length - ops.shape(array)[-1]]])


def reorder(cache, rows):
    """The cache with batch row i taken from `rows[i]` (B,), as beam search needs it."""
    return tuple(tuple(ops.take(x, rows, axis=0) for x in pair) for pair in cache)
