"""create_llama_model with everything that a plain Keras model is used for."""

import keras
import numpy as np
import pytest

import keras_llama

ONE_HOT = "categorical_crossentropy"


def test_without_arguments_it_is_a_language_model_of_probabilities():
    model = keras_llama.create_llama_model()
    assert model.output_shape == (None, None, 10_000)
    found = model.predict(np.array([[5, 6, 0]]), verbose=0)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "optimizer", "loss"),
    [
        pytest.param("language_model", "adam", ONE_HOT, marks=pytest.mark.plain),
        pytest.param("language_model", "sgd", "sparse_categorical_crossentropy", marks=pytest.mark.plain),
        pytest.param("classification", "sgd", ONE_HOT, marks=pytest.mark.plain),
        ("classification", keras.optimizers.AdamW, "sparse_categorical_crossentropy"),
        pytest.param("regression", "adam", "mse", marks=pytest.mark.plain),
        pytest.param("regression", "sgd", "mse", marks=pytest.mark.plain),
    ],
)
def test_compile_fit_evaluate_predict(rng, task, optimizer, loss):
    classes = 3 if task == "classification" else None
    model = keras_llama.create_llama_model(task, vocabulary_size=20, num_classes=classes)
    x = rng.integers(1, 20, (12, 6))
    x[::2, 4:] = 0
    y = {"language_model": np.roll(x, -1, 1), "classification": x[:, 0] % 3, "regression": x[:, 0] / 20.0}[task]
    if loss == ONE_HOT:
        y = np.eye(20 if task == "language_model" else 3)[y]
    optimizer = optimizer if isinstance(optimizer, str) else optimizer(1e-3)
    model.compile(optimizer=optimizer, loss=loss, metrics=["mae"] if task == "regression" else ["accuracy"])
    history = model.fit(x, y, epochs=10, batch_size=4, validation_data=(x, y), verbose=0).history
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert np.isfinite(model.evaluate(x, y, verbose=0)).all()
    assert model.predict(x, verbose=0).shape == (12, *model.compute_output_shape((12, 6))[1:])


@pytest.mark.plain
def test_it_learns(rng):
    model = keras_llama.create_llama_model("classification", vocabulary_size=20, num_classes=2, sequence_length=8)
    x, y = rng.integers(2, 19, (64, 8)), np.arange(64) % 2
    x[:, 3] = np.where(y == 1, 19, 1)  # one token tells the class
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=10, verbose=0)
    assert model.evaluate(x, y, verbose=0)[1] == 1.0


@pytest.mark.parametrize("task", ["language_model", "classification", "regression"])
@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.plain)])
def test_padding_changes_nothing(rng, task, side):
    model = keras_llama.create_llama_model(
        task, vocabulary_size=20, num_classes=2 if task == "classification" else None
    )
    x = rng.integers(1, 20, (3, 5))
    pad = ((0, 0), (4, 0) if side == "left" else (0, 4))
    found = model.predict(np.pad(x, pad), verbose=0)
    if task == "language_model":
        found = found[:, 4:] if side == "left" else found[:, :5]
    np.testing.assert_allclose(found, model.predict(x, verbose=0), atol=1e-5)


@pytest.mark.parametrize("loss", [ONE_HOT, "sparse_categorical_crossentropy"])
def test_loss_and_accuracy_are_means_over_real_tokens(rng, loss):
    model = keras_llama.create_llama_model(vocabulary_size=20)
    model.compile("adam", loss, metrics=["accuracy"])
    x, y = rng.integers(1, 20, (2, 3, 5))
    pad = ((0, 0), (7, 0))
    targets = [np.eye(20)[t] if loss == ONE_HOT else t for t in (y, np.pad(y, pad))]
    tight = model.evaluate(x, targets[0], verbose=0)
    assert model.evaluate(np.pad(x, pad), targets[1], verbose=0) == pytest.approx(tight, rel=1e-5)


LOAD = """
import sys, numpy as np, keras, keras_llama
x = np.load("x.npy")
for name in sys.argv[1:]:
    model = keras.models.load_model(name)
    np.save(name + ".npy", model.predict(x, verbose=0))
    print(name, type(model.optimizer).__name__, int(model.optimizer.iterations))
"""


@pytest.mark.long
@pytest.mark.slow
def test_saved_as_h5_and_keras_and_loaded_in_a_fresh_process(tmp_path, run_python, rng, monkeypatch):
    """Both formats, one after the other, each task; the optimiser comes back too."""
    monkeypatch.chdir(tmp_path)
    x = rng.integers(0, 20, (4, 6))
    np.save("x.npy", x)
    expected = {}
    for task, loss, y in (
        ("language_model", "sparse_categorical_crossentropy", x),
        ("classification", "categorical_crossentropy", np.eye(2)[x[:, 0] % 2]),
        ("regression", "mse", x[:, 0] / 20),
    ):
        classes = 2 if task == "classification" else None
        model = keras_llama.create_llama_model(task, vocabulary_size=20, num_classes=classes)
        model.compile("adam", loss, metrics=["accuracy"])
        model.fit(x, y, epochs=2, verbose=0)
        for name in (f"{task}.h5", f"{task}.keras"):
            model.save(name)
            expected[name] = model.predict(x, verbose=0)
    printed = run_python(LOAD, *expected, cwd=tmp_path)
    assert printed.split() == [word for name in expected for word in (name, "Adam", "2")]
    for name, outputs in expected.items():
        assert np.array_equal(np.load(f"{name}.npy"), outputs)


def test_outputs_are_float32_under_any_policy():
    for policy in ("mixed_bfloat16", "mixed_float16", "bfloat16"):
        model = keras_llama.create_llama_model("classification", vocabulary_size=9, num_classes=2, dtype=policy)
        assert model.predict(np.ones((1, 3), int), verbose=0).dtype == "float32"


BAD = {
    "task": ({"task": "poetry"}, "`task` must be one of"),
    "size": ({"size": "huge"}, "`size` must be one of"),
    "sequence_length": ({"sequence_length": 0}, "`sequence_length` must be"),
    "num_classes": ({"task": "classification"}, "`num_classes` must be"),
    "one class": ({"task": "classification", "num_classes": 1}, "at least 2"),
    "vocabulary_size": ({"vocabulary_size": 0}, "`vocabulary_size` must be"),
    "dropout": ({"dropout": 2}, "`dropout` must lie"),
    "pooling": ({"task": "regression", "pooling": "max"}, "`pooling` must be"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD)
def test_refuses_bad_arguments(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        keras_llama.create_llama_model(**options)


@pytest.mark.plain
def test_ids_and_classes_out_of_range_are_refused_before_training():
    model = keras_llama.create_llama_model("classification", vocabulary_size=20, num_classes=2)
    model.compile("adam", "sparse_categorical_crossentropy")
    good, classes = np.array([[1, 19]] * 4), np.array([0, 1] * 2)
    for ids in (np.array([[1, 20]] * 4), np.array([[1, -1]] * 4)):
        for run in (lambda ids=ids: model.fit(ids, classes), lambda ids=ids: model.predict(ids)):
            with pytest.raises(ValueError, match="`x` must hold numbers from 0 to 19"):
                run()
    with pytest.raises(ValueError, match="`y` must hold numbers from 0 to 1"):
        model.fit(good, np.array([5] * 4))
    with pytest.raises(ValueError, match="`y` must hold"):
        model.evaluate(good, [0, 1, 2, 0])


def test_float16_scales_the_loss():
    model = keras_llama.create_llama_model(vocabulary_size=20, dtype="mixed_float16")
    model.compile("adam", "mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
