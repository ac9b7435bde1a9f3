"""The model file: positions, attention, SwiGLU and the LLaMA block as Keras layers.

Touvron et al., 2023 (https://arxiv.org/abs/2302.13971). Shapes: B batch, T query length, S key
length, D hidden_dim, N heads, K key/value heads, H head_dim, F intermediate_dim.
"""

import contextlib
import contextvars
from typing import Any

import keras
from keras import ops

from keras_llama import backend
from keras_llama import cache as kv_cache
from keras_llama.attention import attend, attend_to_first, not_later, positions, same_segment, same_segment_or_all
from keras_llama.config import check_heads, invalid, rope_options
from keras_llama.lora import Projection
from keras_llama.projections import project
from keras_llama.rope import inverse_frequencies, rotary_angles, rotate

register = keras.saving.register_keras_serializable(package="keras_llama")


_random = contextvars.ContextVar("random", default=True)


def kernel_initializer(scale=1.0):
    """Normal of variance `scale` ** 2 / fan-in: a projection's output is `scale` times as large as its input.

    Near a width of 2,500 that is the 0.02 of the large LLaMAs; with 0.02 at a width of 128 a model hardly learns.
    """
    normal = keras.initializers.VarianceScaling(scale**2, "fan_in", "untruncated_normal")
    return normal if _random.get() else keras.initializers.Zeros()


def embedding_initializer(stddev=0.02):
    normal = keras.initializers.RandomNormal(stddev=stddev)
    return normal if _random.get() else keras.initializers.Zeros()


@contextlib.contextmanager
def no_random_weights():
    """Layers made inside start with zeros: a checkpoint's weights are about to replace them."""
    token = _random.set(False)
    try:
        yield
    finally:
        _random.reset(token)


