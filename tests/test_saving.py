"""Saved here, loaded in a fresh process after `import keras_llama`: bit-equal, the optimiser included."""

import pathlib

import keras
import numpy as np
import pytest

import keras_llama

LOAD = """
import sys, numpy as np, keras, keras_llama
folder = sys.argv[1]
given = np.load(folder + "/inputs.npz")
inputs = {key: given[key] for key in ("token_ids", "padding_mask")}
for name in sys.argv[2:]:
    if name.endswith(".weights.h5"):
        model = keras_llama.LlamaBackbone(vocabulary_size=30, **{**keras_llama.size("tiny"), "num_layers": 1})
        model.load_weights(f"{folder}/{name}")
    else:
        model = keras.saving.load_model(f"{folder}/{name}")
    np.save(f"{folder}/{name}.npy", model.predict(inputs, verbose=0))
    if name in ("classifier.keras", "tied.keras"):
        keras.utils.set_random_seed(1)
        y = None if isinstance(model, keras_llama.LlamaCausalLM) else given["y"]
        np.save(f"{folder}/{name}.losses.npy", model.fit(inputs, y, epochs=2, shuffle=False, verbose=0).history["loss"])
"""


@pytest.fixture
def inputs(tmp_path, rng):
    ids = rng.integers(1, 30, (4, 9)).astype("int32")
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    np.savez(tmp_path / "inputs.npz", token_ids=ids, padding_mask=mask, y=[0, 1, 1, 0])
    return {"token_ids": ids, "padding_mask": mask}


SMALL = {**keras_llama.size("tiny"), "num_layers": 1}


def backbone(**changes):
    return keras_llama.LlamaBackbone(vocabulary_size=30, **SMALL, **changes)


@pytest.mark.xla
def test_everything_comes_back_bit_equal_and_goes_on_training_where_it_was(tmp_path, inputs, run_python):
    """Backbone, classifier, tied and untied language model; the next losses depend on the optimiser's state."""
    models = {
        "backbone.keras": backbone(),
        "classifier.keras": keras_llama.LlamaTextClassifier(backbone(), num_classes=2),
        "tied.keras": keras_llama.LlamaCausalLM(backbone(tie_word_embeddings=True)),
        "untied.keras": keras_llama.LlamaCausalLM(backbone()),
    }
    expected, losses = {}, {}
    for name, model in models.items():
        y = np.array([0, 1, 1, 0]) if "classifier" in name else None
        trained = name in ("classifier.keras", "tied.keras")
        if trained:
            model.compile()
            model.fit(inputs, y, epochs=3, verbose=0)
        expected[name] = model.predict(inputs, verbose=0)
        model.save(tmp_path / name)
        if trained:
            keras.utils.set_random_seed(1)
            losses[name] = model.fit(inputs, y, epochs=2, shuffle=False, verbose=0).history["loss"]
    models["backbone.keras"].save_weights(tmp_path / "backbone.weights.h5")
    expected["backbone.weights.h5"] = expected["backbone.keras"]
    run_python(LOAD, tmp_path, *expected)
    for name, outputs in expected.items():
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), outputs), name
    for name, values in losses.items():
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.losses.npy"), values, rtol=1e-6)


def test_another_backend_loads_it(tmp_path, inputs, run_python):
    """Each writes for one of the others, and reads what another wrote."""
    other = {"tensorflow": "jax", "jax": "torch", "torch": "tensorflow"}[keras.config.backend()]
    model = keras_llama.LlamaTextClassifier(backbone(), num_classes=2)
    expected = model.predict(inputs, verbose=0)
    model.save(tmp_path / "model.keras")
    run_python(LOAD, tmp_path, "model.keras", backend=other)
    np.testing.assert_allclose(np.load(tmp_path / "model.keras.npy"), expected, atol=1e-5)


@pytest.mark.plain
def test_the_vocabulary_travels_inside(tmp_path, tokenizer):
    preprocessor = keras_llama.TextPreprocessor(tokenizer, sequence_length=24, add_eos=True)
    model = keras_llama.LlamaTextClassifier(
        keras_llama.LlamaBackbone(vocabulary_size=tokenizer.vocabulary_size, **keras_llama.size("tiny")),
        labels=["bad", "good"],
        preprocessor=preprocessor,
    )
    texts = ["a good film", "很差的电影"]
    expected = model.predict(texts, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(again.predict(texts, verbose=0), expected)
    assert (again.preprocessor.add_eos, again.preprocessor.sequence_length, again.labels) == (True, 24, ["bad", "good"])


@pytest.mark.plain
def test_a_task_refuses_h5(tmp_path):
    model = keras_llama.LlamaTextClassifier(backbone(), num_classes=2)
    with pytest.raises(ValueError, match=r"must end in \.keras"):
        model.save(tmp_path / "model.h5")


@pytest.mark.plain
def test_an_interrupted_save_leaves_the_former_file(tmp_path, monkeypatch):
    model = keras_llama.LlamaTextClassifier(backbone(), num_classes=2)
    path = tmp_path / "model.keras"
    model.save(path)
    before = path.read_bytes()

    def fail(self, place, *args, **kwargs):
        pathlib.Path(place).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(keras.Model, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]


@pytest.mark.plain
def test_overwrite_false_keeps_an_existing_file(tmp_path):
    model = keras_llama.LlamaTextClassifier(backbone(), num_classes=2)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="must not exist"):
        model.save(tmp_path / "model.keras", overwrite=False)
