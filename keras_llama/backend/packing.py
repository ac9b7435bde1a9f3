"""Kernels as products with few rows read them fastest on a CPU.

torch's oneDNN has a layout of its own, read up to twice as fast. XLA widens bfloat16 kernels to float32 before it
multiplies, all of them in each call, which takes as long as ten steps.
"""

import functools
import pathlib
import platform

import keras

from keras_llama.backend.device import has_gpu, name


def copies_pay(rows: int, steps: int, kernels: int, dtype: str) -> bool:
    """Whether `steps` steps of decoding gain by a copy of `kernels` kernels as one, `packed`, made for this call.

    As measured on a CPU (benchmarks/RESULTS.md): what torch packs takes as long as it saves in some thirty steps; what
    XLA widens it would widen again and again. Else several kernels as one are read faster, on TensorFlow for up to
    four rows; such a copy takes the time that it saves in some ten steps.
    """
    if has_gpu():
        return False
    if packs(dtype):
        return name() != "torch" or steps > 32
    return kernels > 1 and steps > 16 and (name() == "torch" or (name() == "tensorflow" and rows <= 4))


def packs(dtype: str) -> bool:
    """Whether `packed` makes another array of a kernel, on a CPU."""
    if name() != "torch":
        return dtype in ("bfloat16", "float16")
    import torch

    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    # In float32 torch multiplies by MKL, whose products are faster than oneDNN's on Intel's own CPUs.
    return (dtype == "float32" and not _is_intel()) or (
        dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@functools.cache
def _is_intel() -> bool:
    """By name, not by a measurement: results do not change from run to run."""
    cpus = pathlib.Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpus.read_text() if cpus.exists() else platform.processor())


def packed(kernel, dtype):
    """A copy of a kernel (D, units) for `multiply` with arrays of this dtype, where `packs`; else the kernel in it."""
    if packs(dtype) and name() != "torch":
        return keras.ops.cast(kernel, "float32")
    kernel = keras.ops.cast(kernel, dtype)
    if not packs(dtype):
        return kernel
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(kernel.t(), 1)


def multiply(x, kernel):
    """x (..., D) times a kernel (D, units), or what `packed` made of it: (..., units), in the dtype of x."""
    if getattr(kernel, "is_mkldnn", False):
        return _library()[1](x, kernel)
    return keras.ops.cast(keras.ops.matmul(keras.ops.cast(x, kernel.dtype), kernel), x.dtype)


@functools.cache
def _library():
    """The library of our operations, kept because they end with it, and oneDNN's product as one of them.

    `torch.compile` takes torch's own operation for constant kernels only.
    """
    import torch

    library = torch.library.Library("keras_llama", "DEF")
    library.define("packed_product(Tensor x, Tensor kernel) -> Tensor")
    product = torch.ops.mkldnn._linear_pointwise.default
    library.impl("packed_product", lambda x, kernel: product(x, kernel, None, "none", [], ""), "MkldnnCPU")
    torch.library.register_fake(
        "keras_llama::packed_product", lambda x, kernel: x.new_empty((*x.shape[:-1], kernel.shape[0])), lib=library
    )
    return library, torch.ops.keras_llama.packed_product.default
