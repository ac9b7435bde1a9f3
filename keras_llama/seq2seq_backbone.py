"""LlamaSeq2SeqBackbone: a source and a target -> hidden states of the target, as a functional Keras model.

Shapes: B batch, S source length, T target length, D hidden_dim, K key/value heads, H head_dim.
"""

import dataclasses

import keras

from keras_llama import backend
from keras_llama.backbone import Backbone, LlamaBackbone, Stack, check_cache
from keras_llama.config import LlamaSeq2SeqConfig, invalid
from keras_llama.layers import LlamaMemoryMask, no_random_weights, register

INPUTS = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")


@register
class LlamaSeq2SeqBackbone(Backbone):
    """A bidirectional LLaMA encoder and a causal LLaMA decoder that attends to it -> hidden states (B, T, D).

    A block of the decoder is a `LlamaBlock` with cross-attention between self-attention and SwiGLU.

    Args: those of `LlamaSeq2SeqConfig`, which checks them, and
        dtype: a Keras dtype policy or its name; `None` takes the global policy.
        remat: as in `LlamaBackbone`, for the blocks of both halves.

    Inputs are a dict: `encoder_token_ids` and `encoder_padding_mask` int (B, S), `decoder_token_ids` and
    `decoder_padding_mask` int (B, T). In the masks 0 is padding and n is segment n, so that several
    pairs may be packed into a row: segment n of the target sees segment n of the source.

    Raises:
        ValueError: if an argument is out of range.

    >>> backbone = LlamaSeq2SeqBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
    >>> source, target = np.array([[5, 8, 2, 9]]), np.array([[1, 7, 3]])
    >>> inputs = {"encoder_token_ids": source, "encoder_padding_mask": np.ones_like(source)}
    >>> inputs |= {"decoder_token_ids": target, "decoder_padding_mask": np.ones_like(target)}
    >>> tuple(backbone(inputs).shape)
    (1, 3, 128)
    """

    def __init__(self, *, dtype=None, name=None, trainable=True, remat=None, **config):
        checked = LlamaSeq2SeqConfig(**config)
        policy = keras.dtype_policies.get(dtype)
        decoder = Stack(checked, policy, cross_attention=True)
        shared = decoder.token_embedding if checked.share_embeddings else None
        encoder = Stack(checked.encoder, policy, prefix="encoder_", token_embedding=shared)
        memory_mask = LlamaMemoryMask(dtype=policy, name="memory_mask")
        inputs = {key: keras.Input((None,), dtype="int32", name=key) for key in INPUTS}
        source, source_mask, target, target_mask = inputs.values()
        encoded, _ = encoder.run(source, source_mask)
        mask = memory_mask(target, target_mask, source_mask)
        hidden, _ = decoder.run(target, target_mask, memory=encoded, memory_mask=mask)
        options = {"name": name, "trainable": trainable, "remat": remat}
        super().__init__(inputs, hidden, config=checked, stack=decoder, policy=policy, **options)
        self._encoder, self._memory_mask = encoder, memory_mask

    @property
    def encoder_blocks(self):
        """The encoder's `LlamaBlock`s, first to last."""
        return list(self._encoder.blocks)

    def encode(self, token_ids, padding_mask):
        """The encoder's output (B, S, D), after its final norm, for a source int (B, S) and its padding mask."""
        return self._encoder.run(token_ids, padding_mask)[0]

    def memory(self, encoded):
        """Keys and values of cross-attention, a pair (B, K, S, H) per block: what a source costs once per generation.

        Args:
            encoded: what `encode` returned.
        """
        return tuple(block.cross_attention.keys_and_values(encoded) for block in self.blocks)

    def decode(self, token_ids, padding_mask, memory, memory_padding_mask, cache=None, index=0):
        """Runs the decoder with or without a cache: a full forward, a prefill, or a step.

        Args:
            token_ids: int (B, T); or (B * n, T), n targets in turn for each source.
            padding_mask: int (B, C), a column per key: C is T without a cache, its length with one.
            memory: what `encode` or `memory` returned.
            memory_padding_mask: int (B, S), of the source.
            cache: `None`, or what `cache.make` or an earlier call returned.
            index: first column that `token_ids` stand at; int or scalar tensor.

        Returns:
            Hidden states (B, T, D) after the final norm, and a (key, value) pair of self-attention per block.

        Raises:
            ValueError: if the tokens do not fit into the cache or the mask.
        """
        if cache is not None:
            check_cache(cache, token_ids, padding_mask, index)
        mask = self._memory_mask(token_ids, padding_mask, memory_padding_mask, index=index)
        return self._stack.run(token_ids, padding_mask, cache, index, memory, mask)

    @classmethod
    def from_decoder(cls, decoder, *, share_embeddings=True, dropout=None, dtype=None):
        """Both halves started from a decoder-only LLaMA, as adapted encoder-decoders are.

        Self-attention, SwiGLU, norms and embeddings of both halves are copies; cross-attention starts from
        self-attention (Zhang et al., 2025, https://arxiv.org/abs/2504.06225).

        Args:
            decoder: a `LlamaBackbone`, or a preset as its `from_preset` takes it.
            share_embeddings: as in `LlamaSeq2SeqConfig`.
            dropout: rate while training; the decoder's unless given.
            dtype: a Keras dtype policy or its name; the decoder's unless given.

        Raises:
            ValueError: if the preset cannot be read, or the backbone is an encoder-decoder already.

        >>> decoder = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
        >>> backbone = LlamaSeq2SeqBackbone.from_decoder(decoder)
        >>> len(backbone.encoder_blocks), len(backbone.blocks)
        (2, 2)
        """
        if isinstance(decoder, cls):
            raise invalid("`decoder` must be a decoder-only LLaMA.", decoder=cls.__name__)
        if not isinstance(decoder, LlamaBackbone):
            decoder = LlamaBackbone.from_preset(decoder, dtype=dtype)
        own = dataclasses.asdict(decoder.config) | {"causal": True, "share_embeddings": share_embeddings}
        own |= {} if dropout is None else {"dropout": dropout}
        with no_random_weights():
            backbone = cls(**own, dtype=dtype or decoder.dtype_policy)
        sources = {variable.path: variable for variable in decoder.weights}
        for variable in backbone.weights:
            path = variable.path.removeprefix("encoder_").replace("cross_attention", "attention")
            backend.copy(sources[path], variable)
        return backbone

    @classmethod
    def from_preset(cls, preset, dtype=None):
        """The backbone of a folder that `LlamaSeq2SeqLM.save_to_preset` wrote.

        Args:
            preset: the folder, or `hf://org/name`.
            dtype: as `LlamaBackbone.from_preset` takes it.

        Raises:
            ValueError: if it cannot be read, or is not an encoder-decoder.
        """
        from keras_llama.checkpoints import loader, presets

        return loader.build_backbone(presets.open_checkpoint(preset), dtype, load_weights=True, cls=cls)
