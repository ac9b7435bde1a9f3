"""How the cost of a decoding step grows with context, batch, vocabulary and depth, beside KerasHub's.

    python -m benchmarks.growth [--axes context batch vocabulary depth] [--backends tensorflow jax] [--rounds 3]

SmolLM2-135M's shape with random weights, float32, greedy, one prompt of 32 tokens; one of the four is varied at a time.
A step's time is a call with 72 new tokens less one with 8, over 64; engines in processes of their own, in turns,
medians. KerasHub's time depends on a call's whole length, so both of its calls have the longer one's arrays.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.decode import keras_llama_engine, prompts
from benchmarks.engines import BACKENDS, SHAPE, Engine, keras_hub_lm, serve

AXES = {
    "context": (32, 256, 1024),
    "batch": (1, 2, 4, 8, 16, 32),
    "vocabulary": (8_192, 49_152, 128_256),
    "depth": (6, 15, 30),
}
LONG, SHORT = 72, 8


def keras_hub_engine(dtype: str, shape: dict):
    lm = keras_hub_lm(dtype, shape)
    lm.compile(sampler="greedy")

    def generate(rows, new):
        known = rows.shape[1] + LONG - new
        ids = np.pad(rows, [[0, 0], [0, LONG]], constant_values=3)
        mask = np.broadcast_to(np.arange(ids.shape[1]) < known, ids.shape).astype("int32")
        lm.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)

    return generate


def child(engine: str, shape: dict) -> Callable[[int, int], float]:
    """Milliseconds of a step, by batch and prompt; the first answer compiles, too."""
    ours = engine.startswith("keras_llama")
    generate = keras_llama_engine("float32", shape) if ours else keras_hub_engine("float32", shape)

    def seconds(rows, new):
        started = time.perf_counter()
        generate(rows, new)
        return time.perf_counter() - started

    def step(batch, length):
        rows = prompts(batch, length) % shape["vocabulary_size"]
        return (seconds(rows, LONG) - seconds(rows, SHORT)) / (LONG - SHORT) * 1e3

    return step


def compare(axis: str, value: int, backends: list[str], rounds: int) -> dict[str, str]:
    fields = {"vocabulary": "vocabulary_size", "depth": "num_layers"}
    shape = {**SHAPE, **({fields[axis]: value} if axis in fields else {})}
    question = (value if axis == "batch" else 1, value if axis == "context" else 32)
    names = [f"{library}/{backend}" for backend in backends for library in ("keras_llama", "keras_hub")]
    with contextlib.ExitStack() as stack:
        running = {name: Engine("benchmarks.growth", name, "--shape", json.dumps(shape)) for name in names}
        for engine in running.values():
            stack.callback(engine.close)
            engine.ask(*question)
        taken = [{name: engine.ask(*question) for name, engine in running.items()} for _ in range(rounds)]
    found = {name: f"{statistics.median(times[name] for times in taken):7.1f}" for name in names}
    for backend in backends:
        ratio = statistics.median(t[f"keras_hub/{backend}"] / t[f"keras_llama/{backend}"] for t in taken)
        found[f"{backend}: KerasHub's step over this one's"] = f"{ratio:.2f}"
    return found


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    flags.add_argument("--backends", nargs="+", choices=BACKENDS, default=["tensorflow", "jax"])
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return serve(lambda: child(args.child, args.shape))
    for axis in args.axes:
        print(f"\n{axis}: ms a step")
        for value in AXES[axis]:
            found = compare(axis, value, args.backends, args.rounds)
            print(f"  {value:8}", *(f"{name} {number}" for name, number in found.items()), sep="   ", flush=True)
    return None


if __name__ == "__main__":
    main()
