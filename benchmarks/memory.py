"""What training takes, beside what `estimate_memory` says before it.

    python -m benchmarks.memory [--cases causal vocabulary ...] [--held-out]

Each case has a process of its own, on the backend of KERAS_BACKEND: imports, two steps of a tiny model that is thrown
away, then the model of the case is built, compiled, and takes two steps. Measured is the highest RssAnon, read every
2 ms, above what it was before the model was built. All rows are of full length. On torch the C library is told to give
freed blocks back (MALLOC_MMAP_THRESHOLD_).
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from typing import Any

import keras
import numpy as np

import keras_llama
from benchmarks.machine import process_peak

STEPS = 2
COLUMNS = ("weights", "gradients", "optimizer", "activations", "peak", "measured")
# Else the C library keeps what torch frees: blocks of up to 32 MiB stay in its heap, in holes that the next do not fit.
TORCH = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
# 42 million parameters with 4,000 tokens; few blocks, which compile sooner.
SHAPE = {"num_layers": 3, "hidden_dim": 1024, "num_query_heads": 16, "num_key_value_heads": 4, "intermediate_dim": 2816}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what is trained of it, and the batches that it is trained on."""

    batch_size: int
    sequence_length: int
    vocabulary_size: int = 4000
    head: str = "causal"
    dtype: str = "float32"
    optimizer: str = "adamw"
    lora: int = 0
    dropout: float = 0.0
    r_drop: float = 0.0
    shape: dict[str, Any] = dataclasses.field(default_factory=lambda: SHAPE)


CASES = {
    "causal": Case(4, 256),
    "vocabulary": Case(4, 256, vocabulary_size=32_000),
    "long": Case(1, 2048),
    "classifier": Case(16, 128, head="classifier"),
    # Without dropout a compiler sees that both passes are one.
    "classifier, two passes": Case(16, 128, head="classifier", r_drop=1.0, shape={**SHAPE, "dropout": 0.1}),
    "lora": Case(8, 256, lora=8),
    "lora, dropout": Case(8, 256, lora=8, dropout=0.1),
    "bfloat16": Case(8, 256, dtype="mixed_bfloat16"),
    # 47 million: cross-attention is a second one.
    "translator": Case(8, 256, head="translator", shape={**SHAPE, "num_layers": 2, "num_encoder_layers": 1}),
    "captioner": Case(16, 64, head="captioner"),  # behind 64 patches of 128 x 128 pixels
}
HELD_OUT = {
    "remat, muon": Case(
        16, 256, 16_000, optimizer="muon", shape={**keras_llama.size("10m"), "num_layers": 2, "remat": "block"}
    ),
    "wide, sgd": Case(2, 384, 16_000, optimizer="sgd", shape={**keras_llama.size("1b"), "num_layers": 2}),
    "translator, 10m": Case(
        32, 96, 8_000, head="translator", shape={**keras_llama.size("10m"), "num_encoder_layers": 2, "num_layers": 3}
    ),
}


def build(case: Case, tiny: bool = False):
    """The task, compiled."""
    shape = keras_llama.size("tiny") if tiny else case.shape
    options = {"vocabulary_size": 100 if tiny else case.vocabulary_size, "dtype": case.dtype, **shape}
    task: Any
    if case.head == "translator":
        task = keras_llama.LlamaSeq2SeqLM(keras_llama.LlamaSeq2SeqBackbone(**options))
    elif case.head == "captioner":
        encoder = keras_llama.convolutional_encoder(16 if tiny else 128)
        task = keras_llama.LlamaImageCaptioner(keras_llama.LlamaBackbone(**options), encoder)
    elif case.head == "classifier":
        task = keras_llama.LlamaTextClassifier(keras_llama.LlamaBackbone(**options), num_classes=4, r_drop=case.r_drop)
    else:
        task = keras_llama.LlamaCausalLM(keras_llama.LlamaBackbone(**options))
    if case.lora:
        task.enable_lora(case.lora, dropout=case.dropout, targets="all-linear")
    task.compile("auto" if case.optimizer == "adamw" else keras.optimizers.get(case.optimizer))
    return task


def fit(task, case: Case, batch_size: int, sequence_length: int, steps: int) -> None:
    """Random token ids, of a source and a target for a translator, and images for a captioner."""
    rows, generator = steps * batch_size, np.random.default_rng(0)
    ids = generator.integers(3, 100, (rows, sequence_length)).astype("int32")
    inputs = ids if task.sides == ("",) else {f"{side}token_ids": ids for side in task.sides}
    if case.head == "captioner":
        images = generator.integers(256, size=(rows, *task.image_size, 3)).astype("uint8")
        inputs = {"images": images, "token_ids": ids}
    targets = {"y": np.arange(rows) % 4} if case.head == "classifier" else {}
    task.fit(inputs, batch_size=batch_size, verbose=0, **targets)


def child(case: Case) -> None:
    """Prints what is estimated and measured, in bytes."""
    fit(build(case, tiny=True), case, 2, 16, 2)
    gc.collect()
    time.sleep(2)  # threads of the compiler end
    ctypes.CDLL(None).malloc_trim(0)  # what the tiny model took and left must not hide what this one takes
    with process_peak() as above:
        task = build(case)
        fit(task, case, case.batch_size, case.sequence_length, STEPS)
    estimate = keras_llama.estimate_memory(task, case.batch_size, case.sequence_length)
    print(json.dumps({"measured": above(), **dataclasses.asdict(estimate)}))


def main() -> None:
    cases = CASES | HELD_OUT
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--cases", nargs="+", choices=cases, default=list(CASES))
    flags.add_argument("--held-out", action="store_true", help="the cases that no constant was chosen by")
    flags.add_argument("--child", choices=cases, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        child(cases[args.child])
        return
    print(f"{'MiB':14}" + "".join(f"{name:>13}" for name in COLUMNS) + "  ratio")
    for name in HELD_OUT if args.held_out else args.cases:
        command = [sys.executable, "-m", "benchmarks.memory", "--child", name]
        environment = {**os.environ, **TORCH} if keras.config.backend() == "torch" else None
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found = json.loads(ended.stdout.splitlines()[-1])
        numbers = "".join(f"{found[key] / 2**20:13.0f}" for key in COLUMNS)
        print(f"{name:14}{numbers}{found['peak'] / found['measured']:7.2f}", flush=True)


if __name__ == "__main__":
    main()
