"""Loading a checkpoint: seconds and peak anonymous memory, this project beside Transformers and KerasHub.

    python -m benchmarks.load --preset DIRECTORY_OR_GGUF [--dtype float32] [--rounds 3]

Each load runs in a fresh process, in turns; memory is RssAnon, read every 2 ms by a thread, above the level just before
the call. Mapped pages of a file are not counted: they are the kernel's. The ratios are medians over the rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from benchmarks.machine import process_peak

LOADERS = ("keras_llama", "transformers", "keras_hub")


def loader(name: str, preset: str, dtype: str):
    """A function that loads the model, its imports done."""
    path = pathlib.Path(preset)
    if name == "keras_llama":
        import keras_llama

        return lambda: keras_llama.LlamaCausalLM.from_preset(preset, dtype=dtype)
    if name == "transformers":
        import torch
        import transformers

        where = {"pretrained_model_name_or_path": preset}
        if path.suffix == ".gguf":
            where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return lambda: transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
    import keras_hub

    return lambda: keras_hub.models.Llama3Backbone.from_preset(preset, dtype=dtype)


def child(name: str, preset: str, dtype: str) -> None:
    load = loader(name, preset, dtype)
    if name != "transformers":
        import keras

        keras.ops.convert_to_numpy(keras.ops.ones((8, 8)) @ keras.ops.ones((8, 8)))  # the backend is up
    with process_peak() as above:
        started = time.perf_counter()
        model = load()
        seconds = time.perf_counter() - started
    if name == "transformers":
        sizes = [weight.numel() * weight.element_size() for weight in model.parameters()]
    else:
        from keras_llama.checkpoints.loader import nbytes

        sizes = [nbytes(weight) for weight in model.weights]
    found = {"seconds": seconds, "peak": above(), "weights": sum(sizes), "largest": max(sizes)}
    print(json.dumps(found))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--preset", required=True)
    flags.add_argument("--dtype", default="float32")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--backends", nargs="+", default=["tensorflow", "jax", "torch"])
    flags.add_argument("--loaders", nargs="+", default=LOADERS)
    flags.add_argument("--child", choices=LOADERS, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return child(args.child, args.preset, args.dtype)
    runs = [(name, backend) for name in args.loaders for backend in args.backends if name != "transformers"]
    runs += [("transformers", "torch")] if "transformers" in args.loaders else []
    if pathlib.Path(args.preset).suffix == ".gguf":
        runs = [run for run in runs if run[0] != "keras_hub"]  # it reads no GGUF
    found: dict[tuple[str, str], list[dict[str, float]]] = {run: [] for run in runs}
    for _ in range(args.rounds):
        for name, backend in runs:
            environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [sys.executable, "-m", "benchmarks.load", "--preset", args.preset]
            command += ["--dtype", args.dtype, "--child", name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            found[name, backend].append(json.loads(done.stdout.splitlines()[-1]))
    mib = 2**20
    print(
        "| loader | backend | s (best) | weights MiB | largest tensor MiB | peak RssAnon MiB (worst) | over both MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for (name, backend), rows in found.items():
        peak, seconds = max(row["peak"] for row in rows), min(row["seconds"] for row in rows)
        weights, largest = rows[0]["weights"], rows[0]["largest"]
        over = peak - weights - largest
        numbers = f"{weights / mib:.0f} | {largest / mib:.0f} | {peak / mib:.0f} | {over / mib:+.0f}"
        print(f"| {name} | {backend} | {seconds:.1f} | {numbers} |")
    for ours in (run for run in runs if run[0] == "keras_llama"):
        for other in (run for run in runs if run[0] != "keras_llama" and run[1] == ours[1]):
            pairs = list(zip(found[ours], found[other], strict=True))
            time_ratio, memory_ratio = (
                statistics.median(mine[key] / theirs[key] for mine, theirs in pairs) for key in ("seconds", "peak")
            )
            print(f"{'/'.join(ours)} to {'/'.join(other)}: {time_ratio:.2f} x the time, {memory_ratio:.2f} x the peak")
    return None


if __name__ == "__main__":
    main()
