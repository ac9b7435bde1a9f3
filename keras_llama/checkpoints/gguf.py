"""GGUF files of the architecture "llama", in and out.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here, because every size in it is
checked against the file before it is believed; the `gguf` package dequantises, quantises and writes.
"""

import dataclasses
import functools
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from keras_llama import backend
from keras_llama.beside import written_beside
from keras_llama.checkpoints import gguf_tokenizer, mapping
from keras_llama.checkpoints.checkpoint import Checkpoint, Tensor
from keras_llama.config import LlamaConfig, invalid
from keras_llama.rope import inverse_frequencies

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_DEEPEST, _MOST_DIMENSIONS = 2, 4  # arrays of arrays of arrays, and tensors of five dimensions, are no GGUF
_ROPE_FACTORS = "rope_freqs.weight"
_QUANTIZATIONS = ("f32", "f16", "q8_0")
_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Our field, the GGUF field after "llama.", and the value that stands in for a missing one.
_FIELDS = (
    ("num_layers", "block_count", ...),
    ("context_length", "context_length", None),
    ("hidden_dim", "embedding_length", ...),
    ("intermediate_dim", "feed_forward_length", ...),
    ("num_query_heads", "attention.head_count", ...),
    ("num_key_value_heads", "attention.head_count_kv", None),
    ("layer_norm_epsilon", "attention.layer_norm_rms_epsilon", ...),
    ("rope_max_wavelength", "rope.freq_base", 10_000.0),
)
_SCALING = "rope.scaling."
_READ = {  # by `_config` and `_scaling`, beside those of _FIELDS
    "vocab_size",
    "rope.dimension_count",
    "attention.key_length",
    "attention.value_length",
    "rope.scale_linear",
    f"{_SCALING}type",
    f"{_SCALING}factor",
    f"{_SCALING}original_context_length",
    f"{_SCALING}attn_factor",
    f"{_SCALING}yarn_beta_fast",
    f"{_SCALING}yarn_beta_slow",
    f"{_SCALING}finetuned",
}
_ABSENT_OR_ZERO = {"expert_count", "expert_used_count", "attention.sliding_window"}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of the file: GGUF's type, shape as (out, in), and where its bytes stand."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read(path: str | os.PathLike) -> Checkpoint:
    """Opens a GGUF file; no tensor is read yet.

    Raises:
        ValueError: for a file that is broken, of another architecture, quantised in a way that is not
            supported, or with settings that would change the maths.
    """
    path = pathlib.Path(path)
    metadata, stored = read_header(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise invalid(f'{path}: expected the architecture "llama".', architecture=architecture)
    config = _config(path, metadata, stored)
    tensors = {}
    for name, info in stored.items():
        if name == _ROPE_FACTORS:
            continue  # its content is in the configuration
        found = mapping.gguf_to_hf(name)
        if found is None:
            raise invalid(f"{path}: expected tensors of LLaMA only.", tensor=name, shape=info.shape)
        row, theirs = found
        tensors[theirs] = Tensor(info.shape, functools.partial(_read, path, info, row, config))
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    kinds = {info.kind for info in stored.values() if len(info.shape) > 1}
    return Checkpoint(
        source=str(path),
        config=config,
        tensors=tensors,
        dtype=_DTYPES.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16",
        tokenizer_files=gguf_tokenizer.from_gguf(metadata) if "tokenizer.ggml.model" in metadata else {},
        generation={
            "eos_token_id": sorted({token for token in ends if token is not None}),
            **({} if begin is None else {"bos_token_id": begin}),
        },
    )


def read_header(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """The fields of a file, as Python values, and its tensors."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != _MAGIC:
        raise invalid(f"{path}: expected a GGUF file, which begins with GGUF.", magic=magic)
    reader = _Reader(path)
    version = reader.number("<u4")
    if version not in _VERSIONS:
        raise invalid(f"{path}: expected GGUF version 2 or 3.", version=version)
    tensors, fields = reader.number("<u8"), reader.number("<u8")
    reader.room(tensors * 24 + fields * 13, "entries")  # the least that so many can take
    metadata: dict[str, Any] = {}
    for _ in range(fields):
        name = reader.string()
        metadata[name] = reader.value(reader.number("<u4"))
    infos = {}
    for _ in range(tensors):
        name = reader.string()
        dimensions = reader.number("<u4")
        if not 1 <= dimensions <= _MOST_DIMENSIONS or name in infos:
            raise invalid(f"{path}: expected tensors of their own names and of 1 to 4 dimensions.", tensor=name)
        shape = tuple(reader.number("<u8") for _ in range(dimensions))[::-1]
        infos[name] = (shape, reader.number("<u4"), reader.number("<u8"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise invalid(f"{path}: expected general.alignment to be a positive integer.", alignment=alignment)
    start = -(-reader.place // alignment) * alignment
    return metadata, {name: _stored(path, reader.size, start, name, *info) for name, info in infos.items()}


class _Reader:
    """Reads a header from its start; what a length claims must lie within the file before it is believed."""

    def __init__(self, path: pathlib.Path):
        self.path, self.size, self.place = path, path.stat().st_size, len(_MAGIC)
        self.data: Any = np.memmap(path, "u1", "r")

    def room(self, size: int, what: str) -> None:
        if size > self.size - self.place:
            raise invalid(
                f"{self.path}: expected a whole GGUF file.",
                "It is cut off or damaged; fetch it again.",
                **{what.replace(" ", "_"): size, "bytes_left": self.size - self.place},
            )

    def take(self, size: int, what: str) -> memoryview:
        self.room(size, what)
        self.place += size
        return memoryview(self.data)[self.place - size : self.place]

    def number(self, form: str) -> Any:
        value = np.frombuffer(self.take(np.dtype(form).itemsize, "bytes of a number"), form)[0]
        return float(str(value)) if form == "<f4" else value.item()  # 1e-05, not 9.999999747378752e-06

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8, "bytes of a number"))
        raw = bytes(self.take(length, "bytes of a string"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise invalid(f"{self.path}: expected UTF-8 text in the header.", str(error), text=raw[:40]) from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth == _DEEPEST:
            raise invalid(f"{self.path}: expected a type of GGUF's in the header.", type=kind)
        inner, length = self.number("<u4"), self.number("<u8")
        if inner in _NUMBERS:
            form = np.dtype(_NUMBERS[inner])
            return np.frombuffer(self.take(length * form.itemsize, "bytes of an array"), form).tolist()
        self.room(length * 8, "bytes of an array")
        return [self.value(inner, depth + 1) for _ in range(length)]


def _stored(path, file_size, start, name, shape, number, offset) -> _Stored:
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        kind = None
    if kind is None or kind.name not in _TYPES:
        raise invalid(
            f"{path}: expected tensors of the types {', '.join(_TYPES)}.",
            "Take a file quantised otherwise, or convert it with llama.cpp's llama-quantize.",
            tensor=name,
            type=number if kind is None else kind.name,
        )
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    size = math.prod(shape) // block * block_bytes
    if shape[-1] % block or min(shape) < 1 or start + offset + size > file_size:
        raise invalid(
            f"{path}: expected the data of every tensor within the file.",
            "It is cut off or damaged; fetch it again.",
            tensor=name,
            shape=shape,
            offset=offset,
            file_bytes=file_size,
        )
    return _Stored(kind.name, shape, start + offset, size)


def _values(path: pathlib.Path, info: _Stored) -> np.ndarray:
    """A tensor's values as stored, or dequantised to float32."""
    import gguf
    import ml_dtypes

    raw = np.memmap(path, "u1", "r", offset=info.offset, shape=(info.size,))
    exact = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
    if info.kind in exact:
        return raw.view(exact[info.kind]).reshape(info.shape)
    values = np.empty(info.shape, "float32").reshape(-1, info.shape[-1])
    rows = raw.reshape(len(values), -1)
    for part in backend.parts(len(rows)):  # the library holds what it returns twice
        values[part] = gguf.quants.dequantize(rows[part], gguf.GGMLQuantizationType[info.kind])
    return values.reshape(info.shape)


def _read(path: pathlib.Path, info: _Stored, row: mapping.Row, config: LlamaConfig) -> np.ndarray:
    return mapping.deinterleave(_values(path, info), row, config)


def _config(path: pathlib.Path, metadata: Mapping[str, Any], stored: Mapping[str, _Stored]) -> LlamaConfig:
    given = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    missing = [theirs for _, theirs, default in _FIELDS if default is ... and theirs not in given]
    known = {*_READ, *(theirs for _, theirs, _ in _FIELDS)}
    unknown = [name for name in given if name not in known and not (name in _ABSENT_OR_ZERO and not given[name])]
    if missing or unknown or "token_embd.weight" not in stored:
        raise invalid(
            f"{path}: expected the fields llama.* of a LLaMA, and its token_embd.weight.",
            "Unknown fields may change what the model computes.",
            missing=missing,
            unknown=unknown,
        )
    values: dict[str, Any] = {ours: given.get(theirs, default) for ours, theirs, default in _FIELDS}
    heads = values["num_query_heads"]
    head_dims = {given[name] for name in _READ if name in given and name.endswith(("key_length", "value_length"))}
    head_dims.add(given.get("rope.dimension_count", next(iter(head_dims), None)))
    head_dims -= {None}
    if len(head_dims) > 1:
        raise invalid(f"{path}: expected one head size, all of it rotated.", sizes=sorted(head_dims))
    try:
        config = LlamaConfig(
            **{**values, "num_key_value_heads": values["num_key_value_heads"] or heads},
            vocabulary_size=stored["token_embd.weight"].shape[0],
            head_dim=head_dims.pop() if head_dims else None,
            tie_word_embeddings="output.weight" not in stored,
            attention_bias="blk.0.attn_q.bias" in stored,
            mlp_bias="blk.0.ffn_up.bias" in stored,
            rope_scaling=_scaling(given),
        )
        if _ROPE_FACTORS not in stored:
            return config
        if config.rope_scaling is not None:
            raise invalid("Expected one rotary scaling, not two.", rope_scaling=config.rope_scaling)
        scaling = llama3_scaling(_values(path, stored[_ROPE_FACTORS]), config)
        return dataclasses.replace(config, rope_scaling=scaling)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _scaling(given: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = given.get(f"{_SCALING}type", "none")
    factor = given.get(f"{_SCALING}factor", given.get("rope.scale_linear"))
    if kind == "none" and "rope.scale_linear" in given:
        kind = "linear"
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    options = {
        "factor": factor,
        "original_max_position_embeddings": given.get(f"{_SCALING}original_context_length"),
        "attention_factor": given.get(f"{_SCALING}attn_factor"),
        "beta_fast": given.get(f"{_SCALING}yarn_beta_fast"),
        "beta_slow": given.get(f"{_SCALING}yarn_beta_slow"),
    }
    return {"rope_type": kind, **{name: value for name, value in options.items() if value is not None}}


def llama3_scaling(factors: np.ndarray, config: LlamaConfig) -> dict[str, Any]:
    """The settings of Llama 3.1's scaling from the divisors of the frequencies, float32 (H/2,).

    The file holds each frequency's divisor alone. With f the largest of them, 1/divisor is
    (1 - s) / f + s, where s rises linearly with the frequency from 0 to 1; the settings are that line,
    up to a common scale, which `low_freq_factor` = 1 fixes as every published model has it.

    Raises:
        ValueError: if no such settings give these divisors.
    """
    frequency, _ = inverse_frequencies(config.head_dim or 0, config.rope_max_wavelength)
    inverse, largest = 1 / factors.astype("float64"), float(factors.max())
    candidates = [(4.0, 8192.0)]  # (high_freq_factor, original_max_position_embeddings), as published
    between = (factors > 1.0001) & (factors < largest * 0.9999)
    # s = (turns - 1) / (high - 1), where turns = context * frequency / 2 pi
    s = (inverse[between] - 1 / largest) / (1 - 1 / largest)
    candidates += [(4.0, (1 + 3 * rise) * 2 * math.pi / f) for rise, f in zip(s[:1], frequency[between], strict=False)]
    if len(s) >= 2:
        slope, start = np.polyfit(frequency[between], s, 1)
        candidates.append((round(1 - 1 / start, 4), -slope / start * 2 * math.pi))
    for high, context in candidates:
        near = round(context) if abs(context - round(context)) < 0.01 * context else context
        candidate = {"high_freq_factor": high, "original_max_position_embeddings": near}
        scaling = {"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0, **candidate}
        with np.errstate(all="ignore"):
            again = frequency / inverse_frequencies(config.head_dim or 0, config.rope_max_wavelength, scaling)[0]
        if candidate["high_freq_factor"] > 1 and np.allclose(again, factors, rtol=1e-5, atol=0):
            return scaling
    raise invalid(
        f"{_ROPE_FACTORS} must be those of Llama 3.1's scaling.",
        "Read the checkpoint from its Hugging Face directory, where the settings stand.",
        factors=factors.tolist(),
    )


def write(
    path: pathlib.Path,
    config: LlamaConfig,
    tensors: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    tokenizer: Mapping[str, Any],
    quantization: str = "f32",
) -> None:
    """Writes a file beside `path` and renames it; one tensor is in memory at a time.

    Args:
        config: a causal one.
        tensors: (Hugging Face's name, shape, function that gives the array as (out, in)) each.
        tokenizer: fields `tokenizer.*`.
        quantization: "f32", "f16" or "q8_0" of the matrices; vectors stay float32. Rows that are no multiple of
            32 stay float16 under "q8_0", as in llama.cpp.

    Raises:
        ValueError: for an unknown quantisation, or a tensor that GGUF has no name for.
    """
    import gguf

    if quantization not in _QUANTIZATIONS:
        raise invalid(f"`quantization` must be one of {list(_QUANTIZATIONS)}.", quantization=quantization)
    types = gguf.GGMLQuantizationType
    with written_beside(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, "llama")
        writer.add_file_type(
            gguf.LlamaFileType[f"{'ALL' if quantization == 'f32' else 'MOSTLY'}_{quantization.upper()}"]
        )
        for name, value in {**_config_fields(config), **tokenizer}.items():
            _add_field(writer, name, value)
        parts: list[tuple[Any, Callable[[], np.ndarray]]] = []
        extra = [] if config.rope_scaling is None else _factor_tensor(config)
        for name, shape, array in [*extra, *tensors]:
            row, theirs = (None, name) if name == _ROPE_FACTORS else mapping.hf_to_gguf(name)
            if theirs is None:
                raise invalid("GGUF has no place for this weight: llama.cpp runs language models.", weight=name)
            kind = types.F32 if len(shape) == 1 else types[quantization.upper()]
            kind = types.F16 if kind == types.Q8_0 and shape[-1] % 32 else kind
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            size = math.prod(shape) // block * block_bytes
            stored = shape if kind in (types.F32, types.F16) else (*shape[:-1], shape[-1] // block * block_bytes)
            dtype: Any = {types.F32: np.dtype("float32"), types.F16: np.dtype("float16")}.get(kind, np.dtype("uint8"))
            writer.add_tensor_info(theirs, stored, dtype, size, raw_dtype=kind if kind == types.Q8_0 else None)
            parts.append((kind, functools.partial(_ordered, array, row, config)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for kind, array in parts:
            writer.write_tensor_data(gguf.quants.quantize(array(), kind))
        writer.close()


def _ordered(array: Callable[[], np.ndarray], row: mapping.Row | None, config: LlamaConfig) -> np.ndarray:
    values = array().astype("float32")
    return np.ascontiguousarray(values if row is None else mapping.interleave(values, row, config))


def _config_fields(config: LlamaConfig) -> dict[str, Any]:
    if not config.causal:
        raise invalid("GGUF's llama is causal.", "Use `save_to_preset` for a bidirectional model.", causal=False)
    fields = {f"llama.{theirs}": getattr(config, ours) for ours, theirs, _ in _FIELDS}
    fields["llama.context_length"] = config.context_length or 2048
    fields |= {f"llama.{name}": config.head_dim for name in ("rope.dimension_count", "attention.key_length")}
    fields |= {"llama.attention.value_length": config.head_dim, "llama.vocab_size": config.vocabulary_size}
    scaling = dict(config.rope_scaling or {})
    kind = scaling.pop("rope_type", None)
    if kind == "linear":
        fields |= {f"llama.{_SCALING}type": "linear", f"llama.{_SCALING}factor": float(scaling["factor"])}
    if kind == "yarn":
        if any(scaling[name] is not None for name in ("mscale", "mscale_all_dim")) or not scaling["truncate"]:
            raise invalid("GGUF has no fields for these settings of yarn.", rope_scaling=config.rope_scaling)
        names = {"factor": "factor", "attention_factor": "attn_factor"}
        names |= {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        fields |= {f"llama.{_SCALING}type": "yarn"}
        fields |= {f"llama.{_SCALING}{to}": float(scaling[at]) for at, to in names.items() if scaling[at] is not None}
        fields[f"llama.{_SCALING}original_context_length"] = int(scaling["original_max_position_embeddings"])
    return fields


def _factor_tensor(config: LlamaConfig) -> list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Llama 3.1's scaling as the divisors of the frequencies; the others are fields."""
    if config.rope_scaling is None or config.rope_scaling["rope_type"] != "llama3":
        return []
    head_dim, theta = config.head_dim or 0, config.rope_max_wavelength
    plain, scaled = (inverse_frequencies(head_dim, theta, scaling)[0] for scaling in (None, config.rope_scaling))
    return [(_ROPE_FACTORS, plain.shape, lambda: plain / scaled)]


def _add_field(writer: Any, name: str, value: Any) -> None:
    import gguf

    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        writer.add_array(name, value)
        return
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
    writer.add_key_value(name, value, kind)
