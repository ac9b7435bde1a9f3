"""Tokenizers in a TensorFlow graph: the same ids as in Python, and back, from core operations only."""

import json

import keras
import numpy as np
import pytest
import vocabularies

import keras_llama
from keras_llama import tokenizer_files
from keras_llama.subword import open_tokenizer

if keras.config.backend() != "tensorflow":
    pytest.skip("a graph is built on the TensorFlow backend", allow_module_level=True)

import tensorflow as tf

from keras_llama.export.graph_tokenizer import GraphTokenizer
from keras_llama.export.tables import tables

pytestmark = pytest.mark.plain

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


@pytest.fixture(params=[*REAL, "tokenizer", "chat_tokenizer"])
def python(request):
    """Each kind of tokenizer in Python."""
    return real(request, request.param) if request.param in REAL else request.getfixturevalue(request.param)


class Graph(GraphTokenizer):
    """On lists."""

    def encode(self, texts):
        return super().encode(tf.constant(texts, tf.string)).to_list()

    def decode(self, rows):
        return [text.decode() for text in super().decode(tf.ragged.constant(rows, tf.int32, ragged_rank=1)).numpy()]


@pytest.fixture
def graph(python):
    return Graph(tables(python))


def same(texts, ours, theirs):
    wrong = [found for found in zip(texts, ours, theirs, strict=True) if found[1] != found[2]]
    assert not wrong, (len(wrong), wrong[:2])


def texts_of(shared_data, step):
    return vocabularies.shared_lines(shared_data)[::step]


def test_the_same_ids_and_texts(python, graph, shared_data):
    texts = [*TRICKY, *texts_of(shared_data, 60)]
    ids = python.encode(texts)
    same(texts, graph.encode(texts), ids)
    same(texts, graph.decode(ids), python.decode(ids))


@pytest.mark.slow
def test_the_same_ids_and_texts_of_many(python, graph, shared_data):
    texts = texts_of(shared_data, 5)
    ids = python.encode(texts)
    same(texts, graph.encode(texts), ids)
    same(texts, graph.decode(ids), python.decode(ids))


def test_a_batch_is_as_its_texts_alone(python, graph):
    assert graph.encode([]) == []
    assert graph.encode(TRICKY) == [graph.encode([text])[0] for text in TRICKY]


def test_random_text(python, graph, rng):
    some = [*range(32, 127), *range(0x4E00, 0x4E40), 9, 10, 13, 0xA0, 0x3000, 0x2F8, 0x660, 0x1F600]
    every = [*range(0xD800), *range(0xE000, 0x110000)]
    kinds = [np.array(codes) for codes in (some, every, [*map(ord, " \t\na1's.")])]
    texts = ["".join(map(chr, rng.choice(codes, rng.integers(0, 40)))) for codes in kinds for _ in range(300)]
    ids = python.encode(texts)
    same(texts, graph.encode(texts), ids)
    same(texts, graph.decode(ids), python.decode(ids))


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


def test_refuses_unigram_pieces(shared_data):
    proto = tokenizer_files.parse_model(vocabularies.model(shared_data, "llama2"))
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    unigram = keras_llama.SentencePieceTokenizer({"tokenizer.model": proto.SerializeToString()})
    with pytest.raises(ValueError, match=r"byte pairs.*missing=\['byte pairs'\]"):
        tables(unigram)
