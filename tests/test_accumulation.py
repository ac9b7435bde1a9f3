"""Gradient accumulation: several steps train as one of all their tokens, however these are spread."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama.accumulation import weighing

RNG = np.random.default_rng(0)
ROWS = [RNG.integers(1, 60, n) for n in (3, 12, 5, 9, 11, 2)]
IDS = np.stack([np.pad(row, (0, 12 - len(row))) for row in ROWS])
MASK = np.stack([np.pad(np.ones(len(row), int), (0, 12 - len(row))) for row in ROWS])


def trained(make, batch_size, epochs=2, idle=0, **options):
    """The model, and its weights, after `epochs` over the rows, of which the first `idle` count nothing."""
    keras.utils.set_random_seed(0)
    model = keras_llama.LlamaCausalLM(make(num_layers=1, tie_word_embeddings=True))
    model.compile(keras.optimizers.SGD(0.5, momentum=0.9, global_clipnorm=0.1, **options))
    inputs, counted = {"token_ids": IDS, "padding_mask": MASK}, (np.arange(6) >= idle).astype("float32")
    model.fit(inputs, sample_weight=counted, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
    return model, [ops.convert_to_numpy(v) for v in model.trainable_variables]


@pytest.mark.parametrize("idle", [0, pytest.param(2, marks=pytest.mark.plain)])
def test_steps_of_a_group_count_by_their_tokens(make_backbone, tmp_path, idle):
    _, expected = trained(make_backbone, 6, idle=idle)
    model, found = trained(make_backbone, 2, idle=idle, gradient_accumulation_steps=3)
    _, untouched = trained(make_backbone, 6, epochs=0)
    for one, other, before in zip(found, expected, untouched, strict=True):
        assert np.abs(one - other).max() <= 1e-5 < np.abs(other - before).max()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [float(v) for v in loaded.optimizer.variables if v.shape == ()] == pytest.approx(
        [float(v) for v in model.optimizer.variables if v.shape == ()]
    )


def test_variables_may_be_frozen_later(make_backbone):
    model = keras_llama.LlamaCausalLM(make_backbone(tie_word_embeddings=True))
    model.compile(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2))
    model.optimizer.build(model.trainable_variables)
    trained, frozen = model.trainable_variables[-1], model.trainable_variables[0]
    before = [ops.convert_to_numpy(v) for v in (trained, frozen)]
    for size in (1.0, 4.0):
        with weighing(ops.convert_to_tensor(size)):
            model.optimizer.apply([ops.full(trained.shape, size)], [trained])
    # Weights 1 and 4 of gradients 1 and 4.
    np.testing.assert_allclose(ops.convert_to_numpy(trained), before[0] - 17 / 5, atol=1e-5)
    np.testing.assert_array_equal(ops.convert_to_numpy(frozen), before[1])


def test_a_custom_loop_without_weights_is_keras_own(make_backbone):
    model = keras_llama.LlamaCausalLM(make_backbone(tie_word_embeddings=True))
    model.compile(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2))
    before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    for size in (1.0, 3.0):
        model.optimizer.apply([ops.full(v.shape, size) for v in before], model.trainable_variables)
    for variable, old in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(variable), old - 2.0, atol=1e-5)
