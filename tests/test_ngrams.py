"""NgramEmbedding and backbones that have one."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama.ngrams import NgramEmbedding, hashed


@pytest.fixture
def ids(rng):
    return rng.integers(1, 60_000, (3, 9)).astype("int32")


def test_buckets_are_those_of_the_formula(ids):
    """In NumPy's int32, which goes round as every backend's does."""
    mask = np.ones_like(ids)
    mask[1, 6:], mask[2, 4:] = 0, 2
    wanted = np.zeros((2, *ids.shape), "int32")
    with np.errstate(over="ignore"):
        for row in range(len(ids)):
            for t in range(ids.shape[1]):
                code = ids[row, t]
                for before in (1, 2):
                    seen = t >= before and mask[row, t - before] == mask[row, t]
                    code = np.int32(code) * np.int32(16_777_619) + (ids[row, t - before] + 1 if seen else 0)
                    wanted[before - 1, row, t] = code % 1000
    found = [ops.convert_to_numpy(x) for x in hashed(ids, mask, 1000)]
    inside = mask > 0
    for got, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got[inside], expected[inside])
    assert (np.array(found) >= 0).all()


def test_a_vector_is_the_sum_of_those_of_its_buckets(ids):
    mask = np.ones_like(ids)
    layer = NgramEmbedding(buckets=50, width=8)
    found = ops.convert_to_numpy(layer(ids, mask))
    table = ops.convert_to_numpy(layer.embeddings)
    pairs, triples = (ops.convert_to_numpy(x) for x in hashed(ids, mask, 50))
    np.testing.assert_allclose(found, table[pairs] + table[triples], atol=1e-6)


def test_other_texts_and_padding_change_nothing(make_backbone, rng):
    """Packed and padded on the right equal alone."""
    backbone = make_backbone(ngram_buckets=40, causal=False)
    one, other = (rng.integers(1, 60, (1, n)).astype("int32") for n in (5, 4))
    alone = backbone.predict({"token_ids": other, "padding_mask": np.ones_like(other)}, verbose=0)
    row = np.concatenate([one, other, np.full((1, 2), 7, "int32")], axis=1)
    mask = np.array([[1] * 5 + [2] * 4 + [0] * 2], "int32")
    packed = backbone.predict({"token_ids": row, "padding_mask": mask}, verbose=0)
    np.testing.assert_allclose(packed[:, 5:9], alone, atol=1e-5)


def test_it_sees_the_order_of_tokens_and_nothing_later(make_backbone):
    backbone = make_backbone(ngram_buckets=10_000)
    ids = np.array([[5, 6, 7, 8], [5, 6, 7, 9]], "int32")
    hidden = backbone.predict({"token_ids": ids, "padding_mask": np.ones_like(ids)}, verbose=0)
    np.testing.assert_allclose(hidden[0, :3], hidden[1, :3], atol=1e-6)
    assert np.abs(hidden[0, 3] - hidden[1, 3]).max() > 1e-2


def test_without_the_last_norm_hidden_states_are_the_stream(make_backbone, tmp_path, rng):
    with_norm, without = (make_backbone(final_norm=norm) for norm in (True, False))
    for weight in without.weights:
        value = next(w for w in with_norm.weights if w.path == weight.path)
        weight.assign(ops.convert_to_numpy(value))  # on JAX predict gives its arrays away: models must not share them
    ids = rng.integers(1, 60, (2, 5)).astype("int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    stream = without.predict(inputs, verbose=0)
    scale = next(ops.convert_to_numpy(w) for w in with_norm.weights if w.path == "final_norm/scale")
    normed = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + with_norm.config.layer_norm_epsilon) * scale
    np.testing.assert_allclose(normed, with_norm.predict(inputs, verbose=0), atol=1e-5)
    assert len(without.weights) == len(with_norm.weights) - 1
    model = keras_llama.LlamaTextClassifier(without, num_classes=2)
    model.save_to_preset(tmp_path / "preset")
    again = keras_llama.LlamaTextClassifier.from_preset(tmp_path / "preset")
    np.testing.assert_allclose(again.predict(ids, verbose=0), model.predict(ids, verbose=0), atol=1e-6)


def test_a_language_model_without_the_last_norm_is_none_that_others_know(make_backbone, tmp_path):
    lm = keras_llama.LlamaCausalLM(make_backbone(final_norm=False), None, {"eos_token_id": []})
    with pytest.raises(ValueError, match="know no model without a last norm"):
        keras_llama.save_checkpoint(lm, tmp_path / "out", format="hf")
    lm.save_to_preset(tmp_path / "preset")
    assert '"model_type": "keras_llama"' in (tmp_path / "preset" / "config.json").read_text()


def test_files_keep_it(make_backbone, tmp_path, rng):
    model = keras_llama.LlamaTextClassifier(make_backbone(ngram_buckets=40, causal=False), num_classes=2)
    ids = rng.integers(1, 60, (2, 5)).astype("int32")
    expected = model.predict(ids, verbose=0)
    model.save(tmp_path / "model.keras")
    assert np.array_equal(keras.saving.load_model(tmp_path / "model.keras").predict(ids, verbose=0), expected)
    model.save_to_preset(tmp_path / "preset")
    again = keras_llama.LlamaTextClassifier.from_preset(tmp_path / "preset")
    assert again.backbone.config.ngram_buckets == 40
    np.testing.assert_allclose(again.predict(ids, verbose=0), expected, atol=1e-6)
    assert '"model_type": "keras_llama"' in (tmp_path / "preset" / "config.json").read_text()  # others would not see it


def test_it_does_not_generate(make_backbone):
    lm = keras_llama.LlamaCausalLM(make_backbone(ngram_buckets=40), None, {"eos_token_id": []})
    with pytest.raises(ValueError, match=r"without n-grams.*ngram_buckets=40"):
        lm.generate([[5, 6]], max_new_tokens=2)


@pytest.mark.parametrize("buckets", [-1, 1.5, True, "many"])
def test_bad_buckets_are_refused(make_backbone, buckets):
    with pytest.raises(ValueError, match="`ngram_buckets` must be an integer of at least 0"):
        make_backbone(ngram_buckets=buckets)


def test_llama_cpp_knows_none(make_backbone, tmp_path):
    lm = keras_llama.LlamaCausalLM(make_backbone(ngram_buckets=40), None, {"eos_token_id": []})
    with pytest.raises(ValueError, match="know no n-gram embeddings"):
        keras_llama.save_checkpoint(lm, tmp_path / "model.gguf", format="gguf")
    assert not list(tmp_path.iterdir())
