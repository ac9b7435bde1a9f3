"""Tokenizers in a TensorFlow graph: the same ids as in Python, and back, from core operations only."""

import json

import keras
import numpy as np
import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_llama import SpelledTokenizer, tokenizer_files
from keras_llama.opening import open_tokenizer
from keras_llama.tokenizer_files import MODEL

if keras.config.backend() != "tensorflow":
    pytest.skip("a graph is built on the TensorFlow backend", allow_module_level=True)

import tensorflow as tf

from keras_llama.export.graph_text import graph_tokenizer
from keras_llama.export.graph_tokenizer import GraphTokenizer
from keras_llama.export.tables import tables

REAL = ["llama2", "llama2 as tokenizer.json", "llama3", "smollm2"]
TRICKY = [
    *vocabularies.HARD,
    "ÿ\u00ff \ufdd0 \ufffe",
    "a\u2028b\u0085c\x0bd\x1ce",
    " \t x\t\ty \n z \r\n  w  ",
    "1a22b333c4444 ²½Ⅷ٣ 一二",
    "ſ'ſ 'S 'Re can'T",
    "▁ ▁▁a▁",
    "\x00",
]


def real(request, name):
    if name == "smollm2":
        return vocabularies.smollm2()
    data = request.getfixturevalue("shared_data")
    if name.endswith("json"):
        files = tokenizer_files.from_sentencepiece(vocabularies.model(data, "llama2"), {})
        return open_tokenizer({name: file for name, file in files.items() if name != "tokenizer.model"})
    return vocabularies.load(data, name)


@pytest.fixture(params=[*REAL, "tokenizer", "chat_tokenizer", "spelled"])
def python(request):
    """Each kind of tokenizer in Python."""
    return real(request, request.param) if request.param in REAL else request.getfixturevalue(request.param)


def ragged(rows):
    return tf.RaggedTensor.from_row_lengths(np.concatenate([*rows, []]).astype("int32"), [*map(len, rows)])


@pytest.fixture
def spelled():
    return SpelledTokenizer.train(["a good film", "a bad film internationally", "很好的电影", "很差的电影"] * 5, 320)


class Graph(GraphTokenizer):
    """On lists."""

    def encode(self, texts):
        return super().encode(tf.constant(texts, tf.string)).to_list()

    def decode(self, rows):
        return [text.decode() for text in super().decode(ragged(rows)).numpy()]


@pytest.fixture
def graph(python):
    return Graph(tables(python))


def same(texts, ours, theirs):
    wrong = [found for found in zip(texts, ours, theirs, strict=True) if found[1] != found[2]]
    assert not wrong, (len(wrong), wrong[:2])


def agree(python, graph, texts):
    for start in range(0, len(texts), 1_000):  # a batch of 20,000 took 7 GB
        part = texts[start : start + 1_000]
        ids = python.encode(part)
        same(part, graph.encode(part), ids)
        same(part, graph.decode(ids), python.decode(ids))


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_same_ids_and_texts(python, graph, shared_data, count):
    agree(python, graph, [*TRICKY, *vocabularies.sampled_texts(shared_data, count)])


def test_the_first_ids_of_a_text_are_those_of_the_whole(python):
    graph, texts = GraphTokenizer(tables(python)), ["a film internationally " * 9, "很好的电影很差的电影" * 9]
    for most in (1, 7, 16):
        found = graph.encode(tf.constant(texts), most).to_list()
        assert [row[:most] for row in found] == [row[:most] for row in python.encode(texts)]


@pytest.mark.parametrize(("name", "kind"), [("llama2", "spm"), ("llama2 as tokenizer.json", "spm"), ("llama3", "bpe")])
def test_golden_ids(request, shared_data, name, kind):
    graph = Graph(tables(real(request, name)))
    texts, golden = vocabularies.goldens(shared_data, name.split()[0], kind)
    same(texts, graph.encode(texts), golden)
    same(texts, graph.decode(golden), texts)


def test_a_batch_is_as_its_texts_alone(python, graph):
    assert graph.encode([]) == []
    assert graph.encode(TRICKY) == [graph.encode([text])[0] for text in TRICKY]


# Characters that rules look at, and any others; in runs, and one by one.
CHARACTERS = st.sampled_from(" \t\n\r'1a²٣\u00a0\u3000\u02f8好中😀s") | st.characters(exclude_categories=["Cs"])
PARTS = st.lists(st.text(CHARACTERS) | st.builds(lambda c, n: c * n, CHARACTERS, st.integers(0, 60)), max_size=6)


