"""KerasHub's LLaMA backbones, presets and tokenizers as a source."""

import numpy as np
import pytest
from keras import ops

import keras_llama

keras_hub = pytest.importorskip("keras_hub")

SIZES = {
    "vocabulary_size": 60,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
}
LLAMA3 = {
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 16,
}
INPUTS = {
    "token_ids": np.random.default_rng(0).integers(1, 60, (2, 40)).astype("int32"),
    "padding_mask": np.ones((2, 40), "int32"),
}


def make(cls=keras_hub.models.Llama3Backbone, **options):
    backbone = cls(**SIZES, **options)
    generator = np.random.default_rng(1)
    for variable in backbone.weights:
        noise = generator.normal(0, 0.2, variable.shape)
        variable.assign(noise + 1 if "norm" in variable.path else noise)
    return backbone


@pytest.mark.parametrize(
    "options",
    [
        LLAMA3,
        *(
            pytest.param(options, marks=pytest.mark.plain)
            for options in (
                {},
                {"tie_word_embeddings": True},
                {"rope_max_wavelength": 500_000, "layer_norm_epsilon": 1e-5},
                {"cls": keras_hub.models.LlamaBackbone},
            )
        ),
    ],
)
def test_hidden_states_are_those_of_kerashub(options):
    theirs = make(**options)
    ours = keras_llama.LlamaBackbone.from_preset(theirs)
    expected = ops.convert_to_numpy(theirs(INPUTS))
    assert np.abs(ops.convert_to_numpy(ours(INPUTS)) - expected).max() <= 1e-4
    lm = keras_llama.LlamaCausalLM.from_preset(theirs)
    logits = ops.convert_to_numpy(theirs.token_embedding(ops.convert_to_tensor(expected), reverse=True))
    assert np.abs(ops.convert_to_numpy(lm(INPUTS)) - logits).max() <= 1e-4


@pytest.mark.plain
def test_a_preset_directory_with_a_byte_pair_tokenizer(tmp_path):
    tokens = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    words = ["a", "b", "c", "Ġ", "ab", "Ġc"]
    tokenizer = keras_hub.models.Llama3Tokenizer(
        vocabulary={token: i for i, token in enumerate(words + tokens)}, merges=["a b", "Ġ c"]
    )
    make().save_to_preset(tmp_path)
    tokenizer.save_to_preset(tmp_path)
    lm = keras_llama.LlamaCausalLM.from_preset(tmp_path)
    assert lm.preprocessor.tokenizer.encode(["ab c"]) == [[4, 5]]
    assert lm.stop_ids == {7, 8}
    assert lm.generate("ab c", 3, stop=None, strip_prompt=True) is not None


@pytest.mark.plain
def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="rope_position_scaling_factor=4"):
        keras_llama.LlamaBackbone.from_preset(make(rope_position_scaling_factor=4.0))
    with pytest.raises(ValueError, match="Llama3Backbone"):
        keras_llama.LlamaBackbone.from_preset(42)
