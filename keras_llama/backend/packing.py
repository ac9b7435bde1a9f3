"""Kernels laid out for products with few rows: torch's oneDNN reads its own layout up to twice as fast."""

import functools

import keras

from keras_llama.backend.device import has_gpu, name


def copies_pay(rows: int, steps: int, kernels: int, dtype: str) -> bool:
    """Whether `steps` steps of decoding gain by a copy of `kernels` kernels as one, `packed`, made for this call.

    As measured on a CPU (benchmarks/RESULTS.md): on TensorFlow for up to four rows, the kernels being several; a copy
    takes the time that it saves in some ten steps. On torch where it packs them, which takes some thirty.
    """
    if has_gpu():
        return False
    if name() == "tensorflow":
        return kernels > 1 and rows <= 4 and steps > 16
    return packs(dtype) and steps > 32


def packs(dtype: str) -> bool:
    """Whether `packed` makes another layout of a kernel, on a CPU."""
    if name() != "torch":
        return False
    import torch

    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == "float32" or (dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(kernel):
    """A copy of a kernel (D, units) for `multiply`, where `packs`; else the kernel itself."""
    if not packs(keras.backend.standardize_dtype(kernel.dtype)):
        return kernel
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(kernel.t(), 1)


def multiply(x, kernel):
    """x (..., D) times a kernel (D, units), or what `packed` made of it: (..., units)."""
    return _library()[1](x, kernel) if getattr(kernel, "is_mkldnn", False) else keras.ops.matmul(x, kernel)


@functools.cache
def _library():
    """oneDNN's product as an operation of our own, and its library, with which it would go.

    `torch.compile` takes torch's for constant kernels only.
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
