"""Functions of arrays and of a model's weights, compiled, and loops over them."""

import functools

import keras
import numpy as np

from keras_llama.backend.device import name


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
        args = keras.tree.map_structure(_argument, args)
        if name() == "jax":
            return self._call([variable.value for variable in self._variables], *args)
        return self._call(*args)


def _argument(value):
    """An argument as a tensor; on torch an array without axes stays a number, for a branch on it waits for no GPU."""
    if name() == "torch" and isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    return keras.ops.convert_to_tensor(value)


def has_branches() -> bool:
    """Whether a step that is compiled once may choose between operations; torch's lists cannot."""
    return name() != "torch"


def in_graph() -> bool:
    """Whether this runs while TensorFlow traces a graph."""
    if name() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def traced(function):
    """A function (values, *arrays) that TensorFlow traces once for each set of shapes, as one (variables, *arrays).

    It is to be called inside of a graph, which then holds it once.
    """
    import tensorflow as tf

    shared = tf.function(function, autograph=False)
    return lambda variables, *args: shared([tf.convert_to_tensor(v.value) for v in variables], *args)


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
        args = keras.tree.map_structure(_argument, args)
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


def one_by_one(going_on, turn, state):
    """`keras.ops.while_loop` without the turns that TensorFlow takes ahead, each of which holds arrays of its own."""
    if name() != "tensorflow":
        return keras.ops.while_loop(going_on, turn, state)
    import tensorflow as tf

    return tf.while_loop(going_on, turn, state, parallel_iterations=1)
