"""What is remembered for a gradient and what is computed again; each written for every backend."""

import contextlib
import functools

import keras

from keras_llama.backend.device import name


def silu(x):
    """x sigmoid(x).

    TensorFlow's own is a custom gradient, and such a one is registered anew with each graph that is traced, for good:
    neither the graph nor the weights that it reads would ever be freed (TensorFlow 2.21).
    """
    return x * keras.ops.sigmoid(x) if name() == "tensorflow" else keras.ops.silu(x)


def softmax_error(logits, targets, weights, smoothing=0.0):
    """Cross-entropy of logits (R, V) against ids (R,), its gradient, and hits (R,).

    The gradient, (R, V) in the logits' dtype, is (softmax - one-hot) times float32 weights (R,); a share `smoothing` of
    the one-hot is spread evenly, for the gradient alone. Computed in float32, by the fewest passes over memory; torch
    writes the gradient over the logits.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        # A fourth of the time that TensorFlow's own cross-entropy takes on a CPU.
        wide = tf.cast(logits, "float32")
        best = tf.argmax(wide, axis=-1, output_type="int32")
        shares = tf.nn.softmax(wide)
        top, chosen, largest = (
            tf.gather(x, i, batch_dims=1) for x, i in ((wide, best), (wide, targets), (shares, best))
        )
        places = tf.stack([tf.range(tf.shape(targets)[0]), targets], axis=1)
        error = tf.tensor_scatter_nd_sub(shares, places, tf.fill(tf.shape(targets), 1.0 - smoothing))
        error = (error - smoothing / logits.shape[-1] if smoothing else error) * weights[:, None]
        # The largest share is 1 / sum.
        return top - tf.math.log(largest) - chosen, tf.cast(error, logits.dtype), tf.equal(best, targets)
    if name() == "jax":
        import jax

        wide = logits.astype("float32")
        total = jax.nn.logsumexp(wide, axis=-1, keepdims=True)
        target = jax.nn.one_hot(targets, logits.shape[-1], dtype="bool")
        chosen = jax.numpy.sum(jax.numpy.where(target, wide, 0.0), axis=-1)
        hits = jax.numpy.argmax(wide, axis=-1) == targets
        error = jax.numpy.exp(wide - total) - target * (1 - smoothing) - smoothing / logits.shape[-1]
        return total[:, 0] - chosen, (error * weights[:, None]).astype(logits.dtype), hits
    import torch

    # A CPU fills rows that it holds in its caches faster than the system hands out a new array of the logits' size.
    rows = max(1, 2**20 // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    pieces = zip(logits.split(rows), targets.split(rows), weights.split(rows), strict=True)
    entropies, hits = zip(*(_softmax_error_in_place(*piece, smoothing) for piece in pieces), strict=True)
    return torch.cat(entropies), logits, torch.cat(hits)


def _softmax_error_in_place(logits, targets, weights, smoothing):
    """`softmax_error` by torch, but for the gradient, which the logits then hold."""
    import torch

    index, weights = targets[:, None].long(), weights[:, None]
    wide = logits.float()
    hits = torch.argmax(wide, -1) == targets
    top, chosen = torch.amax(wide, -1, keepdim=True), wide.gather(1, index)
    powers = wide.sub_(top).exp_()
    sums = powers.sum(-1, keepdim=True)
    entropy = (sums.log() + top - chosen)[:, 0]
    error = powers.mul_(weights / sums).scatter_add_(1, index, weights * (smoothing - 1))
    if smoothing:
        error.sub_(weights * (smoothing / logits.shape[-1]))
    logits.copy_(error)
    return entropy, hits


def without_gradients():
    """A scope in which torch remembers nothing for a gradient, as it else does wherever weights are trained."""
    if name() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def remat(function, variables=()):
    """A function of arrays that is computed again for its gradient, instead of its intermediate results being kept.

    It must draw no random numbers: they would be others the second time.

    Args:
        function: arrays -> a pytree of arrays.
        variables: the Keras variables that it reads; frozen ones, too, which JAX knows nowhere else while `fit` runs.
    """
    if name() == "jax":
        return functools.partial(_remat_in_jax, function, variables)
    if name() == "torch":
        from torch.utils.checkpoint import checkpoint

        return functools.partial(checkpoint, function, use_reentrant=False)
    import tensorflow as tf

    if tf.executing_eagerly():
        return tf.recompute_grad(function)
    return functools.partial(_remat_in_graph, function, [v for v in variables if v.trainable])


def remat_cheap(function, variables=()):
    """`remat` of what takes next to no time to compute again: elementwise, and at most one product at its end.

    A product's own result is not needed for its gradient, so it is not computed twice. Only for TensorFlow's graph,
    which keeps the result of each operation; XLA makes one operation of them.
    """
    if name() != "tensorflow":
        return function
    import tensorflow as tf

    return function if tf.executing_eagerly() else remat(function, variables)


def _with_values(function, variables):
    """A function of arrays and a list of values that the variables then have."""

    def run(arrays, values):
        with keras.StatelessScope(zip(variables, values, strict=True)):
            return function(*arrays)

    return run


def _remat_in_jax(function, variables, *arrays):
    """`jax.checkpoint` saves nothing on a CPU, where XLA computes all at once what may be computed early (JAX 0.10)."""
    import jax

    run = _with_values(function, variables)

    def late(x, zero):
        return x + zero.astype(x.dtype) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x

    def backward(inputs, upstream):
        zero = jax.tree.leaves(upstream)[0].reshape(-1)[:1].sum() * 0  # as in `_remat_in_graph`
        return jax.vjp(run, *jax.tree.map(lambda x: late(x, zero), inputs))[1](upstream)

    call = jax.custom_vjp(run)
    call.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
    return call(arrays, [variable.value for variable in variables])


def _remat_in_graph(function, variables, *arrays):
    """The first of the arrays holds floats."""
    import tensorflow as tf

    given, on_values = len(tf.nest.flatten(arrays)), _with_values(function, variables)
    structure = []

    def run(inputs):
        outputs = on_values(tf.nest.pack_sequence_as(arrays, inputs[:given]), inputs[given:])
        structure.append(outputs)
        return tf.nest.flatten(outputs)

    def backward(inputs, upstream):
        # A zero that hangs on the gradient keeps the second computation apart from the first, for XLA, too. All else
        # need only wait for the gradient, which takes no copy.
        first, *rest = inputs
        first += tf.cast(tf.reduce_sum(tf.reshape(upstream[0], [-1])[:1]) * 0, first.dtype)
        with tf.control_dependencies(upstream[:1]):
            inputs = [first, *map(tf.identity, rest)]
        floats = [x for x in inputs if x.dtype.is_floating]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(floats)
            outputs = run(inputs)
        found = iter(tape.gradient(outputs, floats, output_gradients=upstream))
        return [next(found) if x.dtype.is_floating else None for x in inputs]

    values = [tf.convert_to_tensor(variable.value) for variable in variables]
    flat = _in_graph(run, backward, [*tf.nest.flatten(arrays), *values])
    return tf.nest.pack_sequence_as(structure[-1], flat)


def with_gradients(value, arrays, gradients):
    """`value` (), whose gradient by each of `arrays` is known: these, float32, times the one that comes from above."""
    if name() == "tensorflow":
        import tensorflow as tf

        if not tf.executing_eagerly():
            kinds = [x.dtype for x in arrays]

            def backward(inputs, upstream):
                known = inputs[-len(kinds) :]
                found = [tf.cast(x * upstream[0], kind) for x, kind in zip(known, kinds, strict=True)]
                return [None, *found, *[None] * len(kinds)]

            return _in_graph(
                lambda inputs: inputs[:1], backward, [value, *map(tf.convert_to_tensor, arrays), *gradients]
            )[0]
    for array, gradient in zip(arrays, gradients, strict=True):
        # Adds nothing but a gradient. As a product of matrices, whose gradient is `gradient` times a number: one of a
        # sum would first be spread over the vocabulary.
        one, other = (keras.ops.reshape(x, s) for x, s in ((array, (1, -1)), (gradient, (-1, 1))))
        product = keras.ops.matmul(keras.ops.cast(one, "float32"), other)
        value += keras.ops.sum(product - keras.ops.stop_gradient(product))
    return value


def _in_graph(run, backward, inputs):
    """`run(inputs)`, a list, whose gradient is `backward(inputs, upstream)`; a custom one, but see `silu`.

    This gradient hangs on an operation of the graph, and goes with it.
    """
    import tensorflow as tf

    @tf.function(autograph=False)  # the gradient of a call asks the operations inside for theirs; a tape would not
    def call(*inputs):
        flat = run([tf.stop_gradient(x) for x in inputs])
        _register_once()
        with tf.compat.v1.get_default_graph().gradient_override_map({"IdentityN": _OF_GRAPH}):
            passed = tf.identity_n([*flat, *inputs])
        passed[0].op.keras_llama_backward = lambda inputs, upstream: [
            *[None] * len(flat),
            *backward(inputs[len(flat) :], upstream[: len(flat)]),
        ]
        return passed[: len(flat)]

    return call(*inputs)


_OF_GRAPH = "KerasLlamaGradient"


@functools.cache
def _register_once():
    import tensorflow as tf

    tf.RegisterGradient(_OF_GRAPH)(lambda op, *upstream: op.keras_llama_backward(list(op.inputs), list(upstream)))
