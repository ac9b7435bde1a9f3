"""What every format hands over: a configuration, tensors read one at a time, tokenizer files, settings."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from keras_llama.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is not in memory yet: its shape, and a function that reads it, kernels as (out, in)."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any format, opened: its header is read and checked, its tensors are not.

    Attributes:
        source: where it came from, for error messages.
        config: the architecture.
        tensors: by Hugging Face's names without the base model's prefix.
        dtype: the Keras dtype in which its values lose nothing; "bfloat16" for quantised files.
        tokenizer_files: Hugging Face's tokenizer files by name; empty if there is no tokenizer.
        generation: defaults of generation as `generation_config.json` spells them; `eos_token_id`
            and `bos_token_id` of the configuration where that file is silent.
        head: the task that the file holds weights of: "lm_head", "score", "qa_outputs" or `None`.
        options: settings of the task: `labels`, `problem_type`; and those of `keras_llama.json`.
        folder: where a task finds files of its own, `None` for a checkpoint that is one file.
    """

    source: str
    config: LlamaConfig
    tensors: Mapping[str, Tensor]
    dtype: str
    tokenizer_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: str | None = "lm_head"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: pathlib.Path | None = None
