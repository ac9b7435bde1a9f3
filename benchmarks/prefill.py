"""Time to the first token beside the peers in one run: a prompt of 512 tokens, in a call that may add 128.

    python -m benchmarks.prefill [--prompt 512] [--batch 1] [--new 128] [--dtypes float32] [--rounds 5]
                                 [--engines keras_llama/tensorflow keras_hub/tensorflow ...]

SmolLM2-135M's shape with random weights; each engine in a process of its own, in turns, medians. KerasHub gives nothing
before the end of a call: it is handed its arrays of prompt + new columns, all filled but the last, so that it runs its
prompt as it would and makes one token. The limit is 2 x parameters x tokens, attention left out, over the rate of a
large product by torch, measured here.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.decode import PARAMETERS, prompts
from benchmarks.engines import BACKENDS, Engine, keras_hub_lm, keras_llama_lm, serve, transformers_lm
from benchmarks.machine import arithmetic

ENGINES = (
    *(f"{name}/{backend}" for name in ("keras_llama", "keras_hub") for backend in BACKENDS),
    "transformers/torch",
)


def keras_llama_engine(dtype: str):
    from keras_llama.samplers import Settings

    loop = keras_llama_lm(dtype)._loop  # `stream` asks for strings
    greedy = Settings(temperature=0.0).checked()
    return lambda rows, new: next(loop.generate(rows.tolist(), new, greedy, set(), range(len(rows)), chunk=1))


def keras_hub_engine(dtype: str):
    lm = keras_hub_lm(dtype)
    lm.compile(sampler="greedy")

    def first(rows, new):
        ids = np.pad(rows, [[0, 0], [0, new]])
        mask = np.ones_like(ids)
        mask[:, -1] = 0
        lm.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)

    return first


def transformers_engine(dtype: str):
    import torch

    model = transformers_lm(dtype).eval()

    def first(rows, new):
        ids = torch.tensor(rows, dtype=torch.long, device=model.device)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 1}
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu()

    return first


def child(engine: str, dtype: str) -> Callable[[int, int, int], float]:
    makers = {"keras_llama": keras_llama_engine, "keras_hub": keras_hub_engine, "transformers": transformers_engine}
    first = makers[engine.split("/")[0]](dtype)

    def seconds(batch, length, new):
        rows = prompts(batch, length)
        started = time.perf_counter()
        first(rows, new)
        return time.perf_counter() - started

    return seconds


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    flags.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    flags.add_argument("--prompt", type=int, default=512)
    flags.add_argument("--batch", type=int, default=1)
    flags.add_argument("--new", type=int, default=128)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return serve(lambda: child(args.child, args.dtypes[0]))
    question = (args.batch, args.prompt, args.new)
    for dtype in args.dtypes:
        rate = arithmetic("mixed_bfloat16" if dtype == "bfloat16" else dtype)
        limit = 2 * PARAMETERS * args.batch * args.prompt / rate
        print(f"{dtype}, {args.batch} x {args.prompt}: arithmetic takes {limit * 1e3:.0f} ms")
        with contextlib.ExitStack() as stack:
            running = {name: Engine("benchmarks.prefill", name, "--dtypes", dtype) for name in args.engines}
            for engine in running.values():
                stack.callback(engine.close)
            first = {name: engine.ask(*question) for name, engine in running.items()}
            taken = [{name: engine.ask(*question) for name, engine in running.items()} for _ in range(args.rounds)]
        for name in args.engines:
            middle = statistics.median(times[name] for times in taken)
            print(f"  {name:24}{middle * 1e3:8.0f} ms  (first call {first[name]:.1f} s)")
        for ours in (name for name in args.engines if name.startswith("keras_llama")):
            for other in (name for name in args.engines if not name.startswith("keras_llama")):
                ratio = statistics.median(times[other] / times[ours] for times in taken)
                print(f"  {ours} before {other}: {ratio:.2f}")
    return None


if __name__ == "__main__":
    main()
