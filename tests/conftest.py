"""Shared by all tests. The backend is the one that KERAS_BACKEND names; `make test` runs the three in turn."""

import gc
import json
import os
import pathlib
import subprocess
import sys

# A worker keeps to a processor of its own: with threads for all of them in each, tests took twice the time. It does so
# before Keras is imported, for a backend counts its threads then.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})

import keras
import numpy as np
import pytest

import keras_llama
from keras_llama import backend
from keras_llama.opening import open_tokenizer

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _aside():
    """What the files before have left is no garbage: Keras searches for some at each layer that it quantises."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _without_xla(request, monkeypatch):
    """On TensorFlow the tests that are neither slow nor marked by `xla` do without it, and without Grappler.

    They compile much and run little, so that what optimises a graph would take most of their time.
    """
    if keras.config.backend() != "tensorflow":
        return
    import tensorflow as tf

    optimised = bool({"xla", "slow"} & {mark.name for mark in request.node.iter_markers()})
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not optimised})
    if optimised:
        return
    prepare = backend.prepare_updates
    monkeypatch.setattr(backend, "prepare_updates", lambda optimizer, by_xla: prepare(optimizer, by_xla=False))
    make = backend.Compiled.__init__

    def plain(self, function, variables, jit_compile=False, donate=()):
        make(self, function, variables, donate=donate)

    monkeypatch.setattr(backend.Compiled, "__init__", plain)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def make_backbone():
    """A tiny backbone whose weights are large enough to tell one computation from another."""

    def make(**changes):
        config = {
            "vocabulary_size": 60,
            "num_layers": 2,
            "num_query_heads": 4,
            "num_key_value_heads": 2,
            "hidden_dim": 32,
            "intermediate_dim": 48,
        }
        backbone = keras_llama.LlamaBackbone(**{**config, **changes})
        generator = np.random.default_rng(1)
        for variable in backbone.variables:
            noise = generator.normal(0, 0.3, variable.shape)
            variable.assign((1 + noise) if "norm" in variable.path else noise)
        return backbone

    return make


@pytest.fixture
def not_exported(monkeypatch):
    """For the tests of a recipe of which another exports, which takes most of its time."""
    from tasks import delivery

    monkeypatch.setattr(delivery, "exported", lambda *_: None)


@pytest.fixture(scope="session")
def tokenizer():
    texts = ["a good film", "a bad film", "很好的电影", "很差的电影", "what a film it is"] * 4
    return keras_llama.SentencePieceTokenizer.train(texts, vocabulary_size=300)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A small byte-level tokenizer with two control tokens and a chat template."""
    import tokenizers

    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|none|>", "<|start|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["what is a film", "a good film", "user assistant system", "很好的电影"] * 4, trainer)
    settings = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|none|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer.json": raw.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    return open_tokenizer(files)


@pytest.fixture
def chat_lm(chat_tokenizer, make_backbone):
    """A random language model over `chat_tokenizer`."""
    backbone = make_backbone(vocabulary_size=chat_tokenizer.vocabulary_size, context_length=200)
    preprocessor = keras_llama.TextPreprocessor(chat_tokenizer, sequence_length=64, add_bos=False)
    return keras_llama.LlamaCausalLM(backbone, preprocessor, generation_config={"eos_token_id": [2]})


@pytest.fixture
def run_python():
    """Runs a program in a fresh process, on the backend of this one unless told otherwise; returns what it prints."""

    def run(code, *arguments, backend=None, check=True, cwd=ROOT):
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend or keras.config.backend(),
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done.stdout if check else done

    return run


@pytest.fixture
def shared_data():
    """The folder of real data, `$KERAS_LLAMA_DATA` or `../shared/data`; the test is skipped without it."""
    path = pathlib.Path(os.environ.get("KERAS_LLAMA_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"needs real data at {path} or $KERAS_LLAMA_DATA")
    return path