def test_random_text(python, graph):
    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(st.lists(PARTS.map("".join), max_size=8))
    def agrees(texts):
        agree(python, graph, texts)

    agrees()


def test_words_that_no_merges_lead_to(request):
    python = real(request, "llama3")
    found = tables(python)
    texts = [text for text in (piece.decode("utf-8", "ignore") for piece in found.whole) if text]
    assert len(texts) > 300
    same(texts, Graph(found).encode(texts), python.encode(texts))


def test_what_is_no_utf8_counts_as_the_replacement_character(python, graph):
    assert graph.encode([b"a\xffb", "a\ufffdb"]) == python.encode(["a\ufffdb"]) * 2


def test_ids_without_text(python, graph):
    (ids,) = python.encode(["a film"])
    control = [i for i in (python.bos_id, python.eos_id) if i >= 0]
    rows = [[*control, *ids, *control], [*ids, 10**6], []]
    assert graph.decode(rows) == python.decode(rows)


def changed(files, **changes):
    document = json.loads(files["tokenizer.json"])
    for path, value in changes.items():
        part = document
        *way, last = path.split("__")
        for key in way:
            part = part[key]
        part[last] = value
    return open_tokenizer({**files, "tokenizer.json": json.dumps(document).encode()})


def test_merges_in_any_order(chat_tokenizer):
    """Trained merges never make a pair that comes before them; those of a file may."""
    generator = np.random.default_rng(0)
    merges = json.loads(chat_tokenizer.files["tokenizer.json"])["model"]["merges"]
    texts = ["a good film", "what is a film", "user assistant system", "很好的电影", "goodgoodfilm" * 3, "assist" * 9]
    for _ in range(4):
        python = changed(chat_tokenizer.files, model__merges=[merges[i] for i in generator.permutation(len(merges))])
        agree(python, Graph(tables(python)), texts)
    by_hand = [["a", "b"], ["a", "c"], ["ab", "ab"], ["ab", "a"], ["abab", "a"], ["aba", "b"], ["b", "a"], ["a", "ab"]]
    vocabulary = json.loads(chat_tokenizer.files["tokenizer.json"])["model"]["vocab"]
    for token in ("".join(pair) for pair in by_hand):
        vocabulary.setdefault(token, len(vocabulary))
    texts = ["".join(generator.choice([*"abc"], 30, p=[0.45, 0.45, 0.1])) for _ in range(40)]
    for _ in range(4):
        order = [by_hand[i] for i in generator.permutation(len(by_hand))]
        python = changed(chat_tokenizer.files, model__merges=order, model__vocab=vocabulary)
        agree(python, Graph(tables(python)), texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "bytes spelled as characters"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Punctuation", "behavior": "Isolated"},
                        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                    ],
                }
            },
            "cannot cut words",
        ),
        ({"normalizer": {"type": "NFC"}}, "spaces as SentencePiece has them"),
        ({"model__dropout": 0.1}, "no dropout"),
    ],
)
def test_refuses_what_it_cannot_do_exactly(chat_tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        tables(changed(chat_tokenizer.files, **changes))


@pytest.mark.parametrize("model_type", ["unigram", "word"])
def test_what_is_no_byte_pairs_is_left_to_tensorflow_text(shared_data, model_type):
    texts = vocabularies.sampled_texts(shared_data, 2_000)
    python = vocabularies.trained(texts, model_type=model_type, vocab_size=4_000)
    with pytest.raises(ValueError, match=r"missing=\['byte pairs', 'byte fallback', 'no normalization'\]"):
        tables(python)
    library = graph_tokenizer(python)
    assert library.needs == ("tensorflow_text",)
    ids, found = python.encode(texts), library.encode(tf.constant(texts)).to_list()
    if model_type == "unigram":  # of segmentations with one score, versions of the library take either
        score = {i: piece.score for i, piece in enumerate(tokenizer_files.parse_model(python.files[MODEL]).pieces)}
        for i in [i for i in range(len(texts)) if found[i] != ids[i]]:
            assert sum(map(score.get, found[i])) == pytest.approx(sum(map(score.get, ids[i])), abs=1e-4)
            found[i] = ids[i]
    same(texts, found, ids)
    rows = [*ids, [1, *ids[0], 2], [4_000], []]
    found = library.decode(ragged(rows)).numpy()
    same(rows, [text.decode() for text in found], python.decode(rows))
