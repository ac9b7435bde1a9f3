"""Functions of arrays as lists of torch's operations, without the layers around them."""

import warnings
from typing import Any

import keras

from keras_llama.backend.device import name

# Methods of arrays that do what operations of the same name do, called in half of their 5 microseconds.
_METHODS = {"add", "add_", "bmm", "index_copy_", "mean", "mm", "mul", "permute", "pow", "rsqrt", "split_with_sizes"}
_METHODS |= {"sub", "sum", "transpose", "unsqueeze", "view"}


class Flattened:
    """A function of arrays whose operations torch runs without the layers around them, which cost more than a step.

    They are listed once for each set of shapes, which `traces` counts, without gradients; nothing may depend on the
    values of the arrays. An argument that is only written to, as a cache is, is written to in place. On TensorFlow and
    JAX it is the function itself.

    Args:
        function: of arrays.
        variables: the Keras variables that it reads.
        by_compiler: whether `torch.compile` makes code of the list; if it cannot, a warning says so.
    """

    _MOST = 64  # lists at a time: each holds on to the weights that it was made with

    def __init__(self, function, variables, by_compiler=lambda: False):
        self.traces = 0
        self._function, self._variables, self._by_compiler = function, variables, by_compiler
        self._lists: dict[Any, Any] = {}

    def __call__(self, *args):
        if name() != "torch":
            return self._function(*args)
        import torch

        with torch.no_grad():
            return self._listed(args)(*args)

    def _listed(self, args):
        from torch.fx.experimental.proxy_tensor import make_fx

        shapes = [(x.shape, x.dtype, x.device) for x in keras.tree.flatten(args)]
        # A weight that is another array now, not one that was assigned to, is not on the list.
        key = (self._by_compiler(), *shapes, *(id(variable.value) for variable in self._variables))
        if key not in self._lists:
            self.traces += 1
            listed = make_fx(lambda *args: self._function(*args))(*args)  # it counts the `self` of a method
            _shorten(listed)
            if len(self._lists) == self._MOST:
                del self._lists[next(iter(self._lists))]
            self._lists[key] = _by_compiler(listed) if key[0] else listed
        return self._lists[key]


def _shorten(listed):
    """Leaves out what was computed before, as each layer does with angles and masks; writes into caches in place."""
    import torch

    def changes(node):
        return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

    known: dict[Any, Any] = {}
    for node in listed.graph.nodes:
        if node.op not in ("call_function", "get_attr") or changes(node) or any(map(changes, node.users)):
            continue
        if node.target == torch.ops.aten.lift_fresh_copy.default:  # of a number that Python wrote down: never changed
            node.replace_all_uses_with(node.args[0])
            continue
        _join_transpositions(node)
        first = known.setdefault(_meaning(listed, node), node)
        if first is not node:
            node.replace_all_uses_with(first)
        elif node.target == torch.ops.aten.index_copy.default:
            array = node.args[0]
            if array.op == "placeholder" and len(array.users) == 1:
                node.target = torch.ops.aten.index_copy_.default
    listed.graph.eliminate_dead_code()
    for node in listed.graph.nodes:
        library, *operation = str(node.target).split(".")  # such as aten.add.Tensor
        if library == "aten" and operation[0] in _METHODS and isinstance(node.args[0], torch.fx.Node):
            node.op, node.target = "call_method", operation[0]
    listed.recompile()


def _join_transpositions(node):
    """A transposition of a transposition becomes one of the array itself, or the array."""
    import torch

    axes, inner = _new_axes(node), node.args and node.args[0]
    before = axes and _new_axes(inner)
    if not before:
        return
    joined = [before[axis] for axis in axes]
    if joined == sorted(joined):
        node.replace_all_uses_with(inner.args[0])
    else:
        node.target, node.args = torch.ops.aten.permute.default, (inner.args[0], joined)


def _new_axes(node):
    """The axes that a transposition takes, in their new order; `None` for another node."""
    import torch

    if node.target == torch.ops.aten.permute.default:
        return [axis % len(node.args[1]) for axis in node.args[1]]
    if node.target == torch.ops.aten.transpose.int:
        axes = list(range(len(node.meta["tensor_meta"].shape)))
        one, other = node.args[1:]
        axes[one], axes[other] = axes[other], axes[one]
        return axes
    return None


def _meaning(listed, node):
    """What two nodes of a list share when they are the same number, or the same operation on the same arrays."""
    if node.op == "call_function":
        return node.target, repr(node.args), repr(node.kwargs)
    value = getattr(listed, node.target)
    return (value.dtype, value.tolist(), value.device) if value.ndim == 0 else node.target


def _by_compiler(listed):
    import torch

    chosen = torch.compile(listed, dynamic=False)

    def call(*args):
        nonlocal chosen
        try:
            return chosen(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(f"torch.compile failed; decoding goes on without it. {error}", stacklevel=2)
            chosen = listed
            return chosen(*args)

    return call
