"""What the heads over the vocabulary share: the graph from hidden states to logits, and the stop set.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import Any

import keras

from keras_llama.layers import kernel_initializer


def add_head(backbone):
    """Logits float32 (B, T, V) on top of a backbone's graph, and the layer that makes them of hidden states (.., D).

    It is the embedding in reverse, or a layer `lm_head` of its own, as `tie_word_embeddings` says.
    """
    if backbone.config.tie_word_embeddings:
        to_logits = functools.partial(backbone.token_embedding, reverse=True)
    else:
        to_logits = keras.layers.Dense(
            backbone.config.vocabulary_size,
            use_bias=False,
            kernel_initializer=kernel_initializer(),
            dtype=backbone.dtype_policy,
            name="lm_head",
        )
    logits = to_logits(backbone(backbone.input))
    return keras.layers.Activation("linear", dtype="float32", name="logits")(logits), to_logits


def stop_ids(generation_config: Mapping[str, Any], preprocessor: Any) -> set[int]:
    """Token ids that end a generated text: those of `generation_config`, else the tokenizer's end."""
    given = generation_config.get("eos_token_id")
    if given is None:
        given = [] if preprocessor is None else [preprocessor.tokenizer.eos_id]
    return {int(i) for i in (given if isinstance(given, (list, tuple)) else [given]) if i >= 0}


def generation_options(checkpoint, preprocessor) -> dict[str, Any]:
    """A checkpoint's defaults; its stop set is joined by the tokenizer's own end and the chat template's."""
    generation = dict(checkpoint.generation)
    stops = set(generation.get("eos_token_id", ()))
    if preprocessor is not None:
        stops |= {preprocessor.tokenizer.eos_id, preprocessor.tokenizer.turn_end_id} - {-1, None}
    return {"generation_config": {**generation, "eos_token_id": sorted(stops)}}


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_settings(settings: dict[str, Any], generation_config: Mapping[str, Any], stops: set[int]):
    """What a checkpoint says of generation, added to the settings of a task."""
    generation = {**generation_config, "eos_token_id": sorted(stops)}
    ids = {name: generation[name] for name in _IDS if generation.get(name) not in (None, [])}
    fields = {**settings["fields"], **ids}
    return {**settings, "fields": fields, "generation": {name: v for name, v in generation.items() if v != []}}
