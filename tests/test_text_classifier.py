"""LlamaTextClassifier: pooling by the mask, targets of every kind, strings in, and what it refuses."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama

TEXTS = ["a good film", "a bad film", "很好的电影", "很差的电影", "what a good film it is", "bad"] * 4
LABELS = ["good", "bad", "good", "bad", "good", "bad"] * 4


@pytest.fixture
def make(tokenizer):
    def make(length=24, **options):
        backbone = keras_llama.LlamaBackbone(
            vocabulary_size=tokenizer.vocabulary_size,
            **{**keras_llama.size("tiny"), "num_layers": 1},
            causal=options.pop("causal", True),
        )
        preprocessor = keras_llama.TextPreprocessor(tokenizer, length)
        return keras_llama.LlamaTextClassifier(backbone, preprocessor=preprocessor, **options)

    return make


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_its_id_change_nothing(make_backbone, rng, pooling, causal):
    """No, left or right padding of any length, filled with the id that ends and stands inside the text."""
    model = keras_llama.LlamaTextClassifier(make_backbone(causal=causal), num_classes=3, pooling=pooling)
    text = np.array([5, 2, 17, 40, 2])  # id 2 inside the text and at its end
    found = []
    for left, right in ((0, 0), (3, 0), (0, 4), (5, 2), (0, 40)):
        ids = np.pad(text, (left, right), constant_values=2)[None]
        mask = np.pad(np.ones(5, int), (left, right))[None]
        found.append(model.predict({"token_ids": ids, "padding_mask": mask}, verbose=0))
    assert np.abs(np.concatenate(found) - found[0]).max() <= 1e-5
    other = model.predict(np.array([[5, 2, 17, 40, 3]]), verbose=0)
    assert np.abs(other - found[0]).max() > 1e-3  # the last token counts


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_row_of_padding_alone_gives_finite_logits(make_backbone, pooling):
    model = keras_llama.LlamaTextClassifier(make_backbone(), num_classes=2, pooling=pooling)
    logits = model.predict({"token_ids": np.zeros((1, 4), int), "padding_mask": np.zeros((1, 4), int)}, verbose=0)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(("pooling", "causal"), [("last", True), pytest.param("mean", False, marks=pytest.mark.plain)])
def test_learns_from_raw_strings(make, pooling, causal):
    model = make(labels=["bad", "good"], pooling=pooling, causal=causal)
    model.compile()
    history = model.fit(TEXTS, LABELS, epochs=8, batch_size=8, validation_split=0.25, verbose=0).history
    assert history["val_accuracy"][-1] == 1.0
    assert model.evaluate(TEXTS, LABELS, return_dict=True, verbose=0)["accuracy"] == 1.0
    assert [row["label"] for row in model.classify(TEXTS)] == LABELS
    single = model.classify("a good film")
    assert single["label"] == "good"
    assert 0.5 < single["score"] <= 1


@pytest.mark.plain
def test_lists_arrays_and_streams_train_alike(make):
    class Stream(keras.utils.PyDataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return TEXTS[4 * i : 4 * i + 4], LABELS[4 * i : 4 * i + 4]

    losses = []
    for x, y in (
        (TEXTS, LABELS),
        (np.array(TEXTS), np.array(LABELS)),
        (tuple(TEXTS), [int(n == "good") for n in LABELS]),
    ):
        keras.utils.set_random_seed(0)
        model = make(labels=["bad", "good"])
        model.compile()
        losses.append(model.fit(x, y, epochs=2, batch_size=4, verbose=0).history["loss"])
    assert losses[0] == losses[1] == losses[2]
    model.fit(Stream(), epochs=5, validation_data=Stream(), verbose=0)
    assert model.evaluate(Stream(), verbose=0, return_dict=True)["accuracy"] == 1.0
    np.testing.assert_allclose(model.predict(Stream(), verbose=0), model.predict(TEXTS, verbose=0), atol=1e-5)


@pytest.mark.parametrize("workers", [1, 3])
def test_truncation_in_a_stream_is_told_once(make, workers):
    started = []

    class Stream(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return ["a good film and much more of it", "bad"], [1, 0]

        def start(self, epoch):
            started.append(epoch)

    model = make(length=5, num_classes=2)
    model.compile()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.fit(Stream(workers=workers), epochs=3, verbose=0)
    assert started == [0, 1, 2, 3]
    messages = [str(one.message) for one in told if "texts are longer" in str(one.message)]
    assert len(messages) == 1
    assert messages[0].startswith("2 of 4 texts")


def test_predictions_come_in_the_order_of_the_texts(make):
    model = make(num_classes=2)
    texts = ["a " * n + "film" for n in (9, 1, 5, 2, 8, 3)]
    together = model.predict(texts, batch_size=2, verbose=0)
    alone = np.concatenate([model.predict([text], verbose=0) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.plain
def test_multi_label(make):
    model = make(labels=["good", "film"], problem_type="multi")
    names = [["good", "film"], ["film"], ["good"], [], ["good", "film"], []] * 4
    model.compile(metrics=["accuracy"])
    hits = (model.predict(TEXTS, verbose=0) > 0) == [["good" in n, "film" in n] for n in names]  # 1/2 is a logit of 0
    assert model.evaluate(TEXTS, names, return_dict=True, verbose=0)["accuracy"] == pytest.approx(hits.mean())
    model.fit(TEXTS, names, epochs=12, batch_size=8, verbose=0)
    assert model.evaluate(TEXTS, names, return_dict=True, verbose=0)["accuracy"] == 1.0
    rows = np.array([["good" in n, "film" in n] for n in names], "float32")
    assert model.evaluate(TEXTS, rows, return_dict=True, verbose=0)["accuracy"] == 1.0
    assert [row["labels"] for row in model.classify(TEXTS)] == names
    assert all(score >= 0.5 for row in model.classify(TEXTS) for score in row["scores"])


@pytest.mark.plain
@pytest.mark.parametrize("form", [lambda m: m, lambda m: [m], lambda m: {"score": m}, lambda m: {"score": [m]}])
@pytest.mark.parametrize("kind", [str, keras.metrics.SparseCategoricalAccuracy])
def test_metrics_are_taken_in_each_form_that_keras_knows(make, form, kind):
    model = make(labels=["bad", "good"])
    model.compile(metrics=form("accuracy" if kind is str else kind(name="accuracy")))
    hits = [row["label"] == label for row, label in zip(model.classify(TEXTS), LABELS, strict=True)]
    assert model.evaluate(TEXTS, LABELS, return_dict=True, verbose=0)["accuracy"] == pytest.approx(np.mean(hits))


@pytest.mark.plain
def test_regression(make):
    model = make(problem_type="regression")
    stars = [5.0, 1.0, 5.0, 1.0, 5.0, 1.0] * 4
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    model.fit(TEXTS, stars, epochs=25, batch_size=8, verbose=0)
    assert model.evaluate(TEXTS, stars, return_dict=True, verbose=0)["mean_absolute_error"] < 0.5
    assert model.classify("a bad film")["score"] < 3 < model.classify("a good film")["score"]
    two = make(problem_type="regression", num_classes=2)
    two.compile("sgd", "mse")
    two.fit(TEXTS, np.ones((24, 2)), verbose=0)
    assert len(two.classify("bad")["score"]) == 2


@pytest.mark.plain
def test_string_losses_mean_logits(make):
    """Each loss by name on logits equals the loss on the probabilities of those logits."""
    model = make(labels=["bad", "good"])
    logits = model.predict(TEXTS, verbose=0)
    probabilities = ops.convert_to_numpy(ops.softmax(logits))
    numbers = np.array([int(label == "good") for label in LABELS])
    expected = -np.log(probabilities[np.arange(24), numbers]).mean()
    for loss, y in (
        ("sparse_categorical_crossentropy", numbers),
        ("categorical_crossentropy", np.eye(2)[numbers]),
        ("categorical_crossentropy", LABELS),
        ("sparse_categorical_crossentropy", np.eye(2)[numbers]),
        ("sparse_categorical_crossentropy", numbers[:, None]),
    ):
        model.compile("adam", loss, metrics=["accuracy"])
        found = model.evaluate(TEXTS, y, return_dict=True, verbose=0)
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["accuracy"] == pytest.approx((logits.argmax(-1) == numbers).mean(), abs=1e-6)


@pytest.mark.plain
def test_weights_of_rows_and_classes_count(make):
    model = make(labels=["bad", "good"])
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    # Each text stands once under the label that counts, three times under the other.
    model.fit(TEXTS, ["good"] * 6 + ["bad"] * 18, sample_weight=[1.0] * 6 + [0.0] * 18, epochs=10, verbose=0)
    assert [row["label"] for row in model.classify(TEXTS)] == ["good"] * 24
    model.fit(TEXTS, ["bad"] * 6 + ["good"] * 18, class_weight={0: 1.0, 1: 0.0}, epochs=20, verbose=0)
    assert [row["label"] for row in model.classify(TEXTS)] == ["bad"] * 24


@pytest.mark.parametrize("problem", ["single", pytest.param("multi", marks=pytest.mark.plain)])
def test_r_drop_adds_how_far_two_passes_are_apart(make, problem):
    """What `fit` reports before its first step, of a model that a rate of 0 never moves."""
    weights = make(labels=["bad", "good"], problem_type=problem).get_weights()

    def losses(r_drop, dropout):
        model = make(labels=["bad", "good"], dropout=dropout, r_drop=r_drop, problem_type=problem)
        model.set_weights(weights)
        model.compile(keras.optimizers.SGD(0.0), metrics=[])
        targets = LABELS if problem == "single" else [[label] for label in LABELS]
        fitted = model.fit(TEXTS, targets, batch_size=24, verbose=0).history["loss"][0]
        return fitted, model.evaluate(TEXTS, targets, batch_size=24, verbose=0)

    (plain, evaluated), (same, as_evaluated) = losses(0.0, 0.0), losses(100.0, 0.0)
    assert same == pytest.approx(plain, rel=1e-5)  # both passes are one without dropout
    assert as_evaluated == pytest.approx(evaluated, rel=1e-5)
    apart, as_evaluated = losses(100.0, 0.5)
    assert apart > 2 * losses(0.0, 0.5)[0]
    assert as_evaluated == pytest.approx(evaluated, rel=1e-5)


@pytest.mark.parametrize(("problem", "classes"), [("single", 3), ("multi", 2)])
def test_two_passes_weigh_rows_and_divergence_as_they_should(make, rng, monkeypatch, problem, classes):
    model = make(num_classes=classes, problem_type=problem, r_drop=0.7)
    model.compile()
    first, second = rng.normal(size=(2, 5, classes)).astype("float32")
    monkeypatch.setattr(type(model), "__call__", lambda self, x, training: ops.convert_to_tensor(second))
    y = np.arange(5) % 3 if problem == "single" else rng.integers(0, 2, (5, classes)).astype("float32")
    weights = np.array([1, 0, 2, 1, 1], "float32")
    shares = [np.asarray(ops.convert_to_numpy(model.probabilities(z)), "float64") for z in (first, second)]
    if problem == "single":
        entropies = [-np.log(p[np.arange(5), y]) for p in shares]
    else:  # each class is a choice between two; the loss is their mean
        entropies = [-np.log(np.where(y == 1, p, 1 - p)).mean(1) for p in shares]
        shares = [np.stack([p, 1 - p], axis=-1) for p in shares]
    p, q = (x.reshape(5, -1) for x in shares)
    apart = ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)) / 2 / (1 if problem == "single" else classes)
    expected = (weights * (sum(entropies) / 2 + 0.7 * apart)).sum() / 5
    found = model.compute_loss(None, y, ops.convert_to_tensor(first), weights, training=True)
    assert float(found) == pytest.approx(expected, rel=1e-5)


# On torch, jit_compile=True is torch.compile, which takes minutes for a training step.
JIT = keras.config.backend() != "torch"


@pytest.mark.parametrize(("policy", "jit"), [("mixed_bfloat16", False), ("mixed_float16", JIT)])
def test_trains_in_half_precision_with_and_without_jit(tokenizer, policy, jit):
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size, **{**keras_llama.size("tiny"), "num_layers": 1}, dtype=policy
    )
    model = keras_llama.LlamaTextClassifier(
        backbone, num_classes=2, preprocessor=keras_llama.TextPreprocessor(tokenizer, 24)
    )
    model.compile(jit_compile=jit)
    history = model.fit(TEXTS, [int(n == "good") for n in LABELS], epochs=6, batch_size=24, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < history["loss"][0]
    assert model.predict(TEXTS, verbose=0).dtype == "float32"
    assert {v.dtype for v in model.trainable_variables} == {"float32"}


def test_jit_setting_reaches_keras(make):
    model = make(num_classes=2)
    for given, backend, expected in ((True, None, True), (False, None, False), ("auto", "jax", True)):
        model.compile(jit_compile=given)
        if backend in (None, keras.config.backend()):
            assert model.jit_compile is expected
    with pytest.raises(ValueError, match="`jit_compile` must be"):
        model.compile(jit_compile="always")


BAD_OPTIONS = {
    "no classes": ({}, "`num_classes` must be an integer of at least 2"),
    "one class": ({"num_classes": 1}, "at least 2"),
    "one label": ({"labels": ["only"]}, "at least 2"),
    "labels and classes": ({"num_classes": 3, "labels": ["a", "b"]}, "`labels` must be distinct"),
    "more labels than classes": ({"num_classes": 2, "labels": ["a", "b", "c"]}, "one for each class.*num_classes=2"),
    "numbers as labels": ({"labels": [1, 2]}, "`labels` must be strings"),
    "a label twice": ({"labels": ["a", "a"]}, "`labels` must be distinct"),
    "problem type": ({"num_classes": 2, "problem_type": "many"}, "`problem_type` must be one of"),
    "a weight below 0": ({"num_classes": 2, "r_drop": -1}, "`r_drop` must be a number of at least 0"),
    "a weight of nothing": ({"num_classes": 2, "r_drop": None}, "`r_drop` must be a number"),
    "two passes of a regression": (
        {"problem_type": "regression", "r_drop": 1.0},
        "`r_drop` must be 0 for a regression",
    ),
    "pooling": ({"num_classes": 2, "pooling": "max"}, "`pooling` must be one of"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_refuses_bad_options(make, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        make(**options)


BAD_TARGETS = {
    "none": (None, "`y` must hold a target"),
    "too few": (LABELS[:3], "a row for each text.*texts=24, targets=3"),
    "an unknown label": (["good"] * 23 + ["fine"], r"`y\[23\]` must be one of `labels`.*label='fine'"),
    "a number too large": ([0, 2] * 12, r"`y\[1\]` must be a class from 0 to 1"),
    "a fraction": ([0, 0.5] * 12, r"`y\[1\]` must be a class"),
    "a missing label": (["good", None] * 12, r"`y\[1\]` must be a class"),
    "one class only": (["good"] * 24, "at least two classes"),
    "soft rows for a sparse loss": (np.full((24, 2), 0.5), "categorical_crossentropy"),
    "rows of another width": (np.zeros((24, 3)), "of shape"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_TARGETS)
def test_refuses_bad_targets_before_any_step(make, case):
    model = make(labels=["bad", "good"])
    model.compile()
    y, message = BAD_TARGETS[case]
    with pytest.raises(ValueError, match=message):
        model.fit(TEXTS, y, verbose=0)
    assert int(model.optimizer.iterations) == 0


@pytest.mark.plain
def test_one_class_may_be_evaluated(make):
    model = make(labels=["bad", "good"])
    model.compile()
    assert "accuracy" in model.evaluate(TEXTS, ["good"] * 24, return_dict=True, verbose=0)


BAD_TEXTS = ([], ["a", ""], ["a", None], ["a", 3], "a")


@pytest.mark.plain
@pytest.mark.parametrize("texts", BAD_TEXTS, ids=repr)
def test_refuses_bad_texts_everywhere(make, texts):
    model = make(num_classes=2)
    model.compile()
    rows = [0, 1]
    for call in (lambda: model.fit(texts, rows), lambda: model.evaluate(texts, rows), lambda: model.predict(texts)):
        with pytest.raises(ValueError, match=r"`x(\[1\])?` must"):
            call()
    if texts != "a":
        with pytest.raises(ValueError, match=r"`x(\[1\])?` must"):
            model.classify(texts)


@pytest.mark.plain
def test_refuses_a_vocabulary_larger_than_the_backbone(tokenizer):
    backbone = keras_llama.LlamaBackbone(vocabulary_size=50, **keras_llama.size("tiny"))
    with pytest.raises(ValueError, match=r"at least the tokenizer's.*vocabulary_size=50"):
        keras_llama.LlamaTextClassifier(
            backbone, num_classes=2, preprocessor=keras_llama.TextPreprocessor(tokenizer, 24)
        )


@pytest.mark.plain
def test_refuses_a_loss_on_probabilities(make):
    with pytest.raises(ValueError, match="from_logits=True"):
        make(num_classes=2).compile(loss=keras.losses.SparseCategoricalCrossentropy())


@pytest.mark.plain
def test_refuses_bad_sample_weights_and_splits(make):
    model = make(num_classes=2)
    model.compile()
    y = [0, 1] * 12
    with pytest.raises(ValueError, match="`sample_weight` must have shape"):
        model.fit(TEXTS, y, sample_weight=[1.0])
    with pytest.raises(ValueError, match="`validation_split` must"):
        model.fit(TEXTS, y, validation_split=1.5)
    for size in (0, -1, 2.5):
        for call in (model.predict, model.classify, model.features, lambda x, **size: model.fit(x, y, **size)):
            with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 1"):
                call(TEXTS, batch_size=size)


@pytest.mark.plain
def test_what_the_batches_of_a_dataset_hold_is_refused_beside_it(make):
    class Stream(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return TEXTS, LABELS

    model = make(labels=["bad", "good"])
    model.compile()
    for given in ({"y": LABELS}, {"sample_weight": np.ones(24)}, {"batch_size": 4}):
        for call in (model.fit, model.evaluate):
            with pytest.raises(ValueError, match=rf"`x` must come alone.*beside=\['{next(iter(given))}'\]"):
                call(Stream(), **given)
    with pytest.raises(ValueError, match="`validation_data` must come alone"):
        model.fit(TEXTS, LABELS, validation_data=(Stream(), LABELS))
    with pytest.raises(ValueError, match="`validation_data` must come alone"):
        model.fit(TEXTS, LABELS, validation_data=Stream(), validation_batch_size=4)
    with pytest.raises(ValueError, match="`x` must come alone"):
        model.predict(Stream(), batch_size=4)


@pytest.mark.plain
def test_validation_data_go_before_a_split_and_have_their_own_batch_size(make):
    class Counted(keras.callbacks.Callback):
        trained = validated = 0

        def on_train_batch_end(self, batch, logs=None):
            self.trained += 1

        def on_test_batch_end(self, batch, logs=None):
            self.validated += 1

    model, counted = make(labels=["bad", "good"]), Counted()
    model.compile()
    held = {"validation_split": 0.5, "validation_data": (TEXTS[:6], LABELS[:6]), "validation_batch_size": 2}
    model.fit(TEXTS, LABELS, batch_size=12, callbacks=counted, verbose=0, **held)
    assert (counted.trained, counted.validated) == (2, 3)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="of TensorFlow's datasets")
def test_a_tf_data_set_of_ones_own_is_taken_as_it_is(make_backbone, tmp_path):
    import tensorflow as tf

    classifier = keras_llama.LlamaTextClassifier(make_backbone(), num_classes=2)
    classifier.compile(keras.optimizers.SGD(1e-3))
    ids, labels = np.arange(1, 17, dtype="int32").reshape(8, 2), np.array([0, 1] * 4)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    dataset = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(4)
    expected = classifier.evaluate(ids, labels, verbose=0)
    assert classifier.evaluate(dataset, verbose=0) == pytest.approx(expected, rel=1e-5)
    history = classifier.fit(dataset, validation_data=dataset, epochs=2, verbose=0).history
    assert history["val_loss"][1] < history["val_loss"][0] < expected[0]
    with pytest.raises(ValueError, match="`resume` needs lists"):
        classifier.fit(dataset, resume=tmp_path)
    with pytest.raises(ValueError, match="`packing` needs texts"):
        classifier.fit(dataset, packing=True)
    with pytest.raises(ValueError, match="`x` must come alone"):
        classifier.fit(dataset, labels)
    with pytest.raises(ValueError, match="`validation_split` must"):
        classifier.fit(dataset, validation_split=0.5)


@pytest.mark.plain
def test_multi_label_rows_are_the_same_as_lists_and_as_an_array(make_backbone):
    classifier = keras_llama.LlamaTextClassifier(make_backbone(), labels=["x", "y"], problem_type="multi")
    rows = [[1, 0], [0, 1], [0, 0], [1, 1]]
    names = [["x"], ["y"], [], ["x", "y"]]
    for targets in (rows, np.array(rows), np.array(rows, "float32"), names):
        assert classifier.check_targets(targets, 4).tolist() == rows
    with pytest.raises(ValueError, match="shape"):
        classifier.check_targets([[1], [0, 1], [], [1]], 4)


LOSSES = [
    "sparse_categorical_crossentropy",
    "SparseCategoricalCrossentropy",
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
]


@pytest.mark.plain
@pytest.mark.parametrize("loss", LOSSES, ids=["name", "class name", "function", "object"])
def test_a_loss_is_of_logits_however_it_is_named(make_backbone, loss):
    classifier = keras_llama.LlamaTextClassifier(make_backbone(), num_classes=2)
    x, y = np.arange(1, 17).reshape(8, 2), np.array([0, 1] * 4)
    metrics = ["sparse_categorical_crossentropy"]
    classifier.compile(loss=loss, metrics=metrics, weighted_metrics=metrics)
    probabilities = keras.ops.convert_to_numpy(classifier.probabilities(classifier.predict(x, verbose=0)))
    expected = -np.log(probabilities[np.arange(8), y]).mean()
    found = classifier.evaluate(x, y, verbose=0)
    assert np.abs(np.array(found) - expected).max() < 1e-4


@pytest.mark.plain
def test_a_loss_of_probabilities_is_refused(make_backbone):
    classifier = keras_llama.LlamaTextClassifier(make_backbone(), num_classes=2)
    for loss in ("categorical_focal_crossentropy", keras.losses.binary_focal_crossentropy):
        with pytest.raises(ValueError, match="from_logits=True"):
            classifier.compile(loss=loss)


@pytest.mark.plain
def test_the_choice_of_xla_is_left_to_the_backend_that_loads(make_backbone, tmp_path, run_python):
    classifier = keras_llama.LlamaTextClassifier(make_backbone(), num_classes=2)
    classifier.compile()
    classifier.fit(np.ones((4, 3), int), [0, 1, 0, 1], verbose=0)
    classifier.save(tmp_path / "model.keras")
    backend = keras.config.backend()
    assert keras.saving.load_model(tmp_path / "model.keras").jit_compile == (backend == "jax")
    code = "import sys, keras, keras_llama; print(keras.saving.load_model(sys.argv[1]).jit_compile)"
    other, expected = ("torch", "False") if backend == "jax" else ("jax", "True")
    assert run_python(code, tmp_path / "model.keras", backend=other).strip() == expected


@pytest.mark.plain
@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_that_trains_nothing_is_refused(make_backbone, size):
    classifier = keras_llama.LlamaTextClassifier(make_backbone(), num_classes=2)
    classifier.compile()
    with pytest.raises(ValueError, match="batch_size"):
        classifier.fit(np.ones((4, 3), int), [0, 1, 0, 1], batch_size=size)


@pytest.mark.plain
def test_training_weights_in_half_precision_is_warned_of(make_backbone):
    classifier = keras_llama.LlamaTextClassifier(make_backbone(dtype="bfloat16"), num_classes=2)
    classifier.compile()
    with warnings.catch_warnings(record=True) as caught:  # other libraries warn of themselves
        warnings.simplefilter("always")
        classifier.fit(np.ones((4, 3), int), [0, 1, 0, 1], verbose=0)
    assert any("loses small updates" in str(warning.message) for warning in caught)
