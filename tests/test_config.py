"""LlamaConfig: what it derives, and what it refuses by name."""

import dataclasses

import pytest

import keras_llama
from keras_llama.config import SIZES, LlamaConfig, rope_options

pytestmark = pytest.mark.plain
GOOD = {"vocabulary_size": 100, **SIZES["tiny"]}


def test_derives_head_dim_and_keeps_an_explicit_one():
    assert LlamaConfig(**GOOD).head_dim == 32
    assert LlamaConfig(**GOOD, head_dim=10).head_dim == 10


def test_a_whole_number_becomes_a_real_one():
    """GGUF files name the type of a number, and llama.cpp takes no integer as rotary base."""
    base = LlamaConfig(vocabulary_size=9, **keras_llama.size("tiny"), rope_max_wavelength=500_000)
    assert isinstance(base.rope_max_wavelength, float)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LlamaConfig(**GOOD).num_layers = 3


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_have_the_parameters_they_say(name):
    named = {"tiny": "0.3m", "small": "3m", "base": "30m"}.get(name, name)
    c = LlamaConfig(vocabulary_size=1, **keras_llama.size(name))
    heads = 2 * (c.num_query_heads + c.num_key_value_heads) * c.head_dim
    blocks = c.num_layers * c.hidden_dim * (heads + 3 * c.intermediate_dim + 2)
    said = float(named[:-1]) * {"m": 1e6, "b": 1e9}[named[-1]]
    assert abs(blocks / said - 1) < 0.2


BAD = {
    "vocabulary_size": 0,
    "num_layers": 0,
    "num_query_heads": -1,
    "num_key_value_heads": 3,
    "hidden_dim": 130,
    "intermediate_dim": 2.5,
    "head_dim": 7,
    "rope_max_wavelength": 0,
    "layer_norm_epsilon": float("nan"),
    "dropout": 1.0,
    "tie_word_embeddings": "yes",
    "attention_bias": 1,
    "mlp_bias": None,
    "causal": "no",
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_a_bad_value_by_name(name):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: .*{name}="):
        LlamaConfig(**{**GOOD, name: BAD[name]})


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="`num_query_heads` must be divisible by `num_key_value_heads`"):
        LlamaConfig(**{**GOOD, "num_key_value_heads": 3})


def test_backbone_refuses_as_the_config_does():
    with pytest.raises(ValueError, match="`head_dim` must be even"):
        keras_llama.LlamaBackbone(**GOOD, head_dim=7)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", None])
def test_refuses_other_scalings_by_name(kind):
    with pytest.raises(ValueError, match=rf"rope_type.*Received: .*{kind}"):
        rope_options({"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear"}, r"Missing: \['factor'\]"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, r"Unknown: \['beta_fast'\]"),
        ({"rope_type": "linear", "factor": -1.0}, "`factor` must be a positive number"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "one `rope_type`"),
        ("linear", "must be a dict or None"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "high_freq_factor > low_freq_factor",
        ),
    ],
)
def test_refuses_bad_scaling_options(scaling, message):
    with pytest.raises(ValueError, match=message):
        rope_options(scaling)


def test_scaling_in_both_spellings():
    assert rope_options({"type": "linear", "factor": 2.0}) == rope_options({"rope_type": "linear", "factor": 2.0})
    assert rope_options({"rope_type": "default"}) is None


def test_refuses_an_unknown_size():
    with pytest.raises(ValueError, match="`size` must be one of"):
        keras_llama.size("enormous")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": None},
        {"rope_type": "linear", "factor": True},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": None},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "truncate": 1},
    ],
)
def test_an_option_of_a_scaling_is_none_only_where_none_means_something(scaling):
    with pytest.raises(ValueError, match="must be"):
        keras_llama.LlamaConfig(**keras_llama.size("tiny"), vocabulary_size=10, rope_scaling=scaling)


@pytest.mark.parametrize("length", [0, -1, 2.5, True])
def test_a_context_is_a_positive_number_of_tokens(length):
    with pytest.raises(ValueError, match="context_length"):
        keras_llama.LlamaConfig(**keras_llama.size("tiny"), vocabulary_size=10, context_length=length)
