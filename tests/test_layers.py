"""Every layer round-trips through its configuration and computes the same with the same weights."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama.factory import MaskPadding, PaddingMask
from keras_llama.heads.text_classifier import Pooling

ATTENTION = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
LAYERS = [
    keras_llama.LlamaPositions(head_dim=6, rope_scaling={"rope_type": "linear", "factor": 2.0}, causal=False),
    keras_llama.LlamaAttention(**ATTENTION, use_bias=True),
    keras_llama.LlamaMLP(intermediate_dim=20, use_bias=True),
    keras_llama.LlamaBlock(**ATTENTION, intermediate_dim=20, layer_norm_epsilon=1e-3, mlp_bias=True, dropout=0.2),
    keras_llama.LlamaBlock(**ATTENTION, intermediate_dim=20, attention_bias=True, dtype="mixed_bfloat16"),
    Pooling("mean"),
    PaddingMask(),
    MaskPadding(),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_round_trip(layer):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    assert again.dtype_policy == layer.dtype_policy


@pytest.mark.parametrize("layer", LAYERS[1:4], ids=lambda layer: type(layer).__name__)
def test_weights_carry_the_whole_state(layer, rng):
    x = ops.convert_to_tensor(rng.normal(size=(2, 5, 24)).astype("float32"))
    ones = ops.ones((2, 5), "int32")
    angles = () if isinstance(layer, keras_llama.LlamaMLP) else keras_llama.LlamaPositions(head_dim=6)(ones, ones)
    again = type(layer).from_config(layer.get_config())
    outputs = [one(x, *angles) for one in (layer, again)]
    again.set_weights(layer.get_weights())
    first, second = (
        np.concatenate([ops.convert_to_numpy(t).ravel() for t in keras.tree.flatten(out)])
        for out in (outputs[0], again(x, *angles))
    )
    assert np.array_equal(first, second)


def test_names_of_the_weights():
    """Checkpoints, adapters and sharding name them: they are a contract."""
    backbone = keras_llama.LlamaBackbone(vocabulary_size=10, **{**keras_llama.size("tiny"), "num_layers": 1})
    assert [v.path for v in backbone.variables] == [
        "token_embedding/embeddings",
        "block_0/attention_norm/scale",
        "block_0/attention/query/kernel",
        "block_0/attention/key/kernel",
        "block_0/attention/value/kernel",
        "block_0/attention/attention_output/kernel",
        "block_0/mlp_norm/scale",
        "block_0/mlp/gate/kernel",
        "block_0/mlp/up/kernel",
        "block_0/mlp/down/kernel",
        "final_norm/scale",
    ]
    assert all(len(v.shape) <= 2 for v in backbone.variables)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras_llama.LlamaPositions(head_dim=7), "`head_dim` must be even"),
        (
            lambda: keras_llama.LlamaAttention(num_query_heads=3, num_key_value_heads=2, head_dim=8),
            "must be divisible",
        ),
        (
            lambda: keras_llama.LlamaBlock(num_query_heads=0, num_key_value_heads=1, head_dim=8, intermediate_dim=8),
            "`num_query_heads` must be a positive integer",
        ),
    ],
)
def test_layers_refuse_heads_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_block_takes_float32_under_mixed_precision():
    ones = np.ones((1, 3), "int32")
    angles = keras_llama.LlamaPositions(head_dim=4)(ones, ones)
    options = {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_dim": 16}
    x, _ = keras_llama.LlamaBlock(**options, dtype="mixed_bfloat16")(np.ones((1, 3, 8), "float32"), *angles)
    assert keras.backend.standardize_dtype(x.dtype) == "bfloat16"
