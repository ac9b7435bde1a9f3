"""What training a task takes, reckoned before it begins. Shapes: B batch, T tokens, D, N, K, H, F, V as `LlamaConfig`.

Sizes of weights, gradients and state are exact. What the backward pass keeps is counted array by array, as Korthikanti
et al., 2022 (https://arxiv.org/abs/2205.05198, section 4.1), count a transformer's, for the blocks as this package
writes them: the backends differ in what they keep and compute again.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_llama import backend
from keras_llama.config import invalid
from keras_llama.heads.causal_lm import LlamaCausalLM
from keras_llama.heads.ensemble import LlamaClassifierEnsemble
from keras_llama.heads.question_answering import LlamaQuestionAnswering
from keras_llama.heads.text_classifier import LlamaTextClassifier
from keras_llama.losses import rows_of_chunk

_MIB, _GIB = 2**20, 2**30


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
# takes the same for any number of blocks, TensorFlow's graph and its compiled update more for each. (base, each block)
_PROGRAM = {"torch": (16 * _MIB, 0), "jax": (300 * _MIB, 0), "tensorflow": (35 * _MIB, 50 * _MIB)}
# Copies of a chunk's logits that the loss holds at a time, and of the head's kernel: its gradient, the sums of that,
# transpositions.
_LOSS = {"torch": (2, 2), "jax": (3, 4), "tensorflow": (3, 2)}
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
        task: a `LlamaCausalLM`, `LlamaTextClassifier` or `LlamaQuestionAnswering`, as it will be trained: frozen,
            adapted, with `remat`.
        batch_size: B, rows of a step.
        sequence_length: T, tokens of a row, padding included.
        optimizer: a name or an object; `None` is the one that the task is compiled with, else AdamW.

    Returns:
        A `MemoryEstimate`, in bytes.

    Raises:
        ValueError: for another task, sizes below 1, or an optimizer that Keras does not know.

    >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
    >>> estimate = keras_llama.estimate_memory(keras_llama.LlamaCausalLM(backbone), batch_size=8, sequence_length=64)
    >>> estimate.weights, estimate.gradients, estimate.optimizer // estimate.weights  # AdamW's two numbers a weight
    (1481216, 1481216, 2)
    """
    _check(task, batch_size, sequence_length)
    optimizer = _optimizer(task, optimizer)
    weights, state = _bytes(task.weights), _state(optimizer, task.trainable_variables)
    step = _Step(task, batch_size, sequence_length, optimizer)
    return MemoryEstimate(weights, step.gradients, state, step.kept, step.peak(weights + state))


def _check(task: Any, batch_size: Any, sequence_length: Any) -> None:
    kinds = (LlamaCausalLM, LlamaTextClassifier, LlamaQuestionAnswering)
    if not isinstance(task, kinds) or isinstance(task, LlamaClassifierEnsemble):
        hint = "Other tasks have no formula yet."
        names = ", ".join(kind.__name__ for kind in kinds)
        raise invalid(f"`task` must be one of {names}.", hint, task=type(task).__name__)
    for name, value in {"batch_size": batch_size, "sequence_length": sequence_length}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(f"`{name}` must be an integer of at least 1.", **{name: value})


