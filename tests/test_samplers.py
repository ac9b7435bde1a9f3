"""Samplers against Transformers' logits processors, on fixed logits."""

import numpy as np
import pytest
import torch
import transformers
from keras import ops

from keras_llama.samplers import Settings, choose, draw, keep_likely, penalize

LOGITS = (np.random.default_rng(0).normal(size=(4, 60)) * 3).astype("float32")


def tensors(settings):
    return Settings(*(ops.convert_to_tensor(value) for value in settings.checked()))


def distribution(**settings):
    """The probabilities that are sampled from, (B, V)."""
    settings = tensors(Settings(**settings))
    kept = keep_likely(ops.convert_to_tensor(LOGITS) / settings.temperature, settings)
    return ops.convert_to_numpy(ops.softmax(kept, axis=-1))


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"temperature": 0.7}, [transformers.TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [transformers.TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_k": 1000}, [transformers.TopKLogitsWarper(60)]),
        ({"temperature": 1.0, "top_p": 0.8}, [transformers.TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "top_p": 0.01}, [transformers.TopPLogitsWarper(0.01)]),
        ({"temperature": 1.0, "min_p": 0.1}, [transformers.MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [
                transformers.TemperatureLogitsWarper(1.7),
                transformers.TopKLogitsWarper(20),
                transformers.TopPLogitsWarper(0.9),
                transformers.MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_the_filtered_distribution_is_transformers(settings, processors):
    expected = transformers.LogitsProcessorList(processors)(None, torch.tensor(LOGITS)).softmax(-1).numpy()
    found = distribution(**settings)
    assert np.array_equal(found > 0, expected > 0)
    assert np.abs(found - expected).max() < 1e-6


def test_the_repetition_penalty_is_transformers():
    ids = np.random.default_rng(1).integers(0, 60, (4, 9))
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(LOGITS)).numpy()
    seen = np.zeros(LOGITS.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    found = penalize(ops.convert_to_tensor(LOGITS), ops.convert_to_tensor(seen), 1.3)
    assert np.abs(ops.convert_to_numpy(found) - expected).max() < 1e-6


def test_draws_follow_the_distribution():
    wanted = distribution(temperature=1.0, top_k=4)[0]
    uniform = (np.arange(4000, dtype="float32") + 0.5) / 4000
    logits = np.repeat(np.where(wanted > 0, np.log(np.maximum(wanted, 1e-30)), -np.inf)[None], 4000, axis=0)
    ids = ops.convert_to_numpy(draw(ops.convert_to_tensor(logits), ops.convert_to_tensor(uniform)))
    found = np.bincount(ids, minlength=60) / 4000
    assert np.abs(found - wanted).max() < 1e-3


@pytest.mark.parametrize("uniform", [0.0, 0.99999994])
def test_the_ends_of_the_unit_interval_draw_tokens_that_are_kept(uniform):
    settings = tensors(Settings(temperature=1.0, top_k=3))
    kept = keep_likely(ops.convert_to_tensor(LOGITS), settings)
    ids = ops.convert_to_numpy(draw(kept, ops.convert_to_tensor(np.full(4, uniform, "float32"))))
    assert np.isfinite(np.take_along_axis(ops.convert_to_numpy(kept), ids[:, None], axis=1)).all()


def test_temperature_zero_takes_the_most_likely_whatever_the_number():
    nothing = ops.zeros(LOGITS.shape, "bool")
    for uniform in (0.0, 0.7):
        number = ops.convert_to_tensor(np.full(4, uniform, "float32"))
        ids = choose(ops.convert_to_tensor(LOGITS), nothing, tensors(Settings()), number)
        assert ops.convert_to_numpy(ids).tolist() == LOGITS.argmax(axis=1).tolist()


@pytest.mark.plain
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 1.01},
        {"top_p": 0},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=rf"`{next(iter(wrong))}` must.*Received: {next(iter(wrong))}="):
        Settings(**wrong).checked()
