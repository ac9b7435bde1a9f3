"""A head trained alone: vectors computed once, the same numbers as a frozen backbone in `fit`, and what is refused."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama

IDS = np.random.default_rng(0).integers(1, 60, (24, 9)).astype("int32")
LABELS = IDS[:, 0] % 3


@pytest.fixture
def make(make_backbone):
    def make(**options):
        classifier = keras_llama.LlamaTextClassifier(make_backbone(), num_classes=3, **options)
        classifier.get_layer("score").kernel.assign(np.random.default_rng(2).normal(0, 0.1, (32, 3)))
        classifier.compile(keras.optimizers.Adam(1e-2), metrics=["accuracy"])
        return classifier

    return make


def test_features_are_what_the_head_reads(make):
    classifier = make()
    vectors = classifier.features(IDS)
    assert vectors.shape == (24, 32)
    logits = vectors @ ops.convert_to_numpy(classifier.get_layer("score").kernel)
    np.testing.assert_allclose(logits, classifier.predict(IDS, verbose=0), atol=1e-5)


@pytest.mark.plain
def test_features_of_ragged_texts_keep_their_order(tokenizer):
    texts = ["a good film", "bad", "what a good film it is", "a"]
    backbone = keras_llama.LlamaBackbone(vocabulary_size=300, **keras_llama.size("tiny"))
    classifier = keras_llama.LlamaTextClassifier(
        backbone, num_classes=2, preprocessor=keras_llama.TextPreprocessor(tokenizer, 24)
    )
    alone = np.concatenate([classifier.features([text]) for text in texts])
    np.testing.assert_allclose(classifier.features(texts, batch_size=2), alone, atol=1e-5)


def test_it_is_training_with_a_frozen_base(make):
    alone, whole = make(), make()
    weights = np.linspace(0.5, 2, 24)
    options = {"batch_size": 24, "epochs": 4, "verbose": 0, "validation_data": (IDS[:6], LABELS[:6])}
    whole.freeze_base()
    expected = whole.fit(IDS, LABELS, sample_weight=weights, **options).history
    # Beside `validation_data` a split is none, as in Keras.
    found = alone.fit_head(IDS, LABELS, sample_weight=weights, validation_split=0.5, **options).history
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(*(model.predict(IDS, verbose=0) for model in (alone, whole)), atol=1e-4)
    assert [weight.path for weight in alone.trainable_weights] == ["score/kernel"]


def test_the_backbone_is_computed_once(make, monkeypatch):
    classifier, asked = make(), []
    call = keras_llama.LlamaBlock.call
    monkeypatch.setattr(keras_llama.LlamaBlock, "call", lambda *args, **kw: asked.append(1) or call(*args, **kw))
    classifier.freeze_base()
    classifier.features(IDS[:2])
    once = len(asked)
    classifier.fit_head(IDS, LABELS, epochs=5, verbose=0)
    assert len(asked) <= 3 * once  # one batch, which TensorFlow and JAX trace


@pytest.mark.plain
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_train_a_head_as_their_texts_do(make_backbone, dtype):
    models = [keras_llama.LlamaTextClassifier(make_backbone(dtype=dtype), num_classes=3) for _ in range(2)]
    for model in models:
        model.get_layer("score").kernel.assign(np.random.default_rng(2).normal(0, 0.1, (32, 3)))
        model.compile(keras.optimizers.Adam(1e-2))
    vectors, options = models[0].features(IDS), {"batch_size": 24, "epochs": 4, "verbose": 0}
    found = models[0].fit_head(vectors, LABELS, validation_data=(vectors[:6], LABELS[:6]), **options).history
    expected = models[1].fit_head(IDS, LABELS, validation_data=(IDS[:6], LABELS[:6]), **options).history
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)
    with pytest.raises(ValueError, match=r"`x` must hold vectors of shape \(24, 32\)"):
        models[0].fit_head(vectors[:, :5], LABELS)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(x, marks=pytest.mark.plain) for x in ("mixed_bfloat16", "mixed_float16"))]
)
def test_a_head_on_a_base_of_half_precision_is_trained(make_backbone, dtype):
    classifier = keras_llama.LlamaTextClassifier(make_backbone(dtype=dtype), num_classes=3)
    classifier.compile(keras.optimizers.AdamW(1e-2))
    losses = classifier.fit_head(IDS, LABELS, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert classifier.get_layer("score").kernel.dtype == "float32"


@pytest.mark.plain
def test_adapters_and_losses_of_ones_own(make):
    classifier = make()
    classifier.enable_lora(rank=2)
    for weight in classifier.trainable_weights:
        weight.assign(np.random.default_rng(0).normal(0, 0.1, weight.shape))

    def loss(y_true, y_pred):
        return ops.mean(ops.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True))

    classifier.compile(keras.optimizers.Adam(1e-2), loss=loss)
    classifier.fit(IDS, LABELS, verbose=0)  # an optimiser with its state
    before = classifier.features(IDS)
    losses = classifier.fit_head(IDS, LABELS, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(classifier.features(IDS), before)
    assert [weight.path for weight in classifier.trainable_weights] == ["score/kernel"]


@pytest.mark.plain
def test_a_file_keeps_what_is_frozen(make, tmp_path):
    classifier = make()
    classifier.fit_head(IDS, LABELS, epochs=2, verbose=0)
    classifier.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [weight.path for weight in loaded.trainable_weights] == ["score/kernel"]
    goes_on = [task.fit_head(IDS, LABELS, shuffle=False, verbose=0).history["loss"] for task in (classifier, loaded)]
    np.testing.assert_allclose(*goes_on, rtol=1e-5)
    loaded.unfreeze_base()
    assert len(loaded.trainable_weights) == len(loaded.weights)
    loaded.fit(IDS, LABELS, verbose=0)


@pytest.mark.plain
def test_what_it_does_not_take_is_refused(make, make_backbone, tmp_path):
    class Source(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return IDS, LABELS

    classifier = make()
    trainable = len(classifier.trainable_weights)
    with pytest.raises(ValueError, match=r"in memory.*Received: x='Source'"):
        classifier.fit_head(Source(), None)
    with pytest.raises(ValueError, match="a target for each text"):
        classifier.fit_head(IDS, None)
    with pytest.raises(ValueError, match="at least two classes"):
        classifier.fit_head(IDS, [1] * 24)
    with pytest.raises(ValueError, match="validation_data"):
        classifier.fit_head(IDS, LABELS, validation_data=(IDS + 60, LABELS))
    with pytest.raises(ValueError, match=r"`validation_data` must be .* in memory"):
        classifier.fit_head(IDS, LABELS, validation_data=Source())
    with pytest.raises(ValueError, match=r"no such options.*Received: options=\['resume'\]"):
        classifier.fit_head(IDS, LABELS, resume=tmp_path)
    assert len(classifier.trainable_weights) == trainable
    classifier.r_drop = 1.0
    with pytest.raises(ValueError, match=r"`fit_head` makes one pass.*Received: r_drop=1.0"):
        classifier.fit_head(IDS, LABELS)
    classifier.r_drop = 0.0
    with pytest.raises(ValueError, match="`batch_size` must be"):
        classifier.fit_head(np.ones((24, 32)), LABELS, batch_size=0)
    fresh = keras_llama.LlamaTextClassifier(make_backbone(), num_classes=3)
    for train in (fresh.fit_head, lambda *data: fresh.fit(*data, resume=tmp_path)):
        with pytest.raises(ValueError, match="must be compiled"):
            train(IDS, LABELS)
    with pytest.raises(ValueError, match=r"head of its own.*Received: head='lm_head'"):
        keras_llama.LlamaCausalLM(make_backbone()).freeze_base()
    named = [keras_llama.LlamaTextClassifier(make_backbone(), num_classes=3, name=name) for name in ("first", "second")]
    with pytest.raises(ValueError, match=r"each alone.*Received: members=\['first', 'second'\]"):
        keras_llama.LlamaClassifierEnsemble(named).fit_head(IDS, LABELS)
