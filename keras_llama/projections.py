"""Products of one input with the kernels of several layers, and copies of kernels for decoding.

A model's weights stay one kernel per layer, which checkpoints, adapters and sharding name. A step of decoding reads
them all for a few tokens, and is as fast as it reads: so copies are made for the time of one generation, from what the
weights are then. Shapes: D in, units out.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Sequence

import keras
from keras import ops

from keras_llama import backend

_copies: contextvars.ContextVar[dict | None] = contextvars.ContextVar("copies", default=None)


def project(x, *layers):
    """What each layer makes of x (..., D): a tuple of arrays (..., units).

    Args:
        x: in the dtype to multiply in.
        layers: `Projection`s; or a token embedding, which is meant in reverse, as the head.
    """
    copies = _copies.get() or {}
    if layers[0] in copies:
        kernel, *bias = copies[layers[0]]
        product = sum(bias, backend.multiply(x, kernel))
        ends = list(itertools.accumulate(layer.units for layer in layers[:-1]))
        return tuple(ops.split(product, ends, axis=-1)) if ends else (product,)
    return tuple(layer(x, reverse=True) if _is_head(layer) else layer(x) for layer in layers)


@contextlib.contextmanager
def multiplying(groups: Sequence[tuple], copies: Sequence) -> Iterator[None]:
    """Has `project` multiply with these copies, one or `None` for each group, instead of the groups' kernels."""
    token = _copies.set({group[0]: copy for group, copy in zip(groups, copies, strict=True) if copy is not None})
    try:
        yield
    finally:
        _copies.reset(token)


def copies_of(groups: Sequence[tuple]) -> list:
    """What `project` multiplies with now: `multiplying`'s copies of these groups."""
    copies = _copies.get() or {}
    return [copies.get(group[0]) for group in groups]


class KernelCopies:
    """Copies of kernels that steps of few tokens read faster: of the layers that share an input, one.

    A group has none where it would be no faster by it (`backend.copies_pay`), or is quantised; adapters are
    in the copies.
    Where weights have another dtype than the products, each group has a copy in the products'.

    Args:
        groups: tuples of layers, as `project` is called with them.
        variables: the weights of the model.
    """

    def __init__(self, groups: Sequence[tuple], variables: Sequence):
        self.groups, self.variables = groups, variables
        self._makers: dict[tuple, backend.Compiled] = {}

    def make(self, rows: int, steps: int) -> dict[int, tuple]:
        """By number of its group, for `steps` of `rows` tokens: kernel (D, units of all), and bias if there is one."""
        pays = [backend.copies_pay(rows, steps, len(group), group[0].compute_dtype) for group in self.groups]
        chosen = tuple((i, pays[i]) for i, group in enumerate(self.groups) if _wants_copy(group, pays[i]))
        if chosen not in self._makers:
            self._makers[chosen] = backend.Compiled(
                lambda: {i: _copy(self.groups[i], pack) for i, pack in chosen}, self.variables
            )
        return self._makers[chosen]()

    def used(self, copies: dict[int, tuple]) -> contextlib.AbstractContextManager:
        """Has `project` multiply with what `make` returned."""
        return multiplying(self.groups, [copies.get(i) for i in range(len(self.groups))])


def _wants_copy(group, pays):
    return all(layer.quantization_mode is None for layer in group) and (
        pays or group[0].variable_dtype != group[0].compute_dtype
    )


def _copy(group, pack):
    dtype = group[0].compute_dtype
    if _is_head(group[0]):
        kernels, biases = [ops.cast(ops.transpose(group[0].embeddings), dtype)], []
    else:
        # In half precision a part of what an adapter adds is lost, and `packed` may keep all of it.
        joined = "float32" if any(layer.adapter is not None for layer in group) else dtype
        kernels = [layer.merged_kernel(joined) for layer in group]
        biases = [ops.cast(layer.bias, dtype) for layer in group if layer.use_bias]
    kernel, *bias = (ops.concatenate(part, axis=-1) if len(part) > 1 else part[0] for part in (kernels, biases) if part)
    return backend.packed(kernel, dtype) if pack else ops.cast(kernel, dtype), *bias


def _is_head(layer):
    return isinstance(layer, keras.layers.ReversibleEmbedding)
