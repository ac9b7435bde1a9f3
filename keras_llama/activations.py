"""What the forward pass of a step keeps for its gradient, in bytes: of a stack of blocks, and of an image encoder.

A stack's is counted array by array, as Korthikanti et al., 2022 (https://arxiv.org/abs/2205.05198, section 4.1), count
a transformer's, for the blocks as this package writes them: the backends differ in what they keep and compute again.
Shapes: B rows, T tokens, S tokens that are attended to, D, N, K, H, F as `LlamaConfig`.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from keras_llama import backend

REAL = 4  # bytes of a float32
# Bytes for each number that dropout leaves or not: XLA keeps the two words that this is drawn from, on a CPU at least.
_DRAWN = {"torch": 1, "jax": 8, "tensorflow": 1}


def width_of(dtype: Any) -> int:
    """Bytes of a number of this type.

    >>> width_of("bfloat16"), width_of("bool")
    (2, 1)
    """
    bits = re.search(r"\d+$", keras.backend.standardize_dtype(dtype))
    return int(bits[0]) // 8 if bits else 1


def bytes_of(variables: Iterable[Any]) -> int:
    """Bytes of these variables.

    >>> bytes_of([keras.Variable(np.zeros((2, 3), "float32"))])
    24
    """
    return sum(int(np.prod(variable.shape)) * width_of(variable.dtype) for variable in variables)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A step's way through a stack of blocks and its final norm.

    Args:
        blocks: the `LlamaBlock`s.
        config: their `LlamaConfig`.
        dtype: that they compute in.
        rows: B.
        length: T.
        source: S of cross-attention, in another stack; 0 without.
        through: whether a gradient comes back.
        remat: whether the inside of each block is computed again for it.
    """

    blocks: list[Any]
    config: Any
    dtype: str
    rows: int
    length: int
    source: int = 0
    through: bool = True
    remat: bool = False

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length

    @property
    def scores(self) -> list[int]:
        """The weights (B, N, T, S) of each attention in a block, float32; no backend keeps them."""
        heads = REAL * self.tokens * self.config.num_query_heads
        return [heads * keys for keys in (self.length, self.source) if keys]

    @property
    def block(self) -> int:
        """What the inside of a block keeps, the largest."""
        return max(map(self._inside, self.blocks))

    @property
    def kept(self) -> int:
        """What all blocks keep for the gradient, and what stands behind them."""
        if not self.through:
            return 0
        if self.remat:  # what enters the parts of each block
            entering = width_of(self.dtype) * self.tokens * self.config.hidden_dim
            return len(self.blocks) * (1 + len(self.scores)) * entering + self._ends()
        return sum(map(self._inside, self.blocks)) + self._ends()

    @property
    def _multiplied(self) -> int:
        """Bytes of a number that a product reads: on a CPU XLA multiplies in float32, and keeps that."""
        return REAL if backend.name() == "jax" and not backend.has_gpu() else width_of(self.dtype)

    def _inside(self, block: Any) -> int:
        """What the inside of a block keeps."""
        layers = [layer for group in block.projections for layer in group]
        attention = self._attention(block.attention, self.length) + self._rotations()
        if block.cross_attention is not None:
            attention += self._attention(block.cross_attention, self.source)
        return self._norms(block) + attention + self._mlp(block.mlp) + self._casts(layers)

    def _norms(self, block: Any) -> int:
        """Of the norm before each part, and of the dropout behind it."""
        width, parts = self.tokens * self.config.hidden_dim, 1 + len(self.scores)
        dropped = parts * width_of(self.dtype) * width * (self.config.dropout > 0)
        if backend.name() == "tensorflow":  # which computes them again (`backend.remat_cheap`)
            return parts * width_of(self.dtype) * width + dropped
        # The input and, for the scale, the normed one, in float32.
        return parts * REAL * width * (1 + bool(block.mlp_norm.trainable_variables)) + dropped

    def _rotations(self) -> int:
        """cos and sin, for queries and keys; elsewhere they are computed again."""
        return REAL * 4 * self.config.head_dim * self.tokens * (backend.name() == "torch")

    def _attention(self, attention: Any, seen: int) -> int:
        """Of attention to `seen` tokens a row."""
        config, wide, keys = self.config, width_of(self.dtype), self.rows * seen
        query_width, key_width = (n * config.head_dim for n in (config.num_query_heads, config.num_key_value_heads))
        entering, *source, merged = attention.projections
        read = self._read(entering, config.hidden_dim, self.tokens) + self._read(merged, query_width, self.tokens)
        read += sum(self._read(layers, 0, keys) for layers in source)  # kept once for all blocks, by the other stack
        if backend.name() != "torch":  # the weights are computed again
            return read + wide * (query_width * self.tokens + 2 * key_width * keys)
        # The fused kernel keeps query, key and value, its result, the logarithm of its sums, and, of a batch with
        # padding, a mask of its own.
        repeated = query_width if backend.repeats_keys(self.rows * config.num_key_value_heads) else key_width
        heads = 2 * wide * (query_width * self.tokens + repeated * keys)
        return read + heads + self.tokens * (REAL * config.num_query_heads + wide * seen)

    def _mlp(self, mlp: Any) -> int:
        """Of SwiGLU."""
        (gate, up), (down,) = mlp.projections
        middle, wide = self.tokens * self.config.intermediate_dim, width_of(self.dtype)
        read = self._read((gate, up), self.config.hidden_dim, self.tokens)
        read += self._read((down,), 0, self.tokens)
        trained = bool(down.trainable_variables)
        if backend.name() == "tensorflow":
            # gate and up; their product and what it is made of are computed again, unless `down` draws behind it.
            return read + wide * middle * (2 + 2 * down.draws)
        if backend.name() == "torch":  # gate, silu(gate) and up
            return read + wide * middle * (3 + trained)
        # XLA keeps sigmoid(gate), too, and gate and up before and after an adapter's part is added.
        adapted = sum(layer.adapter is not None for layer in (gate, up))
        return read + middle * (self._multiplied * trained + wide * (4 + adapted))

    def _read(self, layers: Iterable[Any], width: int, tokens: int) -> int:
        """The input of trained kernels, that of each adapter with dropout, and of the second halves of adapters."""
        layers = list(layers)
        width *= any(layer.trainable_variables and not layer.draws for layer in layers)
        ranks = sum(layer.adapter.b.shape[0] for layer in layers if layer.adapter is not None)
        dropped = sum(layer.sizes[0] for layer in layers if layer.draws)  # a copy each
        return tokens * (self._multiplied * (width + ranks + dropped) + _DRAWN[backend.name()] * dropped)

    def _casts(self, layers: list[Any]) -> int:
        """Kernels in the dtype of the products, where that is another."""
        plain = [layer for layer in layers if layer.quantization_mode is None]
        cast = [layer.kernel for layer in plain if width_of(layer.variable_dtype) != width_of(self.dtype)]
        return sum(int(np.prod(kernel.shape)) for kernel in cast) * self._multiplied

    def _ends(self) -> int:
        """The final norm's input and normed input, its result, and n-grams' vectors."""
        ngrams = 3 * width_of(self.dtype) * (self.config.num_ngrams > 0)
        return self.tokens * self.config.hidden_dim * (2 * REAL + width_of(self.dtype) + ngrams)


def outputs(model: Any) -> Iterator[int]:
    """Bytes that each layer of a Keras model makes of one row, those of models inside of it one by one.

    >>> list(outputs(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), keras.layers.ReLU()])))
    [8, 8]
    """
    for part in model.operations if isinstance(model, keras.Function) else model.layers:
        if isinstance(part, (keras.Function, keras.Sequential)):
            yield from outputs(part)
        elif not isinstance(part, keras.layers.InputLayer):
            arrays = keras.tree.flatten(part.output)
            yield sum(int(np.prod(array.shape[1:])) * width_of(array.dtype) for array in arrays)
