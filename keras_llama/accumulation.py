"""Gradient accumulation in which tokens count, not steps: Keras' optimizers give each step of a group one vote."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from keras import ops

from keras_llama import backend

_weight: contextvars.ContextVar[Any] = contextvars.ContextVar("weight", default=None)


@contextlib.contextmanager
def weighing(weight: Any) -> Iterator[None]:
    """Inside, a step's gradient, the mean over its tokens, has this weight in the mean of its group."""
    token = _weight.set(weight)
    try:
        yield
    finally:
        _weight.reset(token)


def weigh_steps(optimizer: Any) -> None:
    """Has an optimizer with `gradient_accumulation_steps` take the mean over all that counts in a group.

    Of gradients g and weights w of N steps that is sum(w g) / sum(w), where Keras takes sum(g) / N. So it is handed
    w g, which it adds up, and in the last step what is then missing to N times that mean. Weights are relative to the
    first of the group that is not 0, so that numbers stay near 1. With several replicas, and under mixed_float16, whose
    optimizer is another one's inner, it stays Keras' own.
    """
    steps = optimizer.gradient_accumulation_steps
    if not steps or hasattr(optimizer, "weighs_steps") or backend.has_replicas():
        return
    apply = optimizer.apply
    unit, total = (
        optimizer.add_variable((), initializer="zeros", dtype="float32", name=f"group_{name}")
        for name in ("unit", "total")
    )

    def weighted(grads, trainable_variables=None):
        weight = _weight.get()
        if weight is None:
            return apply(grads, trainable_variables)
        if not optimizer.built:
            optimizer.build(trainable_variables)
        place = ops.mod(ops.convert_to_tensor(optimizer._iterations), steps)
        first, last = ops.equal(place, 0), ops.equal(place, steps - 1)
        counted = ops.where(first, 0.0, ops.convert_to_tensor(total))
        unit.assign(ops.where(counted > 0, ops.convert_to_tensor(unit), ops.maximum(weight, 1e-6)))
        share = weight / ops.convert_to_tensor(unit)
        total.assign(counted + share)
        mean = steps / ops.maximum(ops.convert_to_tensor(total), 1e-6)

        def handed(grad, sum_before):
            part = grad * ops.cast(share, grad.dtype)
            before = ops.cast(ops.convert_to_tensor(sum_before), grad.dtype)
            return ops.where(last, (part + before) * ops.cast(mean, grad.dtype) - before, part)

        # Some of the variables that it was built on may be frozen by now, and one without a gradient has none to weigh.
        known, sums = optimizer._trainable_variables, optimizer._accumulated_gradients
        sum_of = {id(variable): s for variable, s in zip(known, sums, strict=True)}
        pairs = zip(grads, trainable_variables or known, strict=True)
        grads = [g if g is None else handed(ops.convert_to_tensor(g), sum_of[id(variable)]) for g, variable in pairs]
        return apply(grads, trainable_variables)

    optimizer.apply, optimizer.weighs_steps = weighted, True
