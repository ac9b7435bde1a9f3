"""NgramEmbedding and backbones that have one."""

import itertools
from collections import Counter

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama.ngrams import NgramEmbedding, codes, frequent


@pytest.fixture
def ids(rng):
    return rng.integers(1, 60_000, (3, 9)).astype("int32")


@pytest.fixture
def knowing(make_backbone):
    """A backbone that knows every second n-gram of the ids 0 to 8."""

    def make(**options):
        rows = [list(pair) for pair in itertools.product(range(9), repeat=2)]
        listed = frequent(rows, least=1)[::2]
        backbone = make_backbone(num_ngrams=len(listed), **options)
        backbone.ngram_embedding.know(listed)
        return backbone

    return make


def test_codes_are_those_of_the_formula(ids):
    """In NumPy's int32, which goes round as every backend's does."""
    mask = np.ones_like(ids)
    mask[1, 6:], mask[2, 4:] = 0, 2
    wanted = np.zeros((*ids.shape, 3), "int32")
    with np.errstate(over="ignore"):
        for row in range(len(ids)):
            for t in range(ids.shape[1]):
                code = np.int32(ids[row, t]) * np.int32(16_777_619) + np.int32(1)
                wanted[row, t, 0] = code
                for before in (1, 2):
                    seen = t >= before and mask[row, t - before] == mask[row, t]
                    code = np.int32(code) * np.int32(16_777_619) + (ids[row, t - before] + 1 if seen else 0)
                    wanted[row, t, before] = code
    found = ops.convert_to_numpy(codes(ids, mask))
    np.testing.assert_array_equal(found[mask > 0], wanted[mask > 0])


@pytest.mark.plain
@pytest.mark.parametrize("least", [1, 2, 3])
def test_what_is_frequent(least):
    rows = [[5, 6, 7, 6], [6, 7], [7]]
    counted = Counter()
    for row in rows:
        padded = [None, None, *row]
        counted.update(tuple(padded[t + 3 - n : t + 3]) for t in range(len(row)) for n in (1, 2, 3))
    found = frequent(rows, least=least)
    assert len(found) == sum(count >= least for count in counted.values())
    assert (np.diff(found.astype("int64")) > 0).all()


def test_a_vector_is_the_sum_of_those_on_the_list(rng):
    ids = rng.integers(0, 9, (3, 7)).astype("int32")
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    characters = np.array([0, 1, 2, 3, 4, 4, 3, 2, 1])
    listed = frequent([row.tolist() for row in ids], characters, least=2)
    layer = NgramEmbedding(vocabulary_size=9, length=len(listed), width=8)
    layer.know(listed, characters)
    table = ops.convert_to_numpy(layer.embeddings)
    where = {code: i for i, code in enumerate(listed.tolist())}
    wanted = np.zeros((*ids.shape, 8))
    found = ops.convert_to_numpy(codes(characters[ids], mask))
    for place in np.ndindex(found.shape):
        if int(found[place]) in where:
            wanted[place[:2]] += table[where[int(found[place])]]
    assert 0 < np.isin(found, listed).mean() < 1
    np.testing.assert_allclose(ops.convert_to_numpy(layer(ids, mask)), wanted, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9])
def test_every_entry_of_a_list_is_found(length, rng):
    listed = np.unique(ops.convert_to_numpy(codes(np.arange(9)[None], np.ones((1, 9)))))[:length]
    layer = NgramEmbedding(vocabulary_size=9, length=length, width=4)
    layer.know(rng.permutation(listed))
    layer.embeddings.assign(np.ones((length, 4)))
    hits = ops.convert_to_numpy(layer(np.arange(9)[None], np.ones((1, 9))))[0, :, 0].sum()
    assert hits == length


