"""Hugging Face directories: config.json, safetensors in one file or in shards, tokenizer and generation files.

https://huggingface.co/docs/safetensors; the fields of `config.json` are those of Transformers' `LlamaConfig`.
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from keras_llama.checkpoints.checkpoint import Checkpoint, Tensor
from keras_llama.config import LlamaConfig, LlamaSeq2SeqConfig, invalid

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# The last one is ours, for what config.json has no field for.
DOCUMENTS = _CONFIG, _GENERATION, _OWN = "config.json", "generation_config.json", "keras_llama.json"

# Hugging Face's field -> ours; `...` must be there, another value stands in for a missing field.
_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocabulary_size", ...),
    "hidden_size": ("hidden_dim", ...),
    "intermediate_size": ("intermediate_dim", ...),
    "num_hidden_layers": ("num_layers", ...),
    "num_attention_heads": ("num_query_heads", ...),
    "num_key_value_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "rms_norm_eps": ("layer_norm_epsilon", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "max_position_embeddings": ("context_length", 2048),
}
# Fields that would change the maths if they had another value than these.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "keras_llama"),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "auto_map": (None,),
}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
# Fields that change no logits.
_HARMLESS = set(
    """
    _attn_implementation_autoset _flash_attn_2_enabled _name_or_path architectures attention_dropout
    attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_llama_config label2id length_penalty max_length
    max_sequence_length min_length no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905 (a list of names, read as text)
)
_ARCHITECTURES = {
    "LlamaModel": None,
    "LlamaForCausalLM": "lm_head",
    "LLaMAForCausalLM": "lm_head",
    "LlamaForSequenceClassification": "score",
    "LlamaForQuestionAnswering": "qa_outputs",
    "LlamaSeq2SeqLM": "lm_head",  # ours, under `model_type` keras_llama
    "LlamaImageCaptioner": "lm_head",
}
_HEADS = ("score.", "qa_outputs.", "multi_modal_projector.")  # the tensors that a task has beside its base model
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32"}
PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


