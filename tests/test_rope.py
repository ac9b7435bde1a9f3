"""Rotary embedding against Transformers' tables and against the rotation written out."""

import keras
import numpy as np
import pytest
import reference
import torch
from keras import ops
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from keras_llama.config import rope_options
from keras_llama.rope import inverse_frequencies, rotary_angles, rotate

SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {**reference.LLAMA3, "original_max_position_embeddings": 8192},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 4096},
    "yarn_explicit": {"factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.3},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_angles_at_near_and_far_positions(name, theta):
    rope = {"rope_type": name.split("_")[0], **SCALINGS[name]}
    config = reference.hf_config(
        head_dim=64, max_position_embeddings=131_072, rope_parameters={**rope, "rope_theta": theta}
    )
    positions = np.array([[0, 1, 1_000, 9_000, 100_000]])
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1, 5, 64), torch.tensor(positions))
    ours = rotary_angles(positions, *inverse_frequencies(64, theta, rope_options(rope)))
    for mine, reference_value in zip(ours, theirs, strict=True):
        assert np.abs(ops.convert_to_numpy(mine) - reference_value.numpy()[..., :32]).max() <= 2e-6


def test_rotation_turns_pairs_of_features(rng):
    x = rng.normal(size=(1, 3, 2, 4)).astype("float32")
    frequencies, _ = inverse_frequencies(4)
    positions = np.array([[0, 1, 5]])
    found = ops.convert_to_numpy(rotate(ops.convert_to_tensor(x), *rotary_angles(positions, frequencies)))
    pairs = x[..., :2] + 1j * x[..., 2:]
    turned = pairs * np.exp(1j * positions[0][:, None, None] * frequencies)
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rotation_is_computed_in_float32(rng, dtype):
    """In half precision position 60,000 would not even be a number of its own."""
    x = ops.cast(rng.normal(size=(1, 1, 1, 8)), dtype)
    angles = rotary_angles(np.array([[60_001]]), *inverse_frequencies(8))
    assert all(keras.backend.standardize_dtype(angle.dtype) == "float32" for angle in angles)
    exact = ops.convert_to_numpy(rotate(ops.cast(x, "float32"), *angles))
    found = rotate(x, *angles)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    rounded = ops.convert_to_numpy(ops.cast(ops.cast(exact, dtype), "float32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(found, "float32")), rounded)
