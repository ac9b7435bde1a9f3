"""llama2.c's `.bin` files, the legacy format and versions 1 and 2: https://github.com/karpathy/llama2.c, export.py."""

import functools
import math
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_llama.checkpoints import mapping
from keras_llama.checkpoints.checkpoint import Checkpoint, Tensor
from keras_llama.checkpoints.hf import pickled
from keras_llama.config import LlamaConfig, invalid

_MAGIC = 0x616B3432  # "ak42"
_HEADER = struct.Struct("<7i")  # dim, hidden_dim, layers, heads, key/value heads, vocabulary, context
_VERSIONED = 256  # bytes of the header of versions 1 and 2
_PICKLES = (b"PK", b"\x80")
_BEGIN, _END = 1, 2  # of the vocabularies that llama2.c trains; its program stops at both


def read(path: str | os.PathLike) -> Checkpoint:
    """Opens a file; no tensor is read yet. A SentencePiece `tokenizer.model` or `tok<V>.model` beside it is taken.

    Raises:
        ValueError: for a pickle, a wrong magic number, or a size that the header does not explain.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_VERSIONED)
    if start.startswith(_PICKLES):
        raise pickled(path, [path.name])
    if len(start) < _VERSIONED:
        raise invalid(f"{path}: expected a llama2.c file.", size=size)
    version, tied, group = 0, True, 0
    numbers = _HEADER.unpack_from(start)
    if struct.unpack_from("<I", start)[0] == _MAGIC:
        version = struct.unpack_from("<i", start, 4)[0]
        numbers = _HEADER.unpack_from(start, 8)
        tied, group = bool(start[36]), struct.unpack_from("<i", start, 37)[0]
    else:
        tied = numbers[5] > 0  # a negative vocabulary size says that the head is apart
        numbers = (*numbers[:5], abs(numbers[5]), numbers[6])
    plain = version in (0, 1, 2) and min(numbers) > 0 and (version < 2 or group > 0)
    if not plain or numbers[0] % numbers[3] or numbers[3] % numbers[4]:
        raise invalid(
            f"{path}: expected a GGUF file, or a llama2.c file of version 0, 1 or 2.",
            "Its first bytes are neither.",
            first_bytes=start[:8],
        )
    places, end = _places(version, numbers, tied, group)
    if end != size:
        raise invalid(
            f"{path}: expected {end} bytes, from the sizes in its header.",
            "It is cut off, damaged, or no llama2.c file.",
            size=size,
        )
    dim, hidden, layers, heads, kv_heads, vocabulary, context = numbers
    config = LlamaConfig(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_dim=dim,
        intermediate_dim=hidden,
        tie_word_embeddings=tied,
        context_length=context,
    )
    tensors = {}
    for name, shape, place, groups in places:
        row, _ = mapping.hf_to_gguf(name)
        tensors[name] = Tensor(shape, functools.partial(_read, path, shape, place, groups, row, config))
    beside = [path.with_name(name) for name in ("tokenizer.model", f"tok{vocabulary}.model")]
    models = [model for model in beside if model.is_file()]
    return Checkpoint(
        source=str(path),
        config=config,
        tensors=tensors,
        dtype="bfloat16" if version == 2 else "float32",
        tokenizer_files={"tokenizer.model": models[0].read_bytes()} if models else {},
        generation={"bos_token_id": _BEGIN, "eos_token_id": [_BEGIN, _END]},
    )


def _order(version: int, numbers: tuple[int, ...], tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file; "" is a table that nobody needs."""
    dim, hidden, layers, heads, kv_heads, vocabulary, context = numbers
    kv = dim // heads * kv_heads
    matrices = [
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv, dim)),
        ("self_attn.v_proj", (kv, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]

    def every(part: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((f"layers.{i}.{part}.weight", shape) for i in range(layers))

    embedding, norm = ("embed_tokens.weight", (vocabulary, dim)), ("norm.weight", (dim,))
    norms = [every("input_layernorm", (dim,)), every("post_attention_layernorm", (dim,))]
    if version == 0:
        yield embedding
        yield from norms[0]
        for matrix in matrices[:4]:
            yield from every(*matrix)
        yield from norms[1]
        for matrix in matrices[4:]:
            yield from every(*matrix)
        yield norm
        yield "", (2, context, dim // heads // 2)  # cosines and sines
    else:
        yield from norms[0]
        yield from norms[1]
        yield norm
        yield embedding
        for matrix in matrices:
            yield from every(*matrix)
    if not tied:
        yield "lm_head.weight", (vocabulary, dim)


def _places(version: int, numbers: tuple[int, ...], tied: bool, group: int) -> tuple[list[Any], int]:
    """(name, shape, offset, group size or 0) of each tensor, and where the file ends."""
    place = _VERSIONED if version else _HEADER.size
    layers = numbers[2]
    if layers > 10_000:  # a number that no list should be as long as
        return [], -1
    found = []
    for name, shape in _order(version, numbers, tied):
        quantised = version == 2 and len(shape) == 2
        if name:
            found.append((name, shape, place, group if quantised else 0))
        count = math.prod(shape)
        place += count + count // group * 4 if quantised else count * 4
    return found, place


def _read(path, shape, place, group, row, config) -> np.ndarray:
    count = math.prod(shape)
    if not group:
        values = np.memmap(path, "<f4", "r", offset=place, shape=(count,))
        return mapping.deinterleave(values.reshape(shape), row, config)
    integers = np.memmap(path, "i1", "r", offset=place, shape=(count,)).reshape(-1, group)
    scales = np.memmap(path, "<f4", "r", offset=place + count, shape=(count // group,))
    values = integers.astype("float32") * scales[:, None]
    return mapping.deinterleave(values.reshape(shape), row, config)
