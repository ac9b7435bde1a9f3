"""LlamaBackbone: token ids -> hidden states, as a functional Keras model."""

import dataclasses

import keras

from keras_llama.alike import BlockRunner
from keras_llama.config import LlamaConfig, invalid
from keras_llama.embedding import TokenEmbedding
from keras_llama.layers import LlamaBlock, LlamaPositions, embedding_initializer, register
from keras_llama.ngrams import NgramEmbedding


class Stack:
    """Embedding, blocks and final norm of an encoder or a decoder, and the one loop over the blocks.

    A plain object, because a functional model may hold layers only after its graph is built, and
    the graph is built by this loop.

    Args:
        config: the architecture.
        dtype: a Keras dtype policy.
        prefix: of the layers' names.
        cross_attention: whether the blocks attend to a memory, too.
        token_embedding: one to share; a new one unless given.
    """

    def __init__(self, config: LlamaConfig, dtype, prefix="", cross_attention=False, token_embedding=None):
        self.token_embedding = token_embedding or TokenEmbedding(
            config.vocabulary_size,
            config.hidden_dim,
            tie_weights=True,  # an untied head belongs to the task that has one
            embeddings_initializer=embedding_initializer(_initial_scale(config)),
            dtype=dtype,
            name=f"{prefix}token_embedding",
        )
        self.ngram_embedding = None
        rate = config.dropout if config.embedding_dropout is None else config.embedding_dropout
        if config.num_ngrams:
            self.ngram_embedding = NgramEmbedding(
                vocabulary_size=config.vocabulary_size,
                length=config.num_ngrams,
                width=config.hidden_dim,
                dropout=rate,
                dtype=dtype,
                name=f"{prefix}ngram_embedding",
            )
        self.embedding_dropout = keras.layers.Dropout(rate, dtype=dtype, name=f"{prefix}embedding_dropout")
        self.positions = LlamaPositions(
            head_dim=config.head_dim,
            rope_max_wavelength=config.rope_max_wavelength,
            rope_scaling=config.rope_scaling,
            causal=config.causal,
            dtype=dtype,
            name=f"{prefix}positions",
        )
        self.blocks = [
            LlamaBlock(
                num_query_heads=config.num_query_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                intermediate_dim=config.intermediate_dim,
                layer_norm_epsilon=config.layer_norm_epsilon,
                attention_bias=config.attention_bias,
                mlp_bias=config.mlp_bias,
                dropout=config.dropout,
                cross_attention=cross_attention,
                output_scale=(2 * config.num_layers) ** -0.5,  # GPT-2's: the stream starts no larger than its parts
                dtype=dtype,
                name=f"{prefix}block_{i}",
            )
            for i in range(config.num_layers)
        ]
        self.final_norm = lambda x: x
        if config.final_norm:
            self.final_norm = keras.layers.RMSNormalization(
                epsilon=config.layer_norm_epsilon, dtype=dtype, name=f"{prefix}final_norm"
            )

    def run(self, token_ids, padding_mask, cache=None, index=0, memory=None, memory_mask=None, embeddings=None):
        """Hidden states (B, T, D) and a (key, value) pair per block; `memory` is one for all blocks or one for each."""
        x = self.embedding_dropout(self.token_embedding(token_ids) if embeddings is None else embeddings)
        if self.ngram_embedding is not None:
            x += self.ngram_embedding(token_ids, padding_mask)
        cos, sin, mask = self.positions(token_ids, padding_mask, index=index)
        run, pairs = BlockRunner() if cache is not None else keras.Layer.__call__, []
        for i, block in enumerate(self.blocks):
            x, pair = run(
                block, x, cos, sin, mask,
                cache=None if cache is None else cache[i],
                index=index,
                memory=memory[i] if isinstance(memory, tuple) else memory,
                memory_mask=memory_mask,
            )  # fmt: skip
            pairs.append(pair)
        return self.final_norm(x), tuple(pairs)


def _initial_scale(config):
    """1, which blocks do not drown; small where the matrix makes logits, too, or learns beside n-grams."""
    return config.hidden_dim**-0.5 if config.tie_word_embeddings or config.num_ngrams else 1.0


def check_cache(cache, token_ids, padding_mask, index):
    """Raises a `ValueError` unless tokens (B, T) at column `index` fit into a cache and its mask (B, S)."""
    columns, length = cache[0][0].shape[2], token_ids.shape[1]
    known = None not in (columns, length) and isinstance(index, int)  # sizes may be open in somebody's graph
    if padding_mask.shape[1] != columns or (known and not 0 <= index <= columns - length):
        raise invalid(
            "`token_ids` must fit into the cache, and `padding_mask` must have a column for each of its own.",
            "Make a longer cache.",
            cache_columns=columns,
            mask_columns=padding_mask.shape[1],
            index=index,
            tokens=length,
        )


