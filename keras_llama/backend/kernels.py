"""Attention by the backends' fused kernels, which never hold its weights."""

import functools

import keras

from keras_llama.backend.device import has_gpu, name


def fuses_attention() -> bool:
    """Whether there is a fused kernel for attention; Keras' own is else plain products, which repeat keys."""
    return name() == "torch" or (name() == "jax" and has_gpu())


def fused_attention(query, key, value, mask, training=False):
    """softmax(query key^T / sqrt(H)) value, of (B, N, T, H), (B, K, S, H) and a mask bool (B, T, S): (B, N, T, H).

    In `training` torch leaves out a mask that is causal.
    """
    if name() == "torch":
        return _fused_by_torch(query, key, value, mask, training)
    inputs = (keras.ops.transpose(x, (0, 2, 1, 3)) for x in (query, key, value))
    found = keras.ops.dot_product_attention(*inputs, mask=keras.ops.expand_dims(mask, 1))
    return keras.ops.transpose(found, (0, 2, 1, 3))


def repeats_keys(key_heads: int) -> bool:
    """Whether `fused_attention` repeats keys and values, which have so many heads in all rows, for each query head.

    On a CPU torch's kernel takes them as they are, and hands out its backward pass by their heads: there must be enough
    of them. On a GPU not each of its kernels does, and where torch traces the number of rows is open.
    """
    if name() != "torch":
        return False
    import torch

    return has_gpu() or torch.compiler.is_compiling() or key_heads < 2 * torch.get_num_threads()


def _fused_by_torch(query, key, value, mask, training):
    """Not by Keras, whose own (3.15) repeats each key for the query heads of its group, and always has a mask.

    On a GPU the fastest kernel takes none. Whether one is needed is asked in training alone: the blocks of a step share
    their mask, those of a prompt and its cache do not.
    """
    import torch

    groups = query.shape[1] // key.shape[1]
    if groups > 1 and repeats_keys(key.shape[0] * key.shape[1]):
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mask = keras.ops.convert_to_tensor(mask, "bool")
    causal = bool(training) and _is_causal(mask)
    grouped = bool(key.shape[1] < query.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=None if causal else mask[:, None], is_causal=causal, enable_gqa=grouped
    )


def _is_causal(mask) -> bool:
    """Whether each query sees itself and all before it, no more: a batch without padding. Asked once for each mask.

    Where torch traces, or builds a model, no mask has values yet. Masks are never written to.
    """
    import torch

    if torch.compiler.is_compiling() or mask.is_meta or mask.shape[1] != mask.shape[2] or mask.shape[1] == 1:
        return False
    known = _known_masks()
    if mask not in known:
        known[mask] = bool((mask == mask.new_ones(mask.shape[1:]).tril()).all())
    return known[mask]


@functools.cache
def _known_masks():
    """Whether a mask is causal, by the mask itself; it goes with the mask."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()
