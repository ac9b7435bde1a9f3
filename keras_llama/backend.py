"""The one file that asks which Keras backend runs, and the only one to import jax, tensorflow or torch."""

import functools
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_llama.config import invalid

PART = 4096  # rows of a tensor that are converted at a time


def name() -> str:
    """The running backend: "tensorflow", "jax" or "torch"."""
    return keras.config.backend()


def has_gpu() -> bool:
    """Whether the running backend sees a GPU."""
    if name() == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_physical_devices("GPU"))
    if name() == "jax":
        import jax

        return any(device.platform == "gpu" for device in jax.devices())
    import torch

    return torch.cuda.is_available()


def devices() -> list[str]:
    """The devices the running backend computes on, by name, as a recipe prints them."""
    if name() == "tensorflow":
        import tensorflow as tf

        return [device.name for device in tf.config.list_logical_devices()]
    if name() == "jax":
        import jax

        return [str(device) for device in jax.devices()]
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]


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


def set_memory_growth() -> None:
    """Lets GPU memory grow with need instead of taking all of it; call it before the first computation.

    On JAX it works only before JAX first touches the GPU; torch allocates by need anyway.

    >>> keras_llama.set_memory_growth()
    """
    if name() == "tensorflow":
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
    elif name() == "jax":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def fuses_attention() -> bool:
    """Whether Keras' attention is a fused kernel; TensorFlow's is plain products, keys repeated for each query head."""
    return name() != "tensorflow"


def attention_dtype(dtype: str) -> str:
    """The dtype to compute attention of `dtype` in: JAX has no float16 attention but on a GPU."""
    return "float32" if dtype == "float16" and name() == "jax" and not has_gpu() else dtype


def resolve_jit(jit_compile: bool | str) -> bool:
    """What `jit_compile="auto"` means: XLA on TensorFlow with a GPU, always on JAX, never on torch.

    On a CPU, TensorFlow runs bfloat16 products faster without XLA, and XLA would compile every
    length bucket anew.

    Raises:
        ValueError: if `jit_compile` is not True, False or "auto".
    """
    if jit_compile not in (True, False, "auto"):
        raise invalid('`jit_compile` must be True, False or "auto".', jit_compile=jit_compile)
    if jit_compile != "auto":
        return bool(jit_compile)
    return name() == "jax" or (name() == "tensorflow" and has_gpu())


def write(array: Any, new: Any, column: Any) -> Any:
    """An array (B, S, ...) with `new` (B, T, ...) from `column` of its second axis on.

    On TensorFlow by a scatter: Keras' `slice_update` is an operation of XLA's there, which a server need not have.
    """
    if name() == "jax":
        return keras.ops.slice_update(array, [0, column] + [0] * (len(array.shape) - 2), new)
    if name() == "torch":
        import torch

        return array.index_copy(1, torch.arange(new.shape[1], device=array.device) + column, new)
    import tensorflow as tf

    rows, length = tf.unstack(tf.shape(new)[:2])
    places = tf.stack(tf.meshgrid(tf.range(rows), tf.range(length) + tf.cast(column, tf.int32), indexing="ij"), -1)
    return tf.tensor_scatter_nd_update(array, places, new)


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


class Compiled:
    """A function of arrays and of a model's weights, compiled for the running backend, never for training.

    TensorFlow and JAX compile it once for each set of shapes, which `traces` counts; torch runs it as it is.

    Args:
        function: takes and returns pytrees of arrays.
        variables: the Keras variables that it reads.
        jit_compile: XLA on TensorFlow; JAX always compiles.
        donate: numbers of the arguments whose memory the results may take over (JAX).
    """

    def __init__(self, function, variables, jit_compile=False, donate=()):
        self.traces = 0
        self._variables = variables

        def counted(*args):
            self.traces += 1
            return function(*args)

        if name() == "tensorflow":
            import tensorflow as tf

            compiled = tf.function(counted, autograph=False, jit_compile=jit_compile)
            # Called itself, it would warn of each new set of shapes.
            self._call = lambda *args: compiled.get_concrete_function(*args)(*args)
        elif name() == "jax":
            import jax

            def pure(values, *args):
                with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                    return counted(*args)

            self._call = jax.jit(pure, donate_argnums=tuple(i + 1 for i in donate))
        else:
            import torch

            self._call = torch.no_grad()(function)

    def __call__(self, *args):
        args = keras.tree.map_structure(keras.ops.convert_to_tensor, args)
        if name() == "jax":
            return self._call([variable.value for variable in self._variables], *args)
        return self._call(*args)