class Backbone(keras.Model):
    """A functional model whose last part is `stack`: its configuration, its layers by name, and how it is saved."""

    def __init__(self, inputs, hidden, *, config, stack, policy, name, trainable, remat):
        super().__init__(inputs=inputs, outputs=hidden, name=name, trainable=trainable)
        self.dtype_policy = policy
        self.config = config
        self._stack = stack
        self.adapters, self.active_adapter, self.quantized = {}, None, None  # what `Adaptable` tasks have made of it
        self.remat = remat

    @property
    def token_embedding(self):
        """The embedding layer of the tokens that come out; called with `reverse=True` it is the tied head."""
        return self._stack.token_embedding

    @property
    def positions(self):
        """The `LlamaPositions` of all blocks."""
        return self._stack.positions

    @property
    def ngram_embedding(self):
        """The layer whose `know` takes the list of n-grams; `None` without n-grams."""
        return self._stack.ngram_embedding

    @property
    def blocks(self):
        """The `LlamaBlock`s that hidden states come out of, first to last; a decoder's, if there are two halves."""
        return list(self._stack.blocks)

    @property
    def remat(self):
        """What training computes again for its gradient, to save memory: "block", all inside of a block, or `None`."""
        return self._remat

    @remat.setter
    def remat(self, remat):
        if remat not in (None, "block"):
            raise invalid('`remat` must be "block" or None.', remat=remat)
        rates = {name: settings["dropout"] for name, settings in self.adapters.items() if settings["dropout"]}
        if remat and rates:
            raise invalid("`remat` must be None beside adapters with dropout: it draws nothing twice.", dropout=rates)
        self._remat = remat
        for layer in self.layers:
            if isinstance(layer, LlamaBlock):
                layer.remat = remat == "block"

    def get_config(self):
        return {
            **dataclasses.asdict(self.config),
            "remat": self.remat,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)


@register
class LlamaBackbone(Backbone):
    """The LLaMA stack without a head: token ids and padding mask (B, T) -> hidden states (B, T, D).

    Args: those of `LlamaConfig`, which checks them, and
        dtype: a Keras dtype policy or its name; `None` takes the global policy.
        remat: "block" has training keep nothing of the inside of a block but compute it again for the gradient:
            less memory, a fourth more time. It may be set later, too: `backbone.remat = "block"`, before `fit`.

    Inputs are a dict: `token_ids` int (B, T) and `padding_mask` int (B, T), 0 for padding and n for
    segment n (0 and 1 in an ordinary batch). Padding may stand on either side.

    Raises:
        ValueError: if an argument is out of range.

    >>> backbone = LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
    >>> ids = np.array([[5, 8, 2]])
    >>> tuple(backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}).shape)
    (1, 3, 128)
    """

    def __init__(self, *, dtype=None, name=None, trainable=True, remat=None, **config):
        checked = LlamaConfig(**config)
        policy = keras.dtype_policies.get(dtype)
        stack = Stack(checked, policy)
        inputs = {key: keras.Input((None,), dtype="int32", name=key) for key in ("token_ids", "padding_mask")}
        hidden, _ = stack.run(**inputs)
        options = {"name": name, "trainable": trainable, "remat": remat}
        super().__init__(inputs, hidden, config=checked, stack=stack, policy=policy, **options)

    def decode(self, token_ids, padding_mask, cache=None, index=0, embeddings=None):
        """Runs the blocks with or without a cache: a full forward, a prefill, or a step.

        Args:
            token_ids: int (B, T).
            padding_mask: int (B, S), a column per key: S is T without a cache, its length with one.
            cache: `None`, or what `cache.make` or an earlier call returned.
            index: first column that `token_ids` stand at; int or scalar tensor.
            embeddings: (B, T, D), what the blocks read instead of the embeddings of `token_ids`.

        Returns:
            Hidden states (B, T, D) after the final norm, and a (key, value) pair per block.

        Raises:
            ValueError: if the tokens do not fit into the cache or the mask, or a bidirectional backbone is
                given a cache: what it computed for earlier tokens depends on those that come now; or one with
                n-grams is, which need the tokens before.
        """
        if cache is not None:
            if not self.config.causal:
                raise invalid("`cache` needs a causal backbone.", "Run the whole text at once.", causal=False)
            if self.config.num_ngrams:
                number = self.config.num_ngrams
                raise invalid("`cache` needs a backbone without n-grams.", "Run the whole text.", num_ngrams=number)
            check_cache(cache, token_ids, padding_mask, index)
        return self._stack.run(token_ids, padding_mask, cache, index, embeddings=embeddings)

    @classmethod
    def from_preset(cls, preset, dtype=None):
        """The backbone of a checkpoint, without its head.

        Args:
            preset: what `checkpoints.presets.open_checkpoint` takes: a Hugging Face directory, a GGUF or
                llama2.c file, `hf://org/name`, "smollm2_135m_instruct", a KerasHub preset or backbone.
            dtype: a Keras dtype policy or its name; `None` takes the global policy if it is not float32,
                else the dtype in which the checkpoint loses nothing (bfloat16 for quantised files).

        Raises:
            ValueError: if the checkpoint cannot be read or does not fit, in one table of names.
        """
        from keras_llama.checkpoints import loader, presets

        return loader.build_backbone(presets.open_checkpoint(preset), dtype, load_weights=True)
