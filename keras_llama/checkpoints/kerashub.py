"""KerasHub's LLaMA backbones and presets as a source of weights. Imports keras_hub, and with it TensorFlow."""

import json
import os
import pathlib
from typing import Any

import numpy as np

from keras_llama.checkpoints import gguf_tokenizer
from keras_llama.checkpoints.checkpoint import Checkpoint, Tensor
from keras_llama.checkpoints.mapping import kerashub_to_hf
from keras_llama.config import LlamaConfig, invalid

_CLASSES = ("LlamaBackbone", "Llama3Backbone")


def is_preset(directory: pathlib.Path) -> bool:
    """Whether a directory is one that KerasHub's `save_to_preset` wrote."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whoever reads it as another format says what is wrong
    return isinstance(config, dict) and str(config.get("registered_name", "")).startswith(("keras_hub>", "keras_nlp>"))


def read(source: Any) -> Checkpoint:
    """A KerasHub backbone, a task that has one, or the name of a preset -> checkpoint.

    Raises:
        ValueError: for anything but KerasHub's LLaMA 2 and 3, or a rotary scaling that has no counterpart.
    """
    import keras_hub

    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        try:
            backbone = keras_hub.models.Backbone.from_preset(name)
            tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(name)
        except (ValueError, OSError) as error:
            raise invalid("Expected a KerasHub preset of LLaMA.", str(error), preset=name) from error
    else:
        backbone = getattr(source, "backbone", source)
        tokenizer = getattr(getattr(source, "preprocessor", None), "tokenizer", None)
    if type(backbone).__name__ not in _CLASSES or not isinstance(backbone, keras_hub.models.Backbone):
        raise invalid(f"Expected a path, a name, or a KerasHub backbone of {list(_CLASSES)}.", type=type(source))
    tensors = {}
    for variable in backbone.weights:
        found = kerashub_to_hf(variable.path)
        if found is None:
            raise invalid("Expected the weights of KerasHub's LLaMA.", weight=variable.path)
        row, name = found
        tensors[name] = _tensor(variable, row.transposed)
    stops = [getattr(tokenizer, key, None) for key in ("end_token_id", "end_token2_id")]
    return Checkpoint(
        source=f"KerasHub's {backbone.name}",
        config=_config(backbone.get_config(), tied="lm_head.weight" not in tensors),
        tensors=tensors,
        dtype=backbone.dtype_policy.variable_dtype,
        tokenizer_files={} if tokenizer is None else _files(tokenizer),
        generation={"eos_token_id": sorted(i for i in stops if i is not None)},
    )


def _tensor(variable: Any, transposed: bool) -> Tensor:
    shape = tuple(variable.shape)
    if len(shape) == 3:  # the heads stand apart: (D, N, H) into them, (N, H, D) out of them
        out = "attention_output" in variable.path
        shape = (shape[0] * shape[1], shape[2]) if out else (shape[0], shape[1] * shape[2])

    def read() -> np.ndarray:
        from keras import ops

        array = ops.convert_to_numpy(variable.value).reshape(shape)
        return array.T if transposed else array

    return Tensor(shape[::-1] if transposed else shape, read)


def _config(given: dict[str, Any], tied: bool) -> LlamaConfig:
    scaling = None
    if given.get("rope_frequency_adjustment_factor") is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": given["rope_frequency_adjustment_factor"],
            "low_freq_factor": given["rope_low_freq_factor"],
            "high_freq_factor": given["rope_high_freq_factor"],
            "original_max_position_embeddings": given["rope_pretraining_sequence_length"],
        }
    if given.get("rope_position_scaling_factor", 1.0) != 1.0:
        raise invalid(
            "Expected rope_position_scaling_factor=1.0.",
            "KerasHub's LLaMA takes the argument and computes without it, so what is meant is not known.",
            rope_position_scaling_factor=given["rope_position_scaling_factor"],
        )
    same = ("vocabulary_size", "num_layers", "num_query_heads", "num_key_value_heads", "hidden_dim", "intermediate_dim")
    return LlamaConfig(
        **{name: given[name] for name in same},
        rope_max_wavelength=given["rope_max_wavelength"],
        rope_scaling=scaling,
        layer_norm_epsilon=given["layer_norm_epsilon"],
        tie_word_embeddings=tied,
    )


def _files(tokenizer: Any) -> dict[str, bytes]:
    """KerasHub's tokenizer as Hugging Face's files: SentencePiece as it is, byte pairs by way of GGUF's fields."""
    if hasattr(tokenizer, "proto"):
        proto = tokenizer.proto
        return {"tokenizer.model": proto if isinstance(proto, bytes) else pathlib.Path(proto).read_bytes()}
    vocabulary = dict(tokenizer.vocabulary)
    tokens = sorted(vocabulary, key=vocabulary.get)  # type: ignore[arg-type]
    special = set(tokenizer.special_tokens)
    return gguf_tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
            "tokenizer.ggml.merges": list(tokenizer.merges),
            "tokenizer.ggml.bos_token_id": tokenizer.start_token_id,
            "tokenizer.ggml.eos_token_id": tokenizer.end_token_id,
        }
    )