def read(directory: str | os.PathLike) -> Checkpoint:
    """Opens a directory; no weight is read yet.

    Raises:
        ValueError: for a file that is missing or broken, a field that is unknown or out of range, pickled
            or quantised weights, or a shard outside the directory.
    """
    path = pathlib.Path(directory)
    fields = _json(path / _CONFIG)
    tensors, dtype = _tensors(path)
    own = _json(path / _OWN) if (path / _OWN).exists() else {}
    generation = _json(path / _GENERATION) if (path / _GENERATION).exists() else {}
    ids = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if fields.get(key) is not None}
    stops = [*_ids(ids.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
    architecture = (fields.get("architectures") or ["LlamaForCausalLM"])[0]
    if architecture not in _ARCHITECTURES:
        raise invalid(
            f"{path / 'config.json'}: expected one of the architectures {sorted(_ARCHITECTURES)}.",
            architectures=fields["architectures"],
        )
    return Checkpoint(
        source=str(path),
        config=config_from_fields(fields, str(path / _CONFIG), own.get("config", {})),
        tensors=tensors,
        dtype=dtype,
        tokenizer_files={name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()},
        generation={**ids, **generation, "eos_token_id": sorted(set(stops))},
        head=_ARCHITECTURES[architecture],
        options={**_labels(fields), **own.get("options", {})},
        folder=path,
    )


def config_from_fields(fields: Mapping[str, Any], place: str, own: Mapping[str, Any] | None = None) -> LlamaConfig:
    """The fields of a `config.json` -> `LlamaConfig`; a field that could change the maths is never dropped.

    Raises:
        ValueError: naming every field that is missing or unknown, or has a value that is not supported.
    """
    missing = [name for name, (_, default) in _FIELDS.items() if default is ... and name not in fields]
    known = {*_FIELDS, *_FIXED, *_ROPE, *_HARMLESS}
    unknown = sorted(name for name in fields if name not in known)
    if missing or unknown:
        raise invalid(
            f"{place}: expected the fields of a LLaMA configuration.",
            "Unknown fields may change what the model computes; delete those that you know do not.",
            missing=missing,
            unknown=unknown,
        )
    for name, allowed in _FIXED.items():
        if name in fields and fields[name] not in allowed:
            raise invalid(f"{place}: `{name}` must be one of {list(allowed)}.", **{name: fields[name]})
    values = {ours: fields.get(theirs, default) for theirs, (ours, default) in _FIELDS.items()}
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_query_heads"]
    try:
        theta, scaling = _rope(fields)
        cls = LlamaSeq2SeqConfig if own and "num_encoder_layers" in own else LlamaConfig
        return cls(**{**values, "rope_max_wavelength": theta, "rope_scaling": scaling, **(own or {})})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from error


def _rope(fields: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling from either spelling; the newer one wins nothing, both must agree."""
    newer = dict(fields.get("rope_parameters") or {})
    older = {**dict(fields.get("rope_scaling") or {}), "rope_theta": fields.get("rope_theta")}
    spellings = []
    for spelled in (newer, older):
        options = {key: value for key, value in spelled.items() if value is not None}
        theta = options.pop("rope_theta", None)
        if options.get("partial_rotary_factor") == 1:
            del options["partial_rotary_factor"]
        kind = options.get("rope_type", options.get("type"))
        if kind == "yarn":
            options.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings", 2048))
        spellings.append((theta, options if kind not in (None, "default") else None))
    (theta, scaling), (old_theta, old_scaling) = spellings
    if newer and (old_theta not in (None, theta) or (fields.get("rope_scaling") and old_scaling != scaling)):
        raise invalid(
            "`rope_parameters` and the older `rope_theta`, `rope_scaling` must agree.",
            **{key: fields.get(key) for key in _ROPE},
        )
    return float((theta if newer else old_theta) or 10_000.0), scaling if newer else old_scaling


def _labels(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a classifier from `id2label` and `problem_type`."""
    names = fields.get("id2label")
    if not names and fields.get("num_labels"):
        names = {str(i): f"LABEL_{i}" for i in range(fields["num_labels"])}
    options: dict[str, Any] = {}
    if names:
        options["labels"] = [names[key] for key in sorted(names, key=int)]
    if fields.get("problem_type"):
        options["problem_type"] = {theirs: ours for ours, theirs in PROBLEM_TYPES.items()}[fields["problem_type"]]
    return options


def _ids(value: Any) -> list[int]:
    return [] if value is None else [int(i) for i in (value if isinstance(value, list) else [value])]


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise invalid(f"Expected a file {path}.", "Is this the directory of a whole checkpoint?", exists=path.exists())
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise invalid(f"{path}: expected JSON.", str(error), size=path.stat().st_size) from error
    if not isinstance(value, dict):
        raise invalid(f"{path}: expected a JSON object.", type=type(value).__name__)
    return value


def _tensors(directory: pathlib.Path) -> tuple[dict[str, Tensor], str]:
    """Every tensor by its name without the base model's prefix, and the dtype that holds all of the base's.

    A head of its own says nothing: beside half-precision weights it is kept in float32.
    """
    if (directory / _INDEX).is_file():
        names = _json(directory / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
            raise invalid(f"{directory / _INDEX}: expected a `weight_map` of tensor names to files.", weight_map=names)
        shards = sorted(set(names.values()))
    elif (directory / _SINGLE).is_file():
        names, shards = None, [_SINGLE]
    else:
        _refuse_pickles(directory)
        raise invalid(f"Expected {_SINGLE} or {_INDEX} in {directory}.", files=sorted(os.listdir(directory))[:20])
    tensors: dict[str, Tensor] = {}
    dtypes = set()
    for shard in shards:
        found = shard_tensors(_inside(directory, shard))
        wanted = set(found) if names is None else {name for name, file in names.items() if file == shard}
        if absent := sorted(wanted.difference(found)):
            raise invalid(f"{directory / shard}: expected the tensors that {_INDEX} names.", missing=absent[:20])
        for name in wanted:
            own = re.sub(r"^(model|transformer)\.", "", name)
            tensors[own], dtype = found[name]
            if not own.startswith(_HEADS):
                dtypes.add(dtype)
    order = [dtype for dtype in ("float32", "bfloat16", "float16") if dtype in dtypes]
    return tensors, order[0] if len(order) == 1 else "float32"


def _refuse_pickles(directory: pathlib.Path) -> None:
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise pickled(directory, pickles)


def pickled(path: pathlib.Path, files: Iterable[str]) -> ValueError:
    """The refusal of pickled weights, with the command that converts them."""
    return invalid(
        f"{path}: expected safetensors; a pickle can run any code when it is read, so none is.",
        'Convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('OLD').save_pretrained('NEW')\"",
        files=list(files),
    )


def _inside(directory: pathlib.Path, shard: str) -> pathlib.Path:
    """The path of a shard that the index names; it must stand in the directory itself.

    A hub cache keeps its files as links from `snapshots` into `blobs` beside it: those are followed.
    """
    path = directory / shard
    root = directory.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    if pathlib.PurePath(shard).name != shard or shard in (".", "..") or not path.resolve().is_relative_to(root):
        raise invalid(f"{directory / _INDEX}: expected shards that are files in {directory}.", shard=shard)
    return path


def shard_tensors(path: pathlib.Path) -> dict[str, tuple[Tensor, str]]:
    """The tensors of a safetensors file, with their dtypes; the library checks the header against the file."""
    import safetensors

    try:
        with safetensors.safe_open(path, "np"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (safetensors.SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else None
        raise invalid(f"{path}: expected a whole safetensors file.", f"{error}. Fetch it again.", size=size) from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise invalid(f"{path}: expected tensors of {sorted(_DTYPES)}.", tensor=name, dtype=entry["dtype"])
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        found[name] = Tensor(shape, _reader(path, dtype, 8 + length + entry["data_offsets"][0], shape)), dtype
    return found


def _reader(path: pathlib.Path, dtype: str, offset: int, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """Maps a tensor; the library's own reader copies it into anonymous memory."""

    def read() -> np.ndarray:
        import ml_dtypes  # noqa: F401 (gives NumPy its bfloat16)

        return np.memmap(path, dtype, "r", offset, shape)

    return read


def fields_from_config(config: LlamaConfig) -> dict[str, Any]:
    """`LlamaConfig` -> the fields of `config.json`, the rotary settings in both spellings."""
    scaling = {k: v for k, v in (config.rope_scaling or {}).items() if v is not None}
    rope = {"rope_theta": config.rope_max_wavelength, **(scaling or {"rope_type": "default"})}
    fields = {theirs: getattr(config, ours) for theirs, (ours, _) in _FIELDS.items()}
    return {
        **fields,
        "max_position_embeddings": config.context_length or 2048,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "model_type": "llama",
        "rope_theta": config.rope_max_wavelength,
        "rope_scaling": scaling or None,
        "rope_parameters": rope,
    }


def write(
    directory: pathlib.Path,
    fields: Mapping[str, Any],
    tensors: Iterable[tuple[str, int, Callable[[], np.ndarray]]],
    files: Mapping[str, bytes],
    generation: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    shard_bytes: int,
) -> None:
    """Writes a checkpoint into an existing directory, one shard of tensors in memory at a time.

    Args:
        fields: of `config.json`.
        tensors: (full name, bytes, function that gives the array) each.
        files: tokenizer files, written as they are.
        generation: of `generation_config.json`.
        own: of `keras_llama.json`, or `None` for none.
        shard_bytes: most bytes in a file, unless a single tensor is larger.
    """
    from safetensors.numpy import save_file

    shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    total = filled = 0
    for name, size, array in tensors:
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, array))
        filled, total = filled + size, total + size
    weight_map = {}
    for i, shard in enumerate(shards):
        file = _SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: array() for name, array in shard}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys((name for name, _ in shard), file))
    documents: dict[str, Any] = {_GENERATION: generation, _CONFIG: fields}
    if len(shards) > 1:
        documents[_INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if own is not None:
        documents[_OWN] = own
    for name, data in files.items():
        (directory / name).write_bytes(data)
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in set(weight_map.values()):
        # safetensors leaves its files readable by their owner alone; what serves them is often another user.
        shutil.copymode(directory / _CONFIG, directory / file)
