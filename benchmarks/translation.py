"""Translation in equal minutes: this project, an LSTM encoder-decoder, KerasHub's Transformer, the nearest sentence.

    python -m benchmarks.translation --data cmn.txt [--minutes 10] [--models keras_llama lstm keras_hub nearest]

One split by distinct source (1,500 test, 500 validation sentences), one joint vocabulary, the same batches, equal
parameters, Muon and label smoothing; learning rate and dropout are each model's own. Each model is trained by
`model.fit` in a process of its own, with its learning rate warmed up and decayed over the minutes, tracing included;
no early stopping. The test is translated once a run, at its end; how settings were chosen: RESULTS.md.
Strict is the part of the test of which neither the source nor a reference stands in the training data, up to case and
punctuation. Tokens per second are real target tokens, over the second half of the steps.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
import types
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np

import keras_llama
from keras_llama.losses import TokenCrossentropy
from tasks import baselines, common, data, translators

VOCABULARY_SIZE = 4_000
MODELS = ("keras_llama", "lstm", "keras_hub", "nearest")
BATCH_SIZE = 64
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
# This project's settings.
OWN = {
    "architecture": translators.ARCHITECTURES[0],
    "preset": None,
    "vocabulary_size": VOCABULARY_SIZE,
    "sequence_length": 64,
    "size": "0.5m",
    "encoder_layers": 2,
    "label_smoothing": LABEL_SMOOTHING,
    "precision": "mixed_bfloat16",
}
SEARCHES: dict[str, dict] = {"greedy": {}, "beam 4": {"num_beams": 4, "length_penalty": 1.5}}
LEARNING_RATE = 1e-2
PARAMETERS = 2_510_720  # of this project with these settings; the peers get as many


class Budget(keras.callbacks.Callback):
    """Ends training after `minutes`; the rate rises to `peak` over 5 % of them and falls as a cosine to 0."""

    def __init__(self, peak: float, minutes: float):
        super().__init__()
        self.peak, self.seconds = peak, 60 * minutes
        self.ends: list[float] = []

    def on_train_begin(self, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        share = min((time.perf_counter() - self.start) / self.seconds, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95))
        self.model.optimizer.learning_rate = self.peak * (share / 0.05 if share < 0.05 else cosine)

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())
        self.model.stop_training = self.ends[-1] - self.start >= self.seconds

    def steps_per_second(self) -> float:
        half = self.ends[len(self.ends) // 2 :]
        return (len(half) - 1) / (half[-1] - half[0])


def split(path: str) -> dict[str, list]:
    rows = [row[:2] for row in data.translation_rows(path)]
    rest, test = common.split(rows, 1500)
    train, validation = common.split(rest, 500)
    return {"train": train, "validation": validation, "test": test}


def project(train, sources, minutes, dropout):
    """This project: translations greedily and by 4 beams, and what is told of the training."""
    model = translators.build(types.SimpleNamespace(**OWN, dropout=dropout), train)
    muon = common.optimizer("muon", LEARNING_RATE, WEIGHT_DECAY, model.head)
    model.compile(muon, weighted_metrics=None, jit_compile=False)
    budget = Budget(LEARNING_RATE, minutes)
    english, chinese = (list(column) for column in zip(*train, strict=True))
    model.fit(english, chinese, batch_size=BATCH_SIZE, epochs=10**6, verbose=0, callbacks=[budget])
    answers, seconds = {}, {}
    for name, search in SEARCHES.items():
        options: dict[str, Any] = {**search, "max_new_tokens": 40, "truncate": True, "batch_size": 64}
        model.generate(sources, **options)  # traces
        started = time.perf_counter()
        answers[name] = model.generate(sources, **options)
        seconds[f"{name} seconds"] = round(time.perf_counter() - started, 1)
    return model, budget, answers, seconds


def peer(train, sources, minutes, name, parameters, seed):
    """A peer at its tuned settings and the width that comes closest to `parameters`."""
    from benchmarks import translation_peers as peers

    settings = peers.SETTINGS[name]
    keras.config.set_dtype_policy(settings.dtype)
    english, chinese = (list(column) for column in zip(*train, strict=True))
    tokenizer = translators.joint_vocabulary(train, VOCABULARY_SIZE)

    def build(width):
        return settings.build(tokenizer.vocabulary_size, width, settings.depth, settings.dropout, tokenizer.pad_id)

    model = build(peers.fitting_width(build, parameters))
    # The embedding is the head, too. XLA was slower here, and compiles for each shape.
    muon = common.optimizer("muon", settings.learning_rate, WEIGHT_DECAY, "embedding", settings.adam_lr_ratio)
    model.compile(muon, TokenCrossentropy(LABEL_SMOOTHING), jit_compile=False)
    budget = Budget(settings.learning_rate, minutes)
    read, written = tokenizer.encode(english, add_eos=True), tokenizer.encode(chinese, add_bos=True, add_eos=True)
    batches = peers.dataset(read, written, BATCH_SIZE, tokenizer.pad_id, seed)
    model.fit(batches, epochs=10**6, shuffle=False, verbose=0, callbacks=[budget])
    ids = tokenizer.encode(sources, add_eos=True)
    found = {name: peers.search(model, ids, tokenizer, **search) for name, search in SEARCHES.items()}
    return model, budget, {name: tokenizer.decode(rows) for name, rows in found.items()}, {}


def child(args) -> None:
    keras.utils.set_random_seed(args.seed)
    parts = split(args.data)
    train, asked = parts["train"], translators.references(parts[args.part])
    sources, truth = list(asked), list(asked.values())
    told: dict[str, object] = {}
    if args.child == "nearest":
        answers = {"": baselines.nearest_translations(train, sources)}
    else:
        own = args.child == "keras_llama"
        options = (args.dropout,) if own else (args.child, args.parameters, args.seed)
        run: Any = project if own else peer
        model, budget, answers, seconds = run(train, sources, args.minutes, *options)
        tokenizer = translators.joint_vocabulary(train, VOCABULARY_SIZE)
        tokens = np.mean([len(row) + 1 for row in tokenizer.encode([target for _, target in train])])
        told = {
            "parameters": model.count_params(),
            "epochs": round(len(budget.ends) * BATCH_SIZE / len(train), 1),
            "target tokens/s": round(BATCH_SIZE * tokens * budget.steps_per_second()),
            **seconds,
        }
    known = [{plain(row[i]) for row in train} for i in (0, 1)]
    strict = [
        i
        for i, source in enumerate(sources)
        if plain(source) not in known[0] and not any(plain(target) in known[1] for target in truth[i])
    ]
    for name, texts in answers.items():
        told[f"{name} whole"] = scores(texts, truth, range(len(sources)))
        told[f"{name} strict"] = scores(texts, truth, strict)
    print(json.dumps({"model": args.child, **told}))


def plain(text: str) -> str:
    """A text without case and punctuation."""
    return re.sub(r"[\W_]+", "", text.lower())


def scores(texts, truth, chosen):
    found = keras_llama.translation_scores([texts[i] for i in chosen], [truth[i] for i in chosen])
    return {name: round(value, 2) for name, value in found.items()} | {"sentences": len(chosen)}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True, help="source<TAB>target lines")
    flags.add_argument("--minutes", type=float, default=10)
    flags.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    flags.add_argument("--parameters", type=int, default=PARAMETERS, help="of the peers")
    flags.add_argument("--dropout", type=common.share, default=0.1, help="of this project")
    flags.add_argument("--part", choices=("validation", "test"), default="test")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return child(args)
    for model in args.models:
        command = [sys.executable, "-m", "benchmarks.translation", "--child", model, "--data", args.data]
        command += ["--minutes", str(args.minutes), "--part", args.part, "--seed", str(args.seed)]
        command += ["--parameters", str(args.parameters), "--dropout", str(args.dropout)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        for name, value in json.loads(done.stdout.splitlines()[-1]).items():
            print(f"{name}: {value}", flush=True)
        print()
    return None


if __name__ == "__main__":
    main()
