"""LlamaClassifierEnsemble: the mean of its members' probabilities, in every way out."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama

TEXTS = ["a good film", "很差的电影", "what a bad film it is"]


@pytest.fixture
def member(tokenizer, make_backbone):
    def make(name, **changes):
        backbone = make_backbone(vocabulary_size=tokenizer.vocabulary_size, causal=False)
        for variable in backbone.variables:
            if "scale" not in variable.path:
                shift = np.random.default_rng(sum(map(ord, name))).normal(0, 0.2, variable.shape)
                variable.assign(variable + shift)
        preprocessor = keras_llama.TextPreprocessor(tokenizer, sequence_length=16)
        options = {"labels": ["bad", "good"], "preprocessor": preprocessor, "name": name, **changes}
        return keras_llama.LlamaTextClassifier(backbone, **options)

    return make


def mean(members, function):
    return np.mean([ops.convert_to_numpy(function(m.predict(TEXTS, verbose=0))) for m in members], axis=0)


@pytest.mark.plain
@pytest.mark.parametrize(("problem", "function"), [("single", ops.softmax), ("multi", ops.sigmoid)])
def test_it_answers_with_the_mean_of_the_probabilities(member, problem, function):
    members = [member(name, problem_type=problem) for name in "abc"]
    ensemble = keras_llama.LlamaClassifierEnsemble(members)
    found = ops.convert_to_numpy(ensemble.probabilities(ensemble.predict(TEXTS, verbose=0)))
    expected = mean(members, function)
    assert np.ptp([m.predict(TEXTS, verbose=0) for m in members], axis=0).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if problem == "single":
        assert [row["label"] for row in ensemble.classify(TEXTS)] == [["bad", "good"][i] for i in expected.argmax(1)]


@pytest.mark.plain
def test_numbers_are_averaged(member):
    members = [member(name, problem_type="regression") for name in "ab"]
    found = keras_llama.LlamaClassifierEnsemble(members).predict(TEXTS, verbose=0)
    np.testing.assert_allclose(found, mean(members, lambda x: x), atol=1e-5)


@pytest.mark.plain
def test_it_is_saved_whole(member, tmp_path):
    ensemble = keras_llama.LlamaClassifierEnsemble([member("a"), member("b")])
    expected = ensemble.predict(TEXTS, verbose=0)
    ensemble.save(tmp_path / "ensemble.keras")
    again = keras.saving.load_model(tmp_path / "ensemble.keras")
    assert np.array_equal(again.predict(TEXTS, verbose=0), expected)
    assert [m.name for m in again.members] == ["a", "b"]


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="TensorFlow writes SavedModels")
def test_it_is_exported_with_its_vocabulary(member, tmp_path):
    import tensorflow as tf

    ensemble = keras_llama.LlamaClassifierEnsemble([member("a"), member("b")])
    ensemble.export(tmp_path / "served")
    answer = tf.saved_model.load(str(tmp_path / "served")).signatures["classify"](tf.constant(TEXTS))
    expected = ops.softmax(ensemble.predict(TEXTS, verbose=0))
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)


@pytest.mark.plain
def test_all_members_are_trained_by_fit(member):
    ensemble = keras_llama.LlamaClassifierEnsemble([member("a"), member("b", r_drop=0.5)])
    assert ensemble.r_drop == 0.5
    ensemble.compile()
    before = [m.get_weights() for m in ensemble.members]
    ensemble.fit(TEXTS, ["good", "bad", "bad"], verbose=0)
    for m, weights in zip(ensemble.members, before, strict=True):
        assert not np.array_equal(m.get_weights()[0], weights[0])
        assert not np.array_equal(m.get_weights()[-1], weights[-1])


@pytest.mark.plain
def test_members_that_do_not_go_together_are_refused(member):
    with pytest.raises(ValueError, match="at least two classifiers"):
        keras_llama.LlamaClassifierEnsemble([member("a")])
    with pytest.raises(ValueError, match=r"different names.*Received: names=\['a', 'a'\]"):
        keras_llama.LlamaClassifierEnsemble([member("a"), member("a")])
    for change in ({"labels": ["good", "bad"]}, {"problem_type": "multi"}, {"preprocessor": None}):
        with pytest.raises(ValueError, match="same labels, problem type and vocabulary"):
            keras_llama.LlamaClassifierEnsemble([member("a"), member("b", **change)])


def test_members_are_adapted_each_alone(member, tmp_path):
    ensemble = keras_llama.LlamaClassifierEnsemble([member("a"), member("b")])
    ensemble.members[0].enable_lora(rank=2)
    for call in (
        lambda: ensemble.add_adapter("more", ["block_0/mlp/up"], rank=2, alpha=4),
        lambda: ensemble.set_adapter(None),
        ensemble.merge_lora,
        lambda: keras_llama.save_checkpoint(ensemble, tmp_path / "adapter", format="peft"),
    ):
        with pytest.raises(ValueError, match=r"each alone.*Received: members=\['a', 'b'\]"):
            call()
    assert ensemble.members[0].active_adapter == "default"
    assert not list(tmp_path.iterdir())


@pytest.mark.plain
def test_it_has_no_preset(member, tmp_path):
    ensemble = keras_llama.LlamaClassifierEnsemble([member("a"), member("b")])
    with pytest.raises(ValueError, match="no layout of Hugging Face"):
        ensemble.save_to_preset(tmp_path / "preset")
    assert not list(tmp_path.iterdir())
