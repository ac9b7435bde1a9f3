"""What training a task takes, reckoned before it begins. Shapes: B batch, T tokens, D, N, K, H, F, V as `LlamaConfig`.

Sizes of weights, gradients and state are exact; what the backward pass keeps is counted by `activations`.
"""

import dataclasses
import itertools
from typing import Any

import keras

from keras_llama import backend
from keras_llama.activations import REAL, Pass, bytes_of, outputs, width_of
from keras_llama.config import invalid
from keras_llama.heads.causal_lm import LlamaCausalLM
from keras_llama.heads.ensemble import LlamaClassifierEnsemble
from keras_llama.heads.image_captioner import LlamaImageCaptioner
from keras_llama.heads.language_model import LanguageModel
from keras_llama.heads.question_answering import LlamaQuestionAnswering
from keras_llama.heads.seq2seq_lm import LlamaSeq2SeqLM
from keras_llama.heads.text_classifier import LlamaTextClassifier
from keras_llama.losses import rows_of_chunk

_MIB, _GIB = 2**20, 2**30
_HEADS = (LlamaCausalLM, LlamaTextClassifier, LlamaQuestionAnswering, LlamaSeq2SeqLM, LlamaImageCaptioner)


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training takes.

    Attributes:
        weights: all of the task's, trained or not.
        gradients: of the trained ones.
        optimizer: its state.
        activations: what the forward pass keeps for the backward pass.
        peak: the most that is held at any time of a step, temporary arrays and the compiled program included.

    >>> print(MemoryEstimate(2**20, 2**20, 2**21, 2**22, 2**30))
    peak 1.00 GiB (weights 1 MiB, gradients 1 MiB, optimizer 2 MiB, activations 4 MiB)
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_readable(getattr(self, name))}" for name in _PARTS)
        return f"peak {_readable(self.peak)} ({parts})"


# Compiling takes memory, of which most stays with the process: what a model takes whose arrays are next to nothing. XLA
# takes the same for any number of blocks, TensorFlow's graph and its compiled update more for each; both take more for
# an encoder, of texts or of images. (base, each block, an encoder)
_PROGRAM = {
    "torch": (16 * _MIB, 0, 0),
    "jax": (300 * _MIB, 0, 80 * _MIB),
    "tensorflow": (35 * _MIB, 50 * _MIB, 50 * _MIB),
}
# Copies of a chunk's logits that the loss holds at a time, and of the head's kernel: its gradient, the sums of that,
# transpositions.
_LOSS = {"torch": (1, 2), "jax": (3, 4), "tensorflow": (3, 2)}
# Arrays (B, N, T, T) where attention is no fused kernel: XLA makes zeros and masks of that size for all blocks at once
# and keeps them; in the backward pass there are weights, their gradients and what is between. (always, at most)
_SCORES = {"torch": (0, 0), "jax": (3, 8), "tensorflow": (0, 3)}
_MIDDLES = {"torch": 4, "jax": 6, "tensorflow": 4}  # arrays (B, T, F) beside those that are kept, in SwiGLU's gradient
# Room between arrays: XLA packs its temporary ones into one block, TensorFlow's allocator cuts no block up for one that
# nearly fills it. Their own accounts, of all steps looked at: 0.01 to 0.06, and 0.12 to 0.14.
_ROOM = {"torch": 1.0, "jax": 1.05, "tensorflow": 1.125}

_PARTS = ("weights", "gradients", "optimizer", "activations")