def flattened(function, variables):
    """A function of arrays whose operations torch runs without the layers around them, which cost more than a step.

    They are listed once for each set of shapes, without gradients; nothing may depend on the values of the arrays. On
    TensorFlow and JAX it is the function itself.
    """
    if name() != "torch":
        return function
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    lists: dict[Any, Any] = {}

    @torch.no_grad()
    def call(*args):
        shapes = [(x.shape, x.dtype, x.device) for x in keras.tree.flatten(args)]
        # A weight that is another array now, not one that was assigned to, is not on the list.
        key = (*shapes, *(id(variable.value) for variable in variables))
        if key not in lists:
            lists[key] = make_fx(lambda *args: function(*args))(*args)  # it counts the `self` of a method
        return lists[key](*args)

    return call


class CompiledLoop:
    """At most `count` times `state = step(state, *args)`, until `ended(state)`, as one compiled loop.

    On torch the host takes the steps, and asks for the end every eighth time: an answer waits for the GPU. So there a
    state may go a few steps on when it has ended.

    Args:
        ended: state -> bool ().
        step: (state, *args) -> state, a `NamedTuple`.
        variables: the Keras variables that it reads.
    """

    def __init__(self, ended, step, variables):
        self._ended, self._step = ended, step
        self._compiled = Compiled(functools.partial(repeat, ended, step), variables, jit_compile=True, donate=(0,))

    @property
    def traces(self) -> int:
        """How often it was compiled for new shapes."""
        return self._compiled.traces

    def __call__(self, state, count: int, *args):
        if name() != "torch":
            return self._compiled(state, np.int32(count), *args)
        args = keras.tree.map_structure(keras.ops.convert_to_tensor, args)
        for i in range(count):
            if i % 8 == 0 and bool(self._ended(state)):
                break
            state = self._step(state, *args)
        return state


def repeat(ended, step, state, count, *args):
    """What `CompiledLoop` runs, inside a graph."""
    kind = type(state)

    def going_on(i, *parts):
        return keras.ops.logical_and(i < count, keras.ops.logical_not(ended(kind(*parts))))

    def next_one(i, *parts):
        return (i + 1, *step(kind(*parts), *args))

    return kind(*keras.ops.while_loop(going_on, next_one, (keras.ops.zeros((), "int32"), *state))[1:])


def stream(dataset: keras.utils.PyDataset) -> Any:
    """A `PyDataset` of ragged batches in the form in which this backend's `fit` takes it.

    Keras fixes TensorFlow's shapes by the first two batches of a `PyDataset`, and later batches of
    another length fail; so TensorFlow gets a `tf.data.Dataset` whose sizes are all open.
    """
    if name() != "tensorflow":
        return dataset
    import tensorflow as tf

    size, signature = (
        len(dataset),
        keras.tree.map_structure(lambda x: tf.TensorSpec([None] * x.ndim, x.dtype), dataset[0]),
    )
    specs = keras.tree.flatten(signature)

    def batch(index):
        if index == 0:
            dataset.on_epoch_begin()
            if len(dataset) != size:
                raise invalid("A dataset must keep its number of batches.", first=size, now=len(dataset))
        # Copies: `on_epoch_end` may shuffle what the batch is a view of.
        arrays = [
            np.array(x, spec.dtype.as_numpy_dtype)
            for x, spec in zip(keras.tree.flatten(dataset[int(index)]), specs, strict=True)
        ]
        if index == size - 1:
            dataset.on_epoch_end()
        return arrays

    def tensors(index):
        flat = tf.numpy_function(batch, [index], [spec.dtype for spec in specs])
        for tensor, spec in zip(flat, specs, strict=True):
            tensor.set_shape(spec.shape)
        return keras.tree.pack_sequence_as(signature, flat)

    # Not `from_generator`: with it every freed block of memory over 128 kB goes back to the system at once (TensorFlow
    # 2.21, generator_dataset_op.cc), for the rest of the process; a training step of 99 ms took 124.
    return tf.data.Dataset.range(size).map(tensors).prefetch(2)


def is_stream(data: Any) -> bool:
    """Whether `data` is a `tf.data.Dataset`, as `stream` returns on TensorFlow."""
    if name() != "tensorflow":
        return False
    import tensorflow as tf

    return isinstance(data, tf.data.Dataset)