def _readable(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"


def _width(dtype: Any) -> int:
    """Bytes of a number of this type."""
    bits = re.search(r"\d+$", keras.backend.standardize_dtype(dtype))
    return int(bits[0]) // 8 if bits else 1


def _bytes(variables: Iterable[Any]) -> int:
    return sum(int(np.prod(variable.shape)) * _width(variable.dtype) for variable in variables)


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
        return _bytes(optimizer.variables)
    noted = []

    def note(reference_variable, *_, **__):
        noted.append(reference_variable)

    copy = type(optimizer).from_config(optimizer.get_config())
    getattr(copy, "inner_optimizer", copy).add_variable_from_reference = note  # inner: of one that scales the loss
    before = {id(variable) for variable in copy.variables}
    copy.build(trained)
    return _bytes([*optimizer.variables, *noted, *(v for v in copy.variables if id(v) not in before)])


class _Step:
    """What a step holds beside weights and the optimizer's state, in bytes."""

    def __init__(self, task: Any, batch_size: int, sequence_length: int, optimizer: Any):
        self.name = backend.name()
        self.task, self.config = task, task.backbone.config
        self.optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
        self.length, self.tokens = sequence_length, batch_size * sequence_length
        self.number = _width(task.compute_dtype)
        # On a CPU XLA multiplies in float32: it keeps what products read in that.
        self.multiplied = 4 if self.name == "jax" and not backend.has_gpu() else self.number
        self.trained = task.trainable_variables
        self.gradients = _bytes(self.trained)
        self.through = bool(task.backbone.trainable_variables)  # else no gradient enters the blocks
        self.scores = 4 * self.tokens * self.config.num_query_heads * sequence_length  # (B, N, T, T)
        blocks = [self._block(block) for block in task.backbone.blocks]
        remat = task.backbone.remat is not None
        self.block = max(blocks)
        streams = 2 * self.number * self.tokens * self.config.hidden_dim  # what enters the two halves of a block
        self.kept = 0
        if self.through:
            self.kept = (len(blocks) * streams if remat else sum(blocks)) + self._ends()
        self.again = self.block if remat and self.through else 0

    def peak(self, held: int) -> int:
        """The most at any time of a step, beside the bytes of weights and state."""
        base, each = _PROGRAM[self.name]
        program = base + each * self.config.num_layers
        most = max(self._forward(), self._loss(), self._backward())
        if self.name == "tensorflow":  # whose pool holds all of it, and gives nothing back to XLA for the update
            return int(_ROOM[self.name] * (held + max(most, self.gradients))) + self._clipped() + program
        return held + int(_ROOM[self.name] * max(most, self._update())) + program

    def _block(self, block: Any) -> int:
        """What the inside of a block keeps for its gradient."""
        config, wide, real = self.config, self.number, 4
        queries, keys = config.num_query_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        (query, key, value), (merged,), (gate, up), (down,) = block.projections
        entered = sum(any(layer.trainable_variables for layer in group) for group in ((query, key, value), (gate, up)))
        merges, goes_down = bool(merged.trainable_variables), bool(down.trainable_variables)
        scaled = bool(block.mlp_norm.trainable_variables)
        layers = [layer for group in block.projections for layer in group]
        ranks = sum(layer.adapter.b.shape[0] for layer in layers if layer.adapter is not None)
        # Inputs of trained kernels: what the norms give, the heads' sums, and the product inside SwiGLU.
        inputs = self.multiplied * (entered * config.hidden_dim + merges * queries + ranks)
        dropped = 2 * wide * config.hidden_dim * (config.dropout > 0)
        width, middle = config.hidden_dim, config.intermediate_dim
        if self.name == "torch":
            # A norm keeps its input and, for its scale, the normed one, in float32. The fused kernel keeps query, key
            # and value, repeated for each query head, its result, the logarithm of its sums, and a mask of its own;
            # rotations keep cos and sin, for queries and keys. SwiGLU keeps gate, silu(gate) and up.
            norms = 2 * real * width * (1 + scaled)
            attention = 4 * wide * queries + real * (4 * config.head_dim + config.num_query_heads) + wide * self.length
            mlp = wide * middle * (3 + goes_down)
        elif self.name == "jax":
            # XLA keeps the stream before each norm, and the normed one, in float32; sigmoid(gate) and silu(gate) beside
            # gate and up, and these before and after an adapter's part is added. The weights of attention are computed
            # again.
            norms = 2 * real * width * (1 + scaled)
            attention = wide * (queries + 2 * keys)
            mlp = self.multiplied * middle * goes_down + wide * middle * (
                4 + sum(layer.adapter is not None for layer in (gate, up))
            )
        else:
            # Norms, the weights of attention and the inside of SwiGLU are computed again (`backend.remat_cheap`).
            norms = 2 * wide * width
            attention = wide * (queries + 2 * keys)
            mlp = 2 * wide * middle
        kept = self.tokens * (norms + attention + mlp + inputs + dropped)
        return kept + self._casts(layers)

    def _casts(self, layers: list) -> int:
        """Kernels in the dtype of the products, where that is another."""
        plain = [layer for layer in layers if layer.quantization_mode is None]
        cast = [layer.kernel for layer in plain if _width(layer.variable_dtype) != self.number]
        return sum(int(np.prod(kernel.shape)) for kernel in cast) * self.multiplied

    def _ends(self) -> int:
        """The final norm's input and normed input, its result, and n-grams' vectors."""
        config = self.config
        ngrams = 3 * self.number * config.hidden_dim * (config.num_ngrams > 0)
        return self.tokens * (config.hidden_dim * (2 * 4 + self.number) + ngrams)

    def _forward(self) -> int:
        """At the end of the forward pass."""
        if not self.through:
            return self.block  # of which each gives its arrays back to the next
        if self.name != "torch":
            return self.kept + _SCORES[self.name][0] * self.scores
        # Keras sets the last step's gradients back only then, and until then a functional model holds what its layers
        # gave: of a block, the stream and its keys and values.
        config = self.config
        pair = 2 * config.num_key_value_heads * config.head_dim + config.hidden_dim * (self.number < 4)
        return self.gradients + self.kept + self.number * self.tokens * pair * config.num_layers

    def _loss(self) -> int:
        if not isinstance(self.task, LlamaCausalLM):
            return self.kept
        vocabulary, width = self.config.vocabulary_size, self.config.hidden_dim
        chunks = -(-self.tokens // rows_of_chunk(vocabulary))
        logits = 4 * -(-self.tokens // chunks) * vocabulary
        if self.task.quantized or (self.task.compiled and not self.task.chunked):
            logits = 4 * self.tokens * vocabulary
        head = 4 * vocabulary * width
        hidden = 4 * 4 * self.tokens * width  # in the order of the chunks, twice, and their gradients
        found = bool(self.task._to_logits.trainable_variables)
        copies, heads = _LOSS[self.name]
        scores = _SCORES[self.name][0] * self.scores
        return self.kept + scores + copies * logits + heads * head * found + hidden

    def _backward(self) -> int:
        """While the first of the blocks that are gone through again is: what is kept falls as gradients rise."""
        if not self.through:
            return self.gradients
        always, most = (count * self.scores for count in _SCORES[self.name])
        middle = _MIDDLES[self.name] * self.number * self.tokens * self.config.intermediate_dim
        inside = max(always + middle, most)
        return max(self.kept, self.gradients) + self.again + inside

    def _update(self) -> int:
        """While the optimizer runs; XLA goes weight by weight, and holds all gradients, clipped and not, until then."""
        if self.name != "torch":
            return self.gradients + self._clipped()
        # Keras' Adam on torch goes over all weights at once, by three lists of temporary arrays.
        largest = max((_bytes([variable]) for variable in self.trained), default=0)
        adam = isinstance(self.optimizer, keras.optimizers.Adam)
        return self.gradients + self._clipped() + 3 * (self.gradients if adam else largest)

    def _clipped(self) -> int:
        """Gradients whose norm was clipped, beside those that were not."""
        return self.gradients if self.optimizer.global_clipnorm or self.optimizer.clipnorm else 0