def estimate_memory(task: Any, batch_size: int, sequence_length: int, optimizer: Any = None) -> MemoryEstimate:
    """What `fit` of this task takes above what the process holds before, without running anything.

    Args:
        task: one of the five heads, as it will be trained: frozen, adapted, with `remat`. Of an image encoder that is
            trained, what its layers give is counted, not what they keep inside.
        batch_size: B, rows of a step.
        sequence_length: T, tokens of a row, padding included: of a `LlamaSeq2SeqLM` those of a source and those of a
            target, each; of a `LlamaImageCaptioner` those of a caption, to which the image's patches are added.
        optimizer: a name or an object; `None` is the one that the task is compiled with, else AdamW.

    Returns:
        A `MemoryEstimate`, in bytes.

    Raises:
        ValueError: for another model, an ensemble, sizes below 1, or an optimizer that Keras does not know.

    >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
    >>> estimate = keras_llama.estimate_memory(keras_llama.LlamaCausalLM(backbone), batch_size=8, sequence_length=64)
    >>> estimate.weights, estimate.gradients, estimate.optimizer // estimate.weights  # AdamW's two numbers a weight
    (1481216, 1481216, 2)
    """
    _check(task, batch_size, sequence_length)
    optimizer = _optimizer(task, optimizer)
    weights, state = bytes_of(task.weights), _state(optimizer, task.trainable_variables)
    step = _Step(task, batch_size, sequence_length, optimizer)
    return MemoryEstimate(weights, step.gradients, state, step.kept, step.peak(weights + state))


def _check(task: Any, batch_size: Any, sequence_length: Any) -> None:
    if not isinstance(task, _HEADS) or isinstance(task, LlamaClassifierEnsemble):
        names = ", ".join(head.__name__ for head in _HEADS)
        hint = "Other models have no formula; of an ensemble, take a member."
        raise invalid(f"`task` must be one of {names}.", hint, task=type(task).__name__)
    for name, value in {"batch_size": batch_size, "sequence_length": sequence_length}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(f"`{name}` must be an integer of at least 1.", **{name: value})


