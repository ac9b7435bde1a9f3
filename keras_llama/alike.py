"""Blocks that are alike, traced once: TensorFlow takes longer to trace a step of thirty blocks than to run it."""

import functools

import keras

from keras_llama import backend
from keras_llama.projections import copies_of, multiplying


class BlockRunner:
    """Runs blocks without a gradient; in a TensorFlow graph those of one architecture share the trace of the first."""

    def __init__(self):
        self._traced = {}

    def __call__(self, block, *args, **kwargs):
        if not backend.in_graph():
            return block(*args, **kwargs)
        key = _architecture(block)
        if key not in self._traced:
            self._traced[key] = backend.traced(functools.partial(_run, block))
        return self._traced[key](block.variables, copies_of(block.projections), args, kwargs)


def _run(block, values, copies, args, kwargs):
    """The block with the weights, and the copies of kernels, of one that is like it."""
    of_another = keras.StatelessScope(state_mapping=zip(block.variables, values, strict=True))
    with of_another, multiplying(block.projections, copies):
        return block(*args, **kwargs)


def _architecture(block):
    """What tells blocks apart, but for their weights: quantised and adapted layers say so in their configuration."""
    layers = (block, *(layer for group in block.projections for layer in group))
    return repr([(type(layer), {**layer.get_config(), "name": None}) for layer in layers])
