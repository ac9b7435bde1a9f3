"""SpelledTokenizer: a token for each Chinese character, ids that tell the subword."""

import itertools
import pathlib

import keras
import numpy as np
import pytest
import vocabularies

import keras_llama
from keras_llama.opening import open_tokenizer

pytestmark = pytest.mark.plain
TEXTS = ["a good film", "很好的电影", "很差的电影", "what a 电影 it is", "好的 film"] * 4


@pytest.fixture(scope="module")
def spelled():
    return keras_llama.SpelledTokenizer.train(TEXTS, vocabulary_size=300)


@pytest.fixture(scope="module")
def subwords():
    return keras_llama.SentencePieceTokenizer.train(TEXTS, vocabulary_size=300)


@pytest.mark.parametrize("text", vocabularies.TEXTS)
def test_text_comes_back_unchanged(spelled, text):
    assert spelled.decode(spelled.encode([text])) == [text if text != "▁" else " "]


def test_a_token_for_each_chinese_character(spelled, subwords):
    for text in TEXTS[1:3]:
        assert [spelled.token(i) for i in spelled.encode([text])[0]] == list("▁" + text)
    assert spelled.encode(TEXTS[:1]) == subwords.encode(TEXTS[:1])
    assert spelled.encode(["Ω"])[0][-2:] == subwords.encode(["Ω"])[0][-2:]  # bytes stay as they are


def test_ids_tell_the_subword_and_the_place_in_it(spelled, subwords):
    """The last character of a subword has its id; the ones before have ids that nothing else has."""
    for text in TEXTS[:5]:
        ids, wanted = iter(spelled.encode([text])[0]), subwords.encode([text])[0]
        for subword in wanted:
            chinese = any(character in "很好的电影差" for character in subwords.token(subword))
            row = list(itertools.islice(ids, len(subwords.token(subword)) if chinese else 1))
            assert row[-1] == subword
            assert min(row[:-1], default=10**6) >= subwords.vocabulary_size
        assert not list(ids)
    rows = spelled.spelling
    flat = [i for row in rows for i in row]
    assert len(flat) == len(set(flat)) == max(flat) + 1 == spelled.vocabulary_size


def test_characters_are_the_same_in_every_subword(spelled):
    of = {}
    for i, character in enumerate(spelled.characters):
        of.setdefault(spelled.token(i), set()).add(int(character))
    assert all(len(found) == 1 for found in of.values())
    assert not any(len(spelled.token(i)) > 1 and "影" in spelled.token(i) for i in range(spelled.vocabulary_size))
    assert len(of["影"]) == 1
    assert sum(spelled.token(i) == "影" for i in range(spelled.vocabulary_size)) > 1


def test_control_tokens(spelled, subwords):
    ids = spelled.encode(["film"], add_bos=True, add_eos=True)[0]
    assert (ids[0], ids[-1]) == (spelled.bos_id, spelled.eos_id) == (subwords.bos_id, subwords.eos_id)
    assert not {spelled.bos_id, spelled.eos_id} & set(spelled.encode(["</s><s>"])[0])
    parsed = spelled.encode(["a</s>film"], parse_special=True)[0]
    assert parsed == [*spelled.encode(["a"])[0], spelled.eos_id, *spelled.encode(["film"])[0]]
    assert spelled.decode([parsed]) == ["a film"]


def test_a_cut_text_is_written_as_far_as_it_goes(spelled):
    ids = spelled.encode(["很好的电影"])[0]
    assert [spelled.decode([ids[:n]])[0] for n in range(1, 7)] == ["很好的电影"[: n - 1] for n in range(1, 7)]


def test_files_give_it_back(spelled, tmp_path):
    assert type(open_tokenizer(spelled.files)) is keras_llama.SpelledTokenizer
    assert open_tokenizer(spelled.files).encode(TEXTS) == spelled.encode(TEXTS)
    assert "tokenizer.json" not in spelled.files  # it would say other ids
    backbone = keras_llama.LlamaBackbone(vocabulary_size=spelled.vocabulary_size, **keras_llama.size("tiny"))
    preprocessor = keras_llama.TextPreprocessor(spelled, sequence_length=32)
    model = keras_llama.LlamaTextClassifier(backbone, num_classes=2, preprocessor=preprocessor)
    expected = model.predict(TEXTS, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    for again in (
        keras.saving.load_model(tmp_path / "model.keras"),
        keras_llama.LlamaTextClassifier.from_preset(tmp_path / "preset"),
    ):
        np.testing.assert_allclose(again.predict(TEXTS, verbose=0), expected, atol=1e-6)
    assert '"model_type": "keras_llama"' in pathlib.Path(tmp_path, "preset/config.json").read_text()
    lm = keras_llama.LlamaCausalLM(backbone, preprocessor)
    with pytest.raises(ValueError, match="know no spelled subwords"):
        keras_llama.save_checkpoint(lm, tmp_path / "model.gguf", format="gguf")