def _readable(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"


def _optimizer(task: Any, optimizer: Any) -> Any:
    if optimizer is None:
        return task.optimizer if task.compiled else keras.optimizers.AdamW(global_clipnorm=1.0)
    try:
        return keras.optimizers.get(optimizer)
    except (ValueError, TypeError) as error:
        hint = 'Such as "adamw", "muon", "sgd" or keras.optimizers.AdamW(1e-3).'
        raise invalid(
            "`optimizer` must be a name that Keras knows, or an optimizer.", hint, optimizer=optimizer
        ) from error


def _state(optimizer: Any, trained: list) -> int:
    """Bytes of an optimizer's variables once it is built: a copy of it is built on notes in place of variables."""
    if optimizer.built:
        return bytes_of(optimizer.variables)
    noted = []

    def note(reference_variable, *_, **__):
        noted.append(reference_variable)

    copy = type(optimizer).from_config(optimizer.get_config())
    getattr(copy, "inner_optimizer", copy).add_variable_from_reference = note  # inner: of one that scales the loss
    before = {id(variable) for variable in copy.variables}
    copy.build(trained)
    return bytes_of([*optimizer.variables, *noted, *(v for v in copy.variables if id(v) not in before)])


def _passes(task: Any, rows: int, length: int) -> list[Pass]:
    """A step's ways through the stacks of a task's blocks."""
    backbone = task.backbone
    options = {"dtype": task.compute_dtype, "rows": rows, "remat": backbone.remat is not None}
    before = task.prompt_tokens - 1
    # A projector or the vectors of `question_overlap` are in front, and are trained beside a frozen base, too.
    in_front = before or getattr(task, "question_overlap", False) is not False
    through = bool(backbone.trainable_variables or (in_front and task.trainable_variables))
    decoder = {"length": before + length, "through": through, **options}
    if not isinstance(task, LlamaSeq2SeqLM):
        passes = 2 if getattr(task, "r_drop", 0) else 1
        return passes * [Pass(backbone.blocks, backbone.config, **decoder)]
    encoder, trained = backbone.encoder_blocks, any(block.trainable_variables for block in backbone.encoder_blocks)
    return [
        Pass(encoder, backbone.config.encoder, length=length, through=trained, **options),
        Pass(backbone.blocks, backbone.config, source=length, **decoder),
    ]


class _Step:
    """What a step holds beside weights and the optimizer's state, in bytes."""

    def __init__(self, task: Any, batch_size: int, sequence_length: int, optimizer: Any):
        self.name = backend.name()
        self.task, self.config = task, task.backbone.config
        self.number = width_of(task.compute_dtype)
        self.optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
        self.trained = task.trainable_variables
        self.gradients = bytes_of(self.trained)
        self.tokens = batch_size * sequence_length  # that the loss reads
        self.passes = _passes(task, batch_size, sequence_length)
        self.back = [each for each in self.passes if each.through]
        images = task.image_encoder if isinstance(task, LlamaImageCaptioner) else None
        self.features = [batch_size * output for output in outputs(images)] if images else []
        self.kept = sum(each.kept for each in self.back)
        if images and images.trainable_variables:
            self.kept, self.features = self.kept + sum(self.features), []
        self.again = max((each.block for each in self.back if each.remat), default=0)

    def peak(self, held: int) -> int:
        """The most at any time of a step, beside the bytes of weights and state."""
        base, block, encoder = _PROGRAM[self.name]
        encodes = not isinstance(self.task, LlamaCausalLM) and isinstance(self.task, LanguageModel)
        program = base + block * sum(len(each.blocks) for each in self.passes) + encoder * encodes
        most = max(self._images(), self._forward(), self._loss(), self._backward())
        if self.name == "tensorflow":  # whose pool holds all of it, and gives nothing back to XLA for the update
            return int(_ROOM[self.name] * (held + max(most, self.gradients))) + self._clipped() + program
        return held + int(_ROOM[self.name] * max(most, self._update())) + program

    def _images(self) -> int:
        """In a frozen image encoder."""
        if self.name != "torch":
            return max(map(sum, itertools.pairwise([0, *self.features])), default=0)
        return self.gradients + sum(self.features)  # as in `_forward`

    def _forward(self) -> int:
        """At the end of the forward pass."""
        if not self.back:
            return max(each.block for each in self.passes)  # of which each gives its arrays back to the next
        if self.name != "torch":
            return self.kept + self._masks()
        # Keras sets the last step's gradients back only then, and until then a functional model holds what its layers
        # gave: of a block, the stream and its keys and values.
        config = self.config
        pair = 2 * config.num_key_value_heads * config.head_dim + config.hidden_dim * (self.number < REAL)
        held = sum(self.number * each.tokens * pair * len(each.blocks) for each in self.passes)
        return self.gradients + self.kept + held

    def _masks(self) -> int:
        """What is made for all blocks of a stack at once, of the size of attention's weights."""
        return _SCORES[self.name][0] * sum(sum(each.scores) for each in self.back)

    def _loss(self) -> int:
        if not isinstance(self.task, LanguageModel):
            return self.kept
        vocabulary, width = self.config.vocabulary_size, self.config.hidden_dim
        chunks = -(-self.tokens // rows_of_chunk(vocabulary))
        logits = -(-self.tokens // chunks) * vocabulary
        copies, heads = _LOSS[self.name]
        if self.task.quantized or (self.task.compiled and not self.task.chunked):
            logits, copies = self.tokens * vocabulary, max(copies, 2)  # held as a whole, and their gradient
        head = REAL * vocabulary * width
        hidden = 4 * REAL * self.tokens * width  # in the order of the chunks, twice, and their gradients
        found = bool(self.task._to_logits.trainable_variables)
        return self.kept + self._masks() + REAL * copies * logits + heads * head * found + hidden

    def _backward(self) -> int:
        """While the first of the blocks that are gone through again is: what is kept falls as gradients rise."""
        if not self.back:
            return self.gradients
        most = _SCORES[self.name][1] * max(max(each.scores) for each in self.back)
        middle = (
            _MIDDLES[self.name] * self.number * max(each.tokens for each in self.back) * self.config.intermediate_dim
        )
        return max(self.kept, self.gradients) + self.again + max(self._masks() + middle, most)

    def _update(self) -> int:
        """While the optimizer runs; XLA goes weight by weight, and holds all gradients, clipped and not, until then."""
        if self.name != "torch":
            return self.gradients + self._clipped()
        # Keras' Adam on torch goes over all weights at once, by three lists of temporary arrays.
        largest = max((bytes_of([variable]) for variable in self.trained), default=0)
        adam = isinstance(self.optimizer, keras.optimizers.Adam)
        return self.gradients + self._clipped() + 3 * (self.gradients if adam else largest)

    def _clipped(self) -> int:
        """Gradients whose norm was clipped, beside those that were not."""
        return self.gradients if self.optimizer.global_clipnorm or self.optimizer.clipnorm else 0