@register
class LlamaPositions(keras.layers.Layer):
    """Padding mask -> rotary cos and sin and the attention mask, computed once per forward.

    Args:
        head_dim: H, even.
        rope_max_wavelength, rope_scaling: as in `LlamaConfig`.
        causal: `False` lets every token see its whole segment.

    Raises:
        ValueError: if `head_dim` is odd, or for a scaling that is not known.

    Call: `token_ids` (B, T), `padding_mask` (B, S), `index` of the first query among the S columns
    (0 without a cache, where S == T) -> cos, sin float32 (B, T, H/2), mask bool (B, T, S).

    >>> ones = np.ones((1, 3), "int32")
    >>> cos, sin, mask = LlamaPositions(head_dim=4)(ones, ones)
    >>> keras.ops.convert_to_numpy(mask)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    def __init__(self, *, head_dim, rope_max_wavelength=10_000.0, rope_scaling=None, causal=True, **kwargs):
        check_heads(1, 1, head_dim)
        super().__init__(autocast=False, **kwargs)
        self.head_dim = head_dim
        self.rope_max_wavelength = rope_max_wavelength
        self.rope_scaling = rope_options(rope_scaling)
        self.causal = causal
        self.frequencies, self.factor = inverse_frequencies(head_dim, rope_max_wavelength, self.rope_scaling)

    def call(self, token_ids, padding_mask, index=0):
        segments = ops.cast(padding_mask, "int32")
        length = ops.shape(token_ids)[1]
        queries = backend.columns(segments, index, length)
        mask = same_segment(queries, segments)
        columns = ops.arange(ops.shape(padding_mask)[1], dtype="int32")
        seen = ops.logical_and(mask, not_later(ops.arange(length, dtype="int32") + index, columns))
        cos, sin = rotary_angles(positions(seen), self.frequencies, self.factor)
        return cos, sin, seen if self.causal else mask

    def get_config(self):
        return {
            **super().get_config(),
            "head_dim": self.head_dim,
            "rope_max_wavelength": self.rope_max_wavelength,
            "rope_scaling": self.rope_scaling,
            "causal": self.causal,
        }


def _dense(layer, units, name, scale=1.0):
    initializer = kernel_initializer(scale)
    return Projection(
        units, use_bias=layer.use_bias, kernel_initializer=initializer, dtype=layer.dtype_policy, name=name
    )


def _by_head(x):
    return ops.transpose(x, (0, 2, 1, 3))  # (B, T, K, H) -> (B, K, T, H)


@register
class LlamaMemoryMask(keras.layers.Layer):
    """Which source tokens each target token may look at in cross-attention: those of its segment.

    Call: `token_ids` (B, T), `padding_mask` (B, C) of C columns, `memory_padding_mask` (B, S) of the source, and
    `index` of the first query among the columns -> bool (B, T, S). Rows of beams, (B * n, T) over B sources, come as
    (B, n * T, S): in cross-attention the order of queries does not matter, so each source is held once.

    Raises:
        ValueError: if the rows of the target are no multiple of the source's.

    >>> found = LlamaMemoryMask()(np.ones((1, 2)), np.array([[1, 1]]), np.array([[1, 1, 0]]))
    >>> keras.ops.convert_to_numpy(found)[0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 0]]
    """

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "autocast": False})

    def call(self, token_ids, padding_mask, memory_padding_mask, index=0):
        targets, sources = token_ids.shape[0], memory_padding_mask.shape[0]
        if targets and sources and targets % sources:
            raise invalid("There must be as many targets as sources, or n for each.", targets=targets, sources=sources)
        queries = backend.columns(ops.cast(padding_mask, "int32"), index, ops.shape(token_ids)[1])
        queries = ops.reshape(queries, (ops.shape(memory_padding_mask)[0], -1))
        return same_segment_or_all(queries, ops.cast(memory_padding_mask, "int32"))


class _Attention(keras.layers.Layer):
    """The four projections of grouped-query attention; it takes float32 angles beside a compute-dtype stream."""

    def __init__(self, *, num_query_heads, num_key_value_heads, head_dim, use_bias=False, output_scale=1.0, **kwargs):
        check_heads(num_query_heads, num_key_value_heads, head_dim)
        super().__init__(**{**kwargs, "autocast": False})
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.use_bias = use_bias
        self.output_scale = output_scale
        self.query = _dense(self, num_query_heads * head_dim, "query")
        self.key = _dense(self, num_key_value_heads * head_dim, "key")
        self.value = _dense(self, num_key_value_heads * head_dim, "value")

    def build(self, x_shape):
        for projection in (self.query, self.key, self.value):
            projection.build(x_shape)
        self.attention_output = _dense(self, x_shape[-1], "attention_output", self.output_scale)
        self.attention_output.build((*x_shape[:-1], self.num_query_heads * self.head_dim))
        self.built = True

    def _heads(self, x, heads):
        return ops.reshape(x, (*ops.shape(x)[:-1], heads, self.head_dim))  # (B, T, N*H) -> (B, T, N, H)

    def _merged(self, heads, rows, length):
        merged = ops.reshape(heads, (rows, length, self.num_query_heads * self.head_dim))
        return project(merged, self.attention_output)[0]

    @property
    def projections(self):
        """The layers with a kernel, those of one input together, as `project` takes them."""
        return (self.query, self.key, self.value), (self.attention_output,)

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "use_bias": self.use_bias,
            "output_scale": self.output_scale,
        }


@register
class LlamaAttention(_Attention):
    """Grouped-query self-attention with rotary positions: (B, T, D) -> (B, T, D) and its keys and values.

    Call: `x` (B, T, D); `cos`, `sin` (B, T, H/2) and `mask` (B, T, S) from `LlamaPositions`;
    `cache`, this block's (key, value) pair (B, K, S, H), and `index`, the column to write at.
    Returns the output and the (key, value) pair, (B, K, T, H) or (B, K, S, H) with a cache.

    Args:
        num_query_heads: N.
        num_key_value_heads: K, divides N.
        head_dim: H, even.
        use_bias: bias in all four projections.
        output_scale: factor of the output projection's initial weights.

    Raises:
        ValueError: if K does not divide N, or H is odd.

    >>> ones = np.ones((1, 3), "int32")
    >>> attention = LlamaAttention(num_query_heads=2, num_key_value_heads=1, head_dim=4)
    >>> x, (key, value) = attention(np.ones((1, 3, 8), "float32"), *LlamaPositions(head_dim=4)(ones, ones))
    >>> tuple(x.shape), tuple(key.shape)
    ((1, 3, 8), (1, 1, 3, 4))
    """

    def call(self, x, cos, sin, mask, cache=None, index=0, training=None):
        x = ops.cast(x, self.compute_dtype)
        query, key, value = project(x, self.query, self.key, self.value)
        query = rotate(self._heads(query, self.num_query_heads), cos, sin)
        key = _by_head(rotate(self._heads(key, self.num_key_value_heads), cos, sin))
        value = _by_head(self._heads(value, self.num_key_value_heads))
        pair = (key, value) if cache is None else kv_cache.append(cache, key, value, index)
        length = ops.shape(x)[1]
        if cache is None or not isinstance(index, int) or index:
            key, value = pair
        else:  # nothing stands before, and of what stands behind no query sees anything
            mask = mask[:, :, :length]
        if isinstance(index, int):
            heads = attend(query, key, value, mask, training)
        else:
            heads = attend_to_first(query, key, value, mask, index + length)
        return self._merged(heads, *ops.shape(x)[:2]), pair


@register
class LlamaCrossAttention(_Attention):
    """Grouped-query attention of a target to its source, without rotary positions: (B, T, D) -> (B, T, D).

    Queries come from the decoder, keys and values from the encoder's output (Vaswani et al., 2017,
    https://arxiv.org/abs/1706.03762, section 3.2.3). Args and errors are those of `LlamaAttention`.

    Call: `x` (B, T, D); `memory`, the encoder's output (B, S, D) or its `keys_and_values`; `mask` (B, T, S) from
    `LlamaMemoryMask`. With n beams for each of B sources `x` is (B * n, T, D) and `mask` (B, n * T, S).

    >>> attention = LlamaCrossAttention(num_query_heads=2, num_key_value_heads=1, head_dim=4)
    >>> target, source = np.ones((1, 3, 8), "float32"), np.ones((1, 5, 8), "float32")
    >>> tuple(attention(target, source, np.ones((1, 3, 5), bool)).shape)
    (1, 3, 8)
    """

    def call(self, x, memory, mask, training=None):
        x = ops.cast(x, self.compute_dtype)
        key, value = memory if isinstance(memory, tuple) else self.keys_and_values(memory)
        (query,) = project(x, self.query)
        query = ops.reshape(query, (ops.shape(key)[0], -1, self.num_query_heads, self.head_dim))
        return self._merged(attend(query, key, value, mask, training), *ops.shape(x)[:2])

    def keys_and_values(self, encoded):
        """Keys and values of the encoder's output: (B, S, D) -> a pair of (B, K, S, H)."""
        encoded = ops.cast(encoded, self.compute_dtype)
        return tuple(_by_head(self._heads(kind(encoded), self.num_key_value_heads)) for kind in (self.key, self.value))

    @property
    def projections(self):
        """As `LlamaAttention.projections`; keys and values read the source."""
        return (self.query,), (self.key, self.value), (self.attention_output,)