def test_each_vector_is_dropped_out_apart(rng):
    ids = rng.integers(0, 9, (4, 50)).astype("int32")
    listed = frequent(ids.tolist(), least=1)
    layer = NgramEmbedding(vocabulary_size=9, length=len(listed), width=8, dropout=0.5)
    layer.know(listed)
    layer.embeddings.assign(np.ones((len(listed), 8)))
    shares = ops.convert_to_numpy(layer(ids, np.ones_like(ids), training=True)) / 2  # of 3 vectors
    assert {0.0, 1.0, 2.0, 3.0} == set(np.unique(shares))
    assert abs(shares.mean() - 1.5) < 0.1
    np.testing.assert_allclose(ops.convert_to_numpy(layer(ids, np.ones_like(ids))), 3.0)


def test_other_texts_and_padding_change_nothing(knowing, rng):
    """Packed and padded on the right equal alone."""
    backbone = knowing(causal=False)
    one, other = (rng.integers(1, 9, (1, n)).astype("int32") for n in (5, 4))
    alone = backbone.predict({"token_ids": other, "padding_mask": np.ones_like(other)}, verbose=0)
    row = np.concatenate([one, other, np.full((1, 2), 7, "int32")], axis=1)
    mask = np.array([[1] * 5 + [2] * 4 + [0] * 2], "int32")
    packed = backbone.predict({"token_ids": row, "padding_mask": mask}, verbose=0)
    np.testing.assert_allclose(packed[:, 5:9], alone, atol=1e-5)


def test_it_sees_the_order_of_tokens_and_nothing_later(knowing):
    backbone = knowing()
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


@pytest.mark.plain
def test_a_language_model_without_the_last_norm_is_none_that_others_know(make_backbone, tmp_path):
    lm = keras_llama.LlamaCausalLM(make_backbone(final_norm=False), None, {"eos_token_id": []})
    with pytest.raises(ValueError, match="know no model without a last norm"):
        keras_llama.save_checkpoint(lm, tmp_path / "out", format="hf")
    lm.save_to_preset(tmp_path / "preset")
    assert '"model_type": "keras_llama"' in (tmp_path / "preset" / "config.json").read_text()


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.plain), "bfloat16"])
def test_files_keep_it(knowing, tmp_path, rng, dtype):
    backbone = knowing(causal=False, embedding_dropout=0.25, dtype=dtype)
    model = keras_llama.LlamaTextClassifier(backbone, num_classes=2)
    ids = rng.integers(1, 9, (2, 5)).astype("int32")
    expected = model.predict(ids, verbose=0)
    model.save(tmp_path / "model.keras")
    assert np.array_equal(keras.saving.load_model(tmp_path / "model.keras").predict(ids, verbose=0), expected)
    model.save_to_preset(tmp_path / "preset")
    again = keras_llama.LlamaTextClassifier.from_preset(tmp_path / "preset")
    assert again.backbone.config == backbone.config
    assert again.backbone.config.num_ngrams > 40
    np.testing.assert_allclose(again.predict(ids, verbose=0), expected, atol=1e-6)
    assert '"model_type": "keras_llama"' in (tmp_path / "preset" / "config.json").read_text()  # others would not see it


@pytest.mark.plain
def test_it_does_not_generate(make_backbone):
    lm = keras_llama.LlamaCausalLM(make_backbone(num_ngrams=40), None, {"eos_token_id": []})
    with pytest.raises(ValueError, match=r"without n-grams.*num_ngrams=40"):
        lm.generate([[5, 6]], max_new_tokens=2)


@pytest.mark.plain
@pytest.mark.parametrize("number", [-1, 1.5, True, "many"])
def test_bad_numbers_are_refused(make_backbone, number):
    with pytest.raises(ValueError, match="`num_ngrams` must be an integer of at least 0"):
        make_backbone(num_ngrams=number)


@pytest.mark.plain
def test_llama_cpp_knows_none(make_backbone, tmp_path):
    lm = keras_llama.LlamaCausalLM(make_backbone(num_ngrams=40), None, {"eos_token_id": []})
    with pytest.raises(ValueError, match="know no n-gram embeddings"):
        keras_llama.save_checkpoint(lm, tmp_path / "model.gguf", format="gguf")
    assert not list(tmp_path.iterdir())
