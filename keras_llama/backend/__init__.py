"""The one place that asks which Keras backend runs, and the only one to import jax, tensorflow or torch."""

from keras_llama.backend.arrays import assign, bucket, buckets, columns, copy, mark, parts, write
from keras_llama.backend.compiled import (
    Compiled,
    CompiledLoop,
    has_branches,
    in_graph,
    one_by_one,
    repeat,
    traced,
)
from keras_llama.backend.device import (
    devices,
    fastest_precision,
    free_memory,
    has_gpu,
    has_replicas,
    name,
    random_states,
    resolve_jit,
    set_memory_growth,
    set_random_states,
    with_float32_weights,
)
from keras_llama.backend.gradients import (
    remat,
    remat_cheap,
    silu,
    softmax_error,
    with_gradients,
    without_gradients,
)
from keras_llama.backend.kernels import fused_attention, fuses_attention, repeats_keys
from keras_llama.backend.listed import Flattened
from keras_llama.backend.packing import copies_pay, multiply, packed
from keras_llama.backend.streams import is_stream, source_of, stream
from keras_llama.backend.updates import build_optimizer, find_weights, prepare_updates

__all__ = [
    "Compiled",
    "CompiledLoop",
    "Flattened",
    "assign",
    "bucket",
    "buckets",
    "build_optimizer",
    "columns",
    "copies_pay",
    "copy",
    "devices",
    "fastest_precision",
    "find_weights",
    "free_memory",
    "fused_attention",
    "fuses_attention",
    "has_branches",
    "has_gpu",
    "has_replicas",
    "in_graph",
    "is_stream",
    "mark",
    "multiply",
    "name",
    "one_by_one",
    "packed",
    "parts",
    "prepare_updates",
    "random_states",
    "remat",
    "remat_cheap",
    "repeat",
    "repeats_keys",
    "resolve_jit",
    "set_memory_growth",
    "set_random_states",
    "silu",
    "softmax_error",
    "source_of",
    "stream",
    "traced",
    "with_float32_weights",
    "with_gradients",
    "without_gradients",
    "write",
]
