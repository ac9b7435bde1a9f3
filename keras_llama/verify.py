"""The same numbers as Transformers? A checkpoint compared with the reference on the user's own machine.

Shapes: B batch, T tokens, V vocabulary.
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_llama.checkpoints import presets
from keras_llama.config import invalid
from keras_llama.heads.causal_lm import LlamaCausalLM

PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "北京是中国的首都，")


class Difference(NamedTuple):
    """The largest absolute difference found at one place of the model, and the largest value there."""

    place: str
    difference: float
    largest: float


def verify(preset: str | os.PathLike, prompts: tuple[str, ...] = PROMPTS) -> list[Difference]:
    """Compares a checkpoint, read here and by Transformers, in float32: each block, then the logits.

    Every block gets the input that Transformers gives its own, so that a difference shows where it
    arises; the logits are those of the whole model on each side. Needs `transformers` and `torch`.

    Args:
        preset: a Hugging Face directory, a `.gguf` file, `hf://org/name` or "smollm2_135m_instruct".
        prompts: texts to compare on.

    Raises:
        ValueError: if Transformers cannot read this format, or is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        hint = "Install them: pip install torch transformers."
        raise invalid("`verify` needs the packages transformers and torch.", hint, error=str(error)) from error
    checkpoint = presets.open_checkpoint(preset)
    path = pathlib.Path(checkpoint.source)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if path.is_dir():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    elif path.suffix == ".gguf":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    else:
        raise invalid("`verify` needs a format that Transformers reads: a directory or GGUF.", preset=preset)
    ours = LlamaCausalLM.from_preset(preset, dtype="float32")
    if ours.preprocessor is None:
        raise invalid("`verify` needs a checkpoint with a tokenizer.", preset=preset)
    rows = ours.preprocessor.tokenizer.encode(prompts, add_bos=ours.preprocessor.add_bos)
    found: dict[str, Difference] = {}
    with torch.no_grad():
        for row in rows:
            for new in _compare(ours, theirs.eval(), np.array([row], "int32"), torch):
                old = found.get(new.place, new)
                found[new.place] = Difference(
                    new.place, max(old.difference, new.difference), max(old.largest, new.largest)
                )
    return list(found.values())


def _compare(ours, theirs, ids, torch):
    """The differences of one text, ids (1, T)."""
    states: list[tuple[Any, Any]] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, output: states.append((args[0], output)))
        for layer in theirs.model.layers
    ]
    expected = theirs(torch.tensor(ids, dtype=torch.long)).logits
    for hook in hooks:
        hook.remove()
    mask = np.ones_like(ids)
    angles = ours.backbone.get_layer("positions")(ids, mask)
    embedded = ours.backbone.token_embedding(ids)
    yield _difference("embedding", embedded, states[0][0])
    for i, (block, (before, after)) in enumerate(zip(ours.backbone.blocks, states, strict=True)):
        yield _difference(f"block {i}", block(ops.convert_to_tensor(before.numpy()), *angles)[0], after)
    yield _difference("logits", ours({"token_ids": ids, "padding_mask": mask}), expected)


def _difference(place, ours, theirs):
    theirs = theirs.numpy()
    return Difference(place, float(np.abs(ops.convert_to_numpy(ours) - theirs).max()), float(np.abs(theirs).max()))
