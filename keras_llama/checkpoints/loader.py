"""A checkpoint's tensors -> a model's variables, one at a time, strictly."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_llama import backend
from keras_llama.backbone import LlamaBackbone
from keras_llama.checkpoints import mapping
from keras_llama.checkpoints.checkpoint import Checkpoint, Tensor
from keras_llama.config import LlamaSeq2SeqConfig, invalid
from keras_llama.layers import embedding_initializer, kernel_initializer, no_random_weights
from keras_llama.seq2seq_backbone import LlamaSeq2SeqBackbone


def build_backbone(
    checkpoint: Checkpoint, dtype: Any = None, load_weights: bool = False, cls: Any = LlamaBackbone
) -> Any:
    """The backbone of a checkpoint in `dtype`; `None` as `LlamaBackbone.from_preset` says.

    Its weights are zeros, or those of the checkpoint with `load_weights`.

    Raises:
        ValueError: if the checkpoint is not of the architecture `cls`.
    """
    found = LlamaSeq2SeqBackbone if isinstance(checkpoint.config, LlamaSeq2SeqConfig) else LlamaBackbone
    if found is not cls:
        raise invalid(
            f"{checkpoint.source}: expected a checkpoint of a {cls.__name__}.",
            "Start an encoder-decoder from a decoder with `from_decoder`." if found is LlamaBackbone else "",
            found=found.__name__,
        )
    if dtype is None:
        policy = keras.config.dtype_policy()
        dtype = checkpoint.dtype if policy.name == "float32" else policy
    with no_random_weights():
        backbone = cls(**dataclasses.asdict(checkpoint.config), dtype=dtype)
    if load_weights:
        load(backbone, checkpoint)
    return backbone


def first_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The checkpoint of a model that ends after `count` of its blocks, and then has the last norm.

    Raises:
        ValueError: for a count that the model does not have, or an encoder-decoder.
    """
    known = checkpoint.config.num_layers
    if isinstance(checkpoint.config, LlamaSeq2SeqConfig):
        raise invalid("`num_layers` must be None for an encoder-decoder.", num_layers=count)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= known:
        raise invalid(f"`num_layers` must be an integer from 1 to {known}, the blocks there are.", num_layers=count)
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if mapping.block_of(name) < count}
    config = dataclasses.replace(checkpoint.config, num_layers=count)
    return dataclasses.replace(checkpoint, config=config, tensors=kept)


def load(model: Any, checkpoint: Checkpoint, fresh: Iterable[str] = (), weights: Iterable | None = None) -> None:
    """Assigns each tensor to its variable; only one tensor is in memory beside the weights.

    Args:
        model: a backbone or a task.
        checkpoint: an opened checkpoint.
        fresh: Hugging Face names that may be missing, because the task is not the checkpoint's own;
            they start at random.
        weights: those that checkpoints name; all of the model's unless given.

    Raises:
        ValueError: with one table of all tensors that are missing, not expected or of another shape;
            or for a tensor that holds NaN or infinity.
    """
    wanted = {}
    for variable in model.weights if weights is None else weights:
        row, name = mapping.from_ours(variable.path)
        wanted[name] = row, variable
    _check_names(model, checkpoint, wanted, set(fresh))
    for name, (row, variable) in wanted.items():
        if name in checkpoint.tensors:
            array = _read(checkpoint, name)
            backend.assign(variable, array.T if row.transposed else array)
        elif not row.ours.endswith("/bias"):  # of a new head; a bias is zero already
            drawn = embedding_initializer() if row.ours.endswith("/embeddings") else kernel_initializer()
            variable.assign(drawn(variable.shape, variable.dtype))
    _check_tied_head(model, checkpoint)


def export(weights: Iterable) -> Iterable[tuple[str, Any, mapping.Row]]:
    """Each weight by its Hugging Face name: (name, variable, row), in their order."""
    for variable in weights:
        row, name = mapping.from_ours(variable.path)
        yield name, variable, row


def nbytes(variable: Any) -> int:
    """Bytes of a variable in a checkpoint."""
    return int(np.prod(variable.shape)) * (2 if variable.dtype in ("float16", "bfloat16") else 4)


def shape(variable: Any, row: mapping.Row) -> tuple[int, ...]:
    """The shape of a variable in a checkpoint, kernels as (out, in)."""
    return tuple(variable.shape[::-1] if row.transposed else variable.shape)


def to_array(variable: Any, row: mapping.Row) -> np.ndarray:
    """A variable as the array that checkpoints hold, kernels as (out, in)."""
    from keras import ops

    array = ops.convert_to_numpy(variable.value)
    return np.ascontiguousarray(array.T if row.transposed else array)


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    array = checkpoint.tensors[name].read()
    rows = array.reshape(-1, array.shape[-1])
    for part in backend.parts(len(rows)):
        if not np.isfinite(rows[part].astype("float32")).all():
            raise invalid(
                f"{checkpoint.source}: expected finite numbers in every tensor.",
                "The file is damaged, or the training that wrote it diverged.",
                tensor=name,
            )
    return array


def _check_names(model: Any, checkpoint: Checkpoint, wanted: dict, fresh: set[str]) -> None:
    problems: list[tuple[str, Any, str]] = []
    for name, (row, variable) in wanted.items():
        tensor, expected = checkpoint.tensors.get(name), shape(variable, row)
        if tensor is None and name not in fresh:
            problems.append((name, expected, "missing"))
        elif tensor is not None and tuple(tensor.shape) != expected:
            problems.append((name, expected, f"found {tuple(tensor.shape)}"))
    for name, tensor in checkpoint.tensors.items():
        if name not in wanted and not name.startswith(mapping.HEADS) and not mapping.IGNORED.fullmatch(name):
            problems.append((name, "none", f"found {tuple(tensor.shape)}"))
    if problems:
        width = max(len(name) for name, *_ in problems)
        table = "\n".join(f"  {name:<{width}}  expected {wanted}, {found}" for name, wanted, found in problems[:50])
        more = f"\n  and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise ValueError(
            f"{checkpoint.source}: expected exactly the tensors of {type(model).__name__} with this configuration. "
            f"Received: {len(problems)} that differ.\n{table}{more}\n"
            "Is `config.json` the one of these weights, and is the checkpoint of this task?"
        )


def _check_tied_head(model: Any, checkpoint: Checkpoint) -> None:
    """Warns of a tied checkpoint that carries a head of its own; some exporters write the embedding twice."""
    head: Tensor | None = checkpoint.tensors.get("lm_head.weight")
    if head is None or not checkpoint.config.tie_word_embeddings:
        return
    with contextlib.suppress(KeyError):
        if not np.array_equal(head.read(), checkpoint.tensors["embed_tokens.weight"].read()):
            warnings.warn(
                f"{checkpoint.source}: `tie_word_embeddings` is true, yet lm_head.weight differs from the embedding. "
                "The embedding is used as the head, as Transformers does.",
                stacklevel=4,
            )
