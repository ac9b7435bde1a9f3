"""The SentencePiece tokenizer: exact round trips, control tokens, and what it refuses."""

import numpy as np
import pytest

import keras_llama

TEXTS = [
    "a good film",
    "很好的电影，推荐！",
    "  leading and   double spaces ",
    "tab\tand\nnew line",
    "emoji 😀👩‍👩‍👧 and accents é ü",
    "</s><s><unk><pad>",
    "▁",
    "한국어 العربية हिन्दी",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode([text])) == [text if text != "▁" else " "]


def test_control_tokens_are_not_read_out_of_text(tokenizer):
    ids = tokenizer.encode(["</s><s>"])[0]
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


def test_special_tokens_on_request(tokenizer):
    plain, marked = (tokenizer.encode(["film"], add_bos=on, add_eos=on)[0] for on in (False, True))
    assert marked == [tokenizer.bos_id, *plain, tokenizer.eos_id]


def test_ids_lie_in_the_vocabulary_and_specials_are_distinct(tokenizer):
    assert max(max(row) for row in tokenizer.encode(TEXTS)) < tokenizer.vocabulary_size <= 300
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, 0}) == 4


def test_training_is_reproducible_and_merges():
    texts = ["ab ab ab abc"] * 20
    first, second = (keras_llama.SentencePieceTokenizer.train(texts, 270) for _ in range(2))
    assert first.encode(texts[:1]) == second.encode(texts[:1])
    assert len(first.encode(["ab ab"])[0]) == 2


def test_a_long_line_is_learned_from():
    """SentencePiece drops lines over 4,192 bytes unless told otherwise."""
    tokenizer = keras_llama.SentencePieceTokenizer.train(["xyzzy " * 2000], 270)
    assert len(tokenizer.encode(["xyzzy xyzzy"])[0]) <= 3


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_refuses_to_train_on_nothing(texts):
    with pytest.raises(ValueError, match="at least one text"):
        keras_llama.SentencePieceTokenizer.train(texts)


@pytest.mark.parametrize("size", [10, 262])
def test_refuses_a_vocabulary_that_cannot_hold_the_characters(size):
    with pytest.raises(ValueError, match="vocabulary_size="):
        keras_llama.SentencePieceTokenizer.train(["abcdefghijklmnopqrstuvwxyz"], size)


def test_without_a_vocabulary_it_says_so():
    with pytest.raises(ValueError, match="no vocabulary"):
        keras_llama.SentencePieceTokenizer().encode(["a"])


def test_reviews_come_back_unchanged():
    data = pytest.importorskip("tasks.data")
    texts = [text for text, *_ in data.review_rows()[::20]]
    tokenizer = keras_llama.SentencePieceTokenizer.train(texts, 4000)
    assert tokenizer.decode(tokenizer.encode(texts)) == texts
    assert np.mean([len(row) for row in tokenizer.encode(texts)]) < np.mean([len(text) for text in texts])
