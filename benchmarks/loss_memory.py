"""What a training step holds beyond weights, gradients and optimiser state: the chunked loss beside the dense one.

    python -m benchmarks.loss_memory [--vocabulary 128000] [--length 2048] [--backends tensorflow jax torch]

SmolLM2-135M's blocks with `remat="block"`, one row of tokens, AdamW, float32. Each loss has a process of its own. It
takes a step with a short row first; then memory is RssAnon, read every 2 ms, above its level before the step with the
long row, less the bytes of the gradients.
"""

import argparse
import threading
import time
from collections.abc import Callable

import numpy as np

from benchmarks.engines import BACKENDS, SHAPE, Engine, keras_llama_lm, serve
from benchmarks.load import anonymous

LOSSES = ("chunked", "dense")


def child(loss: str, vocabulary: int) -> Callable[[int], float]:
    """The GiB that a step of so many tokens needs."""
    import keras

    lm = keras_llama_lm("float32", {**SHAPE, "vocabulary_size": vocabulary}, remat="block")
    lm.compile(keras.optimizers.AdamW(1e-4))
    lm.chunked = loss == "chunked"

    def step(length):
        ids = np.random.default_rng(0).integers(3, vocabulary, (1, length)).astype("int32")
        before = peak = anonymous()
        done = threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        lm.fit(ids, verbose=0)
        done.set()
        watcher.join()
        gradients = sum(int(np.prod(v.shape)) for v in lm.trainable_variables) * 4
        return (peak - before - gradients) / 2**30

    return step


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--vocabulary", type=int, default=128_000)
    flags.add_argument("--length", type=int, default=2048)
    flags.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return serve(lambda: child(args.child.split("/")[0], args.vocabulary))
    for backend in args.backends:
        needed = {}
        for loss in LOSSES:
            engine = Engine("benchmarks.loss_memory", f"{loss}/{backend}", "--vocabulary", str(args.vocabulary))
            engine.ask(32)
            started = time.perf_counter()
            needed[loss] = engine.ask(args.length)
            engine.close()
            print(f"  {backend}, {loss}: {needed[loss]:.2f} GiB ({time.perf_counter() - started:.0f} s)", flush=True)
        print(f"{backend}: {needed['chunked'] / needed['dense']:.2f} of the dense loss")
    return None


if __name__ == "__main__":
    main()
