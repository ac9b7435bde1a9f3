"""tiktoken files as Hugging Face's files."""

import base64
import json

import pytest

from keras_llama import tokenizer_files
from keras_llama.opening import open_tokenizer
from keras_llama.tokenizer_files import from_tiktoken

pytestmark = pytest.mark.plain


def _tiktoken(*more):
    tokens = [*(bytes([i]) for i in range(256)), *more]
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


def _merges(files):
    return [tuple(pair) for pair in json.loads(files["tokenizer.json"])["model"]["merges"]]


def test_tiktoken_merges_are_all_splits_in_the_order_of_their_results():
    files = from_tiktoken(_tiktoken(b"ab", b"bc", b"abc", b"\xff\x00", b"xyz"))
    assert _merges(files) == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"), ("ÿ", "Ā")]
    tokenizer = open_tokenizer(files)
    assert tokenizer.encode(["abc bc"]) == [[258, 32, 257]]
    assert tokenizer.encode(["xyz"]) == [[260]]  # a word that no merge leads to
    assert tokenizer.special_tokens["<|begin_of_text|>"] == tokenizer.bos_id == 261
    assert tokenizer.vocabulary_size == 261 + 256


def test_llama3_has_all_its_merges(shared_data):
    data = (shared_data / "checkpoints/llama3_tokenizer/tokenizer.model").read_bytes()
    files = from_tiktoken(data)
    merges = _merges(files)
    assert len(merges) == len(set(merges)) == 280_147
    assert merges[:3] == [("Ġ", "Ġ"), ("Ġ", "ĠĠĠ"), ("ĠĠ", "ĠĠ")]


@pytest.mark.parametrize("end", [b"", b"\r\n", b"\n"])
def test_tiktoken_is_told_by_its_content(end, tokenizer):
    assert tokenizer_files.is_tiktoken(_tiktoken() + end)
    assert not tokenizer_files.is_tiktoken(tokenizer.proto)
    assert not tokenizer_files.is_tiktoken(b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_tiktoken() + b"!! 256\n", "tokenizer.model:257"),
        (_tiktoken() + b"YWI=\n", "tokenizer.model:257"),
        (_tiktoken() + b"YWI= x\n", "tokenizer.model:257"),
        (_tiktoken() + b"YWI= 300\n", "expected the rank 256"),
        (_tiktoken(b"a"), "distinct tokens"),
        (_tiktoken()[:500], "tokenizer.model:"),
    ],
)
def test_a_broken_tiktoken_file(data, message):
    with pytest.raises(ValueError, match=message):
        from_tiktoken(data)
