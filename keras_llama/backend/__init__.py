"""The one place that asks which Keras backend runs, and the only one to import jax, tensorflow or torch."""

from keras_llama.backend.arrays import assign, bucket, buckets, columns, contiguous, copy, mark, parts, write
from keras_llama.backend.compiled import Compiled, CompiledLoop, compile_updates, flattened, repeat
from keras_llama.backend.device import (
    devices,
    fuses_attention,
    has_gpu,
    name,
    reads_copies_faster,
    resolve_jit,
    set_memory_growth,
)
from keras_llama.backend.gradients import remat, silu, softmax_error
from keras_llama.backend.streams import is_stream, stream

__all__ = [
    "Compiled",
    "CompiledLoop",
    "assign",
    "bucket",
    "buckets",
    "columns",
    "compile_updates",
    "contiguous",
    "copy",
    "devices",
    "flattened",
    "fuses_attention",
    "has_gpu",
    "is_stream",
    "mark",
    "name",
    "parts",
    "reads_copies_faster",
    "remat",
    "repeat",
    "resolve_jit",
    "set_memory_growth",
    "silu",
    "softmax_error",
    "stream",
    "write",
]