@register
class LlamaMLP(keras.layers.Layer):
    """SwiGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202): down(silu(gate(x)) * up(x)), (B, T, D) -> same.

    Args:
        intermediate_dim: F.
        use_bias: bias in all three projections.
        output_scale: factor of the down projection's initial weights.

    >>> tuple(LlamaMLP(intermediate_dim=16)(np.ones((1, 3, 8), "float32")).shape)
    (1, 3, 8)
    """

    def __init__(self, *, intermediate_dim, use_bias=False, output_scale=1.0, **kwargs):
        super().__init__(**{**kwargs, "autocast": False})
        self.intermediate_dim = intermediate_dim
        self.use_bias = use_bias
        self.output_scale = output_scale
        self.gate = _dense(self, intermediate_dim, "gate")
        self.up = _dense(self, intermediate_dim, "up")

    def build(self, x_shape):
        self.gate.build(x_shape)
        self.up.build(x_shape)
        self.down = _dense(self, x_shape[-1], "down", self.output_scale)
        self.down.build((*x_shape[:-1], self.intermediate_dim))
        self.built = True

    def call(self, x, training=None):
        def gated(gate, up):
            return project(backend.silu(gate) * up, self.down)[0]

        x = ops.cast(x, self.compute_dtype)
        gate, up = project(x, self.gate, self.up)
        again = training and not self.down.draws
        return (backend.remat_cheap(gated, self.down.variables) if again else gated)(gate, up)

    @property
    def projections(self):
        """As `LlamaAttention.projections`."""
        return (self.gate, self.up), (self.down,)

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "use_bias": self.use_bias,
            "output_scale": self.output_scale,
        }


