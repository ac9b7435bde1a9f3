"""Saved here, loaded in a fresh process after `import keras_llama`: bit-equal, the optimiser included."""

import keras
import numpy as np
import pytest

import keras_llama

LOAD = """
import sys, numpy as np, keras, keras_llama
path, inputs, outputs = sys.argv[1:]
model = keras.saving.load_model(path)
given = np.load(inputs)
data = {key: given[key] for key in given.files if key != "y"}
np.save(outputs, model.predict(data, verbose=0))
if "y" in given.files or isinstance(model, keras_llama.LlamaCausalLM):
    keras.utils.set_random_seed(1)
    target = given["y"] if "y" in given.files else None
    print(repr(model.fit(data, target, epochs=2, shuffle=False, verbose=0).history["loss"]))
"""
WEIGHTS = """
import sys, numpy as np, keras, keras_llama
path, inputs, outputs = sys.argv[1:]
backbone = keras_llama.LlamaBackbone(vocabulary_size=30, **keras_llama.size("tiny"))
backbone.load_weights(path)
given = np.load(inputs)
np.save(outputs, backbone.predict({key: given[key] for key in ("token_ids", "padding_mask")}, verbose=0))
"""


@pytest.fixture
def files(tmp_path, rng):
    ids = rng.integers(1, 30, (4, 9)).astype("int32")
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"token_ids": ids, "padding_mask": mask}
    np.savez(tmp_path / "inputs.npz", **inputs)
    np.savez(tmp_path / "labelled.npz", **inputs, y=np.array([0, 1, 1, 0]))
    return tmp_path, inputs


def backbone(**changes):
    return keras_llama.LlamaBackbone(vocabulary_size=30, **keras_llama.size("tiny"), **changes)


def test_backbone_as_keras_and_as_weights(files, run_python):
    folder, inputs = files
    model = backbone()
    expected = model.predict(inputs, verbose=0)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    for code, name in ((LOAD, "model.keras"), (WEIGHTS, "model.weights.h5")):
        run_python(code, folder / name, folder / "inputs.npz", folder / "out.npy")
        assert np.array_equal(np.load(folder / "out.npy"), expected)


def continued(model, inputs, y=None):
    """Losses of two more epochs: they depend on the optimiser's state."""
    keras.utils.set_random_seed(1)
    return model.fit(inputs, y, epochs=2, shuffle=False, verbose=0).history["loss"]


def test_classifier_continues_training_where_it_was_saved(files, run_python):
    folder, inputs = files
    model = keras_llama.LlamaTextClassifier(backbone(), num_classes=2)
    model.compile()
    y = np.array([0, 1, 1, 0])
    model.fit(inputs, y, epochs=3, verbose=0)
    expected = model.predict(inputs, verbose=0)
    model.save(folder / "model.keras")
    printed = run_python(LOAD, folder / "model.keras", folder / "labelled.npz", folder / "out.npy")
    assert np.array_equal(np.load(folder / "out.npy"), expected)
    np.testing.assert_allclose(eval(printed.splitlines()[-1]), continued(model, inputs, y), rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_causal_lm_continues_training_where_it_was_saved(files, run_python, tied):
    folder, inputs = files
    model = keras_llama.LlamaCausalLM(backbone(tie_word_embeddings=tied))
    model.compile()
    model.fit(inputs, epochs=3, verbose=0)
    expected = model.predict(inputs, verbose=0)
    model.save(folder / "model.keras")
    printed = run_python(LOAD, folder / "model.keras", folder / "inputs.npz", folder / "out.npy")
    assert np.array_equal(np.load(folder / "out.npy"), expected)
    np.testing.assert_allclose(eval(printed.splitlines()[-1]), continued(model, inputs), rtol=1e-6)


@pytest.mark.parametrize("other", ["tensorflow", "jax", "torch"])
def test_another_backend_loads_it(files, run_python, other):
    folder, inputs = files
    model = keras_llama.LlamaTextClassifier(backbone(), num_classes=2)
    expected = model.predict(inputs, verbose=0)
    model.save(folder / "model.keras")
    run_python(LOAD, folder / "model.keras", folder / "inputs.npz", folder / "out.npy", backend=other)
    np.testing.assert_allclose(np.load(folder / "out.npy"), expected, atol=1e-5)


def test_the_vocabulary_travels_inside(files, tokenizer, run_python):
    folder, _ = files
    preprocessor = keras_llama.TextPreprocessor(tokenizer, sequence_length=24, add_eos=True)
    model = keras_llama.LlamaTextClassifier(
        keras_llama.LlamaBackbone(vocabulary_size=tokenizer.vocabulary_size, **keras_llama.size("tiny")),
        labels=["bad", "good"],
        preprocessor=preprocessor,
    )
    texts = ["a good film", "很差的电影"]
    expected = model.predict(texts, verbose=0)
    model.save(folder / "model.keras")
    code = "import sys, keras, keras_llama; m = keras.saving.load_model(sys.argv[1]);" + (
        f"print(m.predict({texts!r}, verbose=0).tolist(), m.preprocessor.add_eos, m.labels)"
    )
    assert run_python(code, folder / "model.keras").strip().endswith(f"{expected.tolist()} True ['bad', 'good']")


def test_a_task_refuses_h5(tmp_path):
    model = keras_llama.LlamaTextClassifier(backbone(), num_classes=2)
    with pytest.raises(ValueError, match=r"must end in \.keras"):
        model.save(tmp_path / "model.h5")


def test_an_interrupted_save_leaves_the_former_file(tmp_path, monkeypatch):
    model = keras_llama.LlamaTextClassifier(backbone(), num_classes=2)
    path = tmp_path / "model.keras"
    model.save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        (tmp_path / ".model.unfinished.keras").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(keras.Model, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]


def test_overwrite_false_keeps_an_existing_file(tmp_path):
    model = keras_llama.LlamaTextClassifier(backbone(), num_classes=2)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="must not exist"):
        model.save(tmp_path / "model.keras", overwrite=False)
