"""Eight prompts of 16 to 512 tokens beside eight of one length, the same tokens in all: what raggedness costs.

    python -m benchmarks.ragged [--new 128] [--backends tensorflow jax torch] [--rounds 3]

SmolLM2-135M's shape with random weights, float32, greedy. A backend has a process of its own, in which the two calls
take turns; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.engines import BACKENDS, Engine, keras_llama_lm, serve

RAGGED = [int(length) for length in np.linspace(16, 512, 8)]
EQUAL = [sum(RAGGED) // len(RAGGED)] * len(RAGGED)


def child() -> Callable[[list[int], int], float]:
    """The seconds of a call, by its prompts' lengths and the new tokens."""
    lm = keras_llama_lm("float32")

    def seconds(lengths, new):
        ids = np.random.default_rng(0)
        rows = [ids.integers(3, 49_000, length).tolist() for length in lengths]
        started = time.perf_counter()
        lm.generate(rows, new, temperature=0.0, stop=None, batch_size=len(rows))
        return time.perf_counter() - started

    return seconds


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    flags.add_argument("--new", type=int, default=128)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return serve(child)
    for backend in args.backends:
        engine = Engine("benchmarks.ragged", f"keras_llama/{backend}")
        taken = [[engine.ask(lengths, args.new) for lengths in (RAGGED, EQUAL)] for _ in range(args.rounds + 1)][1:]
        engine.close()
        ragged, equal = (statistics.median(times) for times in zip(*taken, strict=True))
        ratio = statistics.median(one / other for one, other in taken)
        print(f"{backend}: ragged {ragged:.2f} s, equal {equal:.2f} s; {ratio:.2f} times the time", flush=True)
    return None


if __name__ == "__main__":
    main()