@register
class LlamaBlock(keras.layers.Layer):
    """One LLaMA block: x + attention(norm(x)), then x + mlp(norm(x)); arguments as `LlamaAttention`.

    Norms are RMSNorm (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467), computed in float32.
    With `cross_attention` there is x + cross_attention(norm(x), memory) between the two, for `memory` and
    `memory_mask` as `LlamaCrossAttention` takes them. `output_scale` is a factor of the initial weights that write
    into the residual stream. With `remat`, training keeps what goes through the stream and computes the rest of the
    block again for its gradient. Other args and errors are those of `LlamaConfig`.

    >>> positions = LlamaPositions(head_dim=4)
    >>> block = LlamaBlock(num_query_heads=2, num_key_value_heads=1, head_dim=4, intermediate_dim=16)
    >>> ones = np.ones((1, 3), "int32")
    >>> x, (key, value) = block(np.ones((1, 3, 8), "float32"), *positions(ones, ones))
    >>> tuple(x.shape), tuple(key.shape)
    ((1, 3, 8), (1, 1, 3, 4))
    """

    def __init__(
        self,
        *,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        intermediate_dim,
        layer_norm_epsilon=1e-5,
        attention_bias=False,
        mlp_bias=False,
        dropout=0.0,
        cross_attention=False,
        output_scale=1.0,
        remat=False,
        **kwargs,
    ):
        super().__init__(**{**kwargs, "autocast": False})
        self.layer_norm_epsilon = layer_norm_epsilon
        self.remat = remat
        policy = self.dtype_policy

        def norm(name):
            return keras.layers.RMSNormalization(epsilon=layer_norm_epsilon, dtype=policy, name=name)

        heads = {"num_query_heads": num_query_heads, "num_key_value_heads": num_key_value_heads, "head_dim": head_dim}
        heads |= {"use_bias": attention_bias, "output_scale": output_scale, "dtype": policy}
        self.attention_norm = norm("attention_norm")
        self.attention = LlamaAttention(**heads, name="attention")
        self.cross_attention: Any = None
        self.cross_attention_norm: Any = None
        if cross_attention:
            self.cross_attention_norm = norm("cross_attention_norm")
            self.cross_attention = LlamaCrossAttention(**heads, name="cross_attention")
        self.mlp_norm = norm("mlp_norm")
        self.mlp = LlamaMLP(
            intermediate_dim=intermediate_dim, use_bias=mlp_bias, output_scale=output_scale, dtype=policy, name="mlp"
        )
        self.dropout = keras.layers.Dropout(dropout, dtype=policy, name="dropout")

    def build(self, x_shape):
        crossing = (self.cross_attention_norm, self.cross_attention) if self.cross_attention else ()
        for layer in (self.attention_norm, self.attention, *crossing, self.mlp_norm, self.mlp, self.dropout):
            layer.build(x_shape)
        self.built = True

    def call(self, x, cos, sin, mask, cache=None, index=0, memory=None, memory_mask=None, training=None):
        x = ops.cast(x, self.compute_dtype)

        def normed(norm, x):
            return (backend.remat_cheap(norm, norm.variables) if training else norm)(x)

        def attended(x, cos, sin, mask):
            x = normed(self.attention_norm, x)
            return self.attention(x, cos, sin, mask, cache=cache, index=index, training=training)

        def crossed(x, memory, memory_mask):
            return self.cross_attention(normed(self.cross_attention_norm, x), memory, memory_mask, training=training)

        def mixed(x):
            return self.mlp(normed(self.mlp_norm, x), training=training)

        def dropped(x):
            return self.dropout(x, training=training) if self.dropout.rate else x  # a layer's call is not free

        again = self.remat and training
        # Dropout draws random numbers, so that it stays outside of what is computed twice.
        part, pair = self._run(again, attended, self.attention_norm, self.attention)(x, cos, sin, mask)
        x = x + dropped(part)
        if self.cross_attention is not None:
            part = self._run(again, crossed, self.cross_attention_norm, self.cross_attention)(x, memory, memory_mask)
            x = x + dropped(part)
        return x + dropped(self._run(again, mixed, self.mlp_norm, self.mlp)(x)), pair

    @property
    def projections(self):
        """As `LlamaAttention.projections`, of all parts."""
        parts = (self.attention, self.cross_attention, self.mlp)
        return tuple(group for part in parts if part is not None for group in part.projections)

    @property
    def step_projections(self):
        """Those that a step of decoding reads; keys and values of a source are computed before."""
        before = self.cross_attention and self.cross_attention.key
        return tuple(group for group in self.projections if group[0] is not before)

    def _run(self, again, part, *layers):
        """A part of the block that reads these layers, as it is or computed again for its gradient."""
        return backend.remat(part, [v for layer in layers for v in layer.variables]) if again else part

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.attention.num_query_heads,
            "num_key_value_heads": self.attention.num_key_value_heads,
            "head_dim": self.attention.head_dim,
            "intermediate_dim": self.mlp.intermediate_dim,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "attention_bias": self.attention.use_bias,
            "mlp_bias": self.mlp.use_bias,
            "dropout": self.dropout.rate,
            "cross_attention": self.cross_attention is not None,
            "output_scale": self.mlp.output_scale,
            "remat": self.remat,
        }
