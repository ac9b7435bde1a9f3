"""Arrays and weights: assigning, copying, columns, and the lengths that are compiled for."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_llama.backend.device import name

PART = 4096  # rows of a tensor that are converted at a time


def parts(length: int) -> Iterator[slice]:
    """Slices of a few thousand rows, for what must not copy a large array as a whole."""
    return (slice(start, start + PART) for start in range(0, length, PART))


def assign(variable: Any, array: np.ndarray) -> None:
    """Assigns a NumPy array, which may be a mapped file, in the variable's dtype.

    TensorFlow takes it in parts: its CPU allocator keeps the memory of every temporary copy.
    """
    if name() != "tensorflow":
        variable.assign(np.array(array, variable.dtype, order="C"))  # a copy: a mapped file is no home for weights
        return
    for part in parts(len(array)):
        variable.value[part].assign(np.array(array[part], variable.dtype, order="C"))


def copy(source: Any, variable: Any) -> None:
    """Assigns a Keras variable's value to another, in memory of its own: JAX would share it, and train it twice."""
    assign(variable, keras.ops.convert_to_numpy(source.value))


def write(array: Any, new: Any, column: Any, axis: int = 1) -> Any:
    """An array (B, S, ...) with `new` (B, T, ...) from `column` of its axis S on.

    On TensorFlow by a scatter: Keras' `slice_update` is an operation of XLA's there, which a server need not have.
    """
    if name() == "jax":
        start = [0] * len(array.shape)
        return keras.ops.slice_update(array, [*start[:axis], column, *start[axis + 1 :]], new)
    if name() == "torch":
        import torch

        return array.index_copy(axis, torch.arange(new.shape[axis], device=array.device) + column, new)
    import tensorflow as tf

    *before, length = (tf.range(size) for size in tf.unstack(tf.shape(new)[: axis + 1]))
    places = tf.stack(tf.meshgrid(*before, length + tf.cast(column, tf.int32), indexing="ij"), -1)
    return tf.tensor_scatter_nd_update(array, places, new)


def mark(array: Any, places: Any) -> Any:
    """An array bool (B, V) with `True` at column `places[i]` (B,) of each row i, too."""
    rows = keras.ops.arange(keras.ops.shape(places)[0], dtype=places.dtype)
    index = keras.ops.stack([rows, places], axis=1)
    if name() == "tensorflow":  # Keras' own adds, and there is no sum of booleans
        import tensorflow as tf

        return tf.tensor_scatter_nd_update(array, index, tf.ones_like(places, "bool"))
    return keras.ops.scatter_update(array, index, keras.ops.ones_like(places, "bool"))


def columns(array: Any, start: Any, count: Any) -> Any:
    """`count` columns of an array (B, S, ...) from `start` on, which may be a tensor: (B, count, ...)."""
    if name() != "torch":
        rest = keras.ops.shape(array)[2:]
        return keras.ops.slice(array, [0, start] + [0] * len(rest), [keras.ops.shape(array)[0], count, *rest])
    import torch

    return array.index_select(1, torch.arange(count, device=array.device) + start)


def bucket(length: int) -> int:
    """The next of the lengths 8, 16, 24, 32, 48, 64, 96, 128, ...: few shapes to compile, little padding.

    >>> [bucket(n) for n in (1, 9, 20, 33, 100)]
    [8, 16, 24, 48, 128]
    """
    if length <= 16:
        return 8 if length <= 8 else 16
    power = 1 << (length - 1).bit_length()  # smallest power of two >= length
    return power * 3 // 4 if length <= power * 3 // 4 else power


def buckets(longest: int) -> list[int]:
    """All lengths that `bucket` gives up to the one for `longest`.

    >>> buckets(40)
    [8, 16, 24, 32, 48]
    """
    found = [bucket(1)]
    while found[-1] < longest:
        found.append(bucket(found[-1] + 1))
    return found
