"""Greedy decoding beside the peers in one run: tokens per second over whole calls, and seconds of the first call.

    python -m benchmarks.decode [--batches 1 8 32] [--prompts 32 512] [--dtypes float32 bfloat16] [--rounds 5]
                                [--engines keras_llama/tensorflow keras_hub/tensorflow ...]

SmolLM2-135M's shape with random weights, no stop tokens. Each engine has a process of its own, which waits while
another runs; they take turns, several rounds, and medians count. "-compile" is `compile(jit_compile=True)`, by which
torch compiles a step. llama.cpp has its file from this project. The limit is the bytes of the weights, read once a
token, over the memory bandwidth measured here.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable

import numpy as np

from benchmarks.engines import BACKENDS, CONTEXT, SHAPE, Engine, keras_hub_lm, keras_llama_lm, serve, transformers_lm
from benchmarks.machine import bandwidth

PARAMETERS = 134_515_008
COMPILED = "-compile"
ENGINES = (
    *(f"keras_llama/{backend}" for backend in BACKENDS),
    f"keras_llama/torch{COMPILED}",
    *(f"keras_hub/{backend}" for backend in BACKENDS),
    "transformers/torch",
    "llama.cpp/",
)
SLOW = ("keras_hub/torch",)  # under 2 tokens a second: only when asked for


def prompts(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 49_000, (batch, length)).astype("int32")


def keras_llama_engine(dtype: str, shape: dict = SHAPE, jit: bool = False):
    lm = keras_llama_lm(dtype, shape)
    if jit:
        lm.compile(jit_compile=True)
    return lambda rows, new: lm.generate(rows, new, temperature=0.0, stop=None, batch_size=len(rows))


def keras_hub_engine(dtype: str, shape: dict = SHAPE):
    lm = keras_hub_lm(dtype, shape)
    lm.compile(sampler="greedy")

    def generate(rows, new):
        ids = np.pad(rows, [[0, 0], [0, new]])
        mask = np.pad(np.ones_like(rows), [[0, 0], [0, new]])
        lm.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)

    return generate


def transformers_engine(dtype: str):
    import torch

    model = transformers_lm(dtype).eval()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(rows, new):
        ids = torch.tensor(rows, dtype=torch.long, device=model.device)
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options).cpu()

    return generate


def llama_cpp_engine(dtype: str):
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = os.environ["DECODE_GGUF"]
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = CONTEXT, 1, os.cpu_count()
    server = xllamacpp.Server(settings)

    def generate(rows, new):
        options = {"prompt": rows[0].tolist(), "n_predict": new, "temperature": 0.0, "top_k": 1}
        options |= {"cache_prompt": False, "ignore_eos": True}
        request = urllib.request.Request(server.listening_address + "/completion", json.dumps(options).encode())
        with urllib.request.urlopen(request) as answer:
            answer.read()

    return generate


def child(engine: str, dtype: str) -> Callable[[int, int, int], float]:
    """The seconds of a call, by batch, prompt and new tokens."""
    makers = {
        "keras_llama": keras_llama_engine,
        "keras_hub": keras_hub_engine,
        "transformers": transformers_engine,
        "llama.cpp": llama_cpp_engine,
    }
    options = {"jit": True} if engine.endswith(COMPILED) else {}
    generate = makers[engine.split("/")[0]](dtype, **options)

    def seconds(batch, length, new):
        rows = prompts(batch, length)
        started = time.perf_counter()
        generate(rows, new)
        return time.perf_counter() - started

    return seconds


def write_gguf(path: str, dtype: str) -> None:
    program = (
        "import keras_llama; from benchmarks.engines import keras_llama_lm;"
        "t = keras_llama.LlamaCausalLM.from_preset('smollm2_135m_instruct').preprocessor;"
        f"lm = keras_llama.LlamaCausalLM(keras_llama_lm({dtype!r}).backbone, t);"
        f"keras_llama.save_checkpoint(lm, {path!r}, format='gguf')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def compare(engines: list[str], dtype: str, shapes: list[tuple[int, int]], new: int, rounds: int) -> list[dict]:
    speeds: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        gguf = str(pathlib.Path(folder, "model.gguf"))
        if "llama.cpp/" in engines:
            write_gguf(gguf, dtype)
        running = {name: Engine("benchmarks.decode", name, "--dtypes", dtype, DECODE_GGUF=gguf) for name in engines}
        for engine in running.values():
            stack.callback(engine.close)
        for batch, length in shapes:
            some = {name: e for name, e in running.items() if batch == 1 or not name.startswith("llama.cpp")}
            first = {name: engine.ask(batch, length, new) for name, engine in some.items()}
            taken = [{name: e.ask(batch, length, new) for name, e in some.items()} for _ in range(rounds)]
            print(f"\n{dtype}, batch {batch}, prompt {length}: tokens/s (first call, s)")
            for name in some:
                speed = batch * new / statistics.median(times[name] for times in taken)
                print(f"  {name:24}{speed:8.1f}  ({first[name]:.1f})", flush=True)
                speeds.append({"engine": name, "dtype": dtype, "batch": batch, "prompt": length, "speed": speed})
            for ours in (name for name in some if name.startswith("keras_llama")):
                for other in (name for name in some if not name.startswith("keras_llama")):
                    ratio = statistics.median(times[other] / times[ours] for times in taken)
                    print(f"  {ours} over {other}: {ratio:.2f}; first call {first[other] / first[ours]:.2f}")
    return speeds


def draw(path: str, speeds: list[dict], limits: dict[str, float]) -> None:
    """Bars of the first batch and prompt in each dtype, against what memory allows."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    batch, prompt = speeds[0]["batch"], speeds[0]["prompt"]
    figure, axes = pyplot.subplots(1, len(limits), figsize=(5 * len(limits), 3.2), squeeze=False, layout="constrained")
    for axis, (dtype, limit) in zip(axes[0], limits.items(), strict=True):
        shown = [s for s in speeds if (s["dtype"], s["batch"], s["prompt"]) == (dtype, batch, prompt)]
        shown.sort(key=lambda s: s["speed"])
        colors = ["#d62728" if s["engine"].startswith("keras_llama") else "#9aa5b1" for s in shown]
        axis.barh([s["engine"].rstrip("/") for s in shown], [s["speed"] for s in shown], color=colors)
        axis.axvline(limit * batch, color="black", linestyle="--", label="weights read once a token")
        axis.set(xlabel="tokens/s", title=f"{dtype}, {batch} x {prompt} tokens")
        axis.legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--engines", nargs="+", choices=ENGINES, default=[e for e in ENGINES if e not in SLOW])
    flags.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    flags.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    flags.add_argument("--prompts", nargs="+", type=int, default=[32, 512])
    flags.add_argument("--new", type=int, default=128)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--picture", help="an .svg file to draw the first batch and prompt into")
    flags.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return serve(lambda: child(args.child, args.dtypes[0]))
    speed = bandwidth()
    limits = {dtype: speed / PARAMETERS / (4 if dtype == "float32" else 2) for dtype in args.dtypes}
    print(f"memory {speed / 1e9:.0f} GB/s: at batch 1 at most tokens/s", {d: round(x) for d, x in limits.items()})
    shapes = [(batch, length) for batch in args.batches for length in args.prompts]
    speeds = [s for dtype in args.dtypes for s in compare(args.engines, dtype, shapes, args.new, args.rounds)]
    if args.picture:
        draw(args.picture, speeds, limits)
    return None


if __name__ == "__main__":
    main()
