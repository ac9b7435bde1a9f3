"""What a training step holds beyond weights, gradients and optimiser state: the chunked loss beside the dense one.

    python -m benchmarks.loss_memory [--vocabulary 128000] [--length 2048] [--backends tensorflow jax torch]

SmolLM2-135M's blocks with `remat="block"`, one row of tokens, AdamW, float32. Each loss has a process of its own. It
takes a step with a short row first; then memory is what the step with the long row takes above the level before it,
less the bytes of the gradients. On JAX and torch that is RssAnon, read every 2 ms. TensorFlow gives no memory back to
the system, so there it is the bytes that its allocator has handed out, by its profiler.
"""

import argparse
import contextlib
import glob
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.engines import BACKENDS, SHAPE, Engine, keras_llama_lm, serve
from benchmarks.machine import process_peak

LOSSES = ("chunked", "dense")


def child(loss: str, vocabulary: int) -> Callable[[int], float]:
    """The GiB that a step of so many tokens needs."""
    import keras

    lm = keras_llama_lm("float32", {**SHAPE, "vocabulary_size": vocabulary}, remat="block")
    lm.compile(keras.optimizers.AdamW(1e-4))
    lm.chunked = loss == "chunked"

    def step(length):
        ids = np.random.default_rng(0).integers(3, vocabulary, (1, length)).astype("int32")
        with (tensorflow_peak if keras.backend.backend() == "tensorflow" else process_peak)() as above:
            lm.fit(ids, verbose=0)
        gradients = sum(int(np.prod(v.shape)) for v in lm.trainable_variables) * 4
        return (above() - gradients) / 2**30

    return step


@contextlib.contextmanager
def tensorflow_peak():
    """The same of what TensorFlow's allocator on the CPU has handed out."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

    levels: list = []
    with tempfile.TemporaryDirectory() as folder:
        options = tf.profiler.experimental.ProfilerOptions(host_tracer_level=3, python_tracer_level=0)
        with tf.profiler.experimental.Profile(folder, options):
            yield lambda: max(levels) - levels[0]
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        with open(path, "rb") as file:
            planes = XSpace.FromString(file.read()).planes
    for plane in planes:
        names = {key: value.name for key, value in plane.event_metadata.items()}
        stats = {key: value.name for key, value in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                if names[event.metadata_id] in ("MemoryAllocation", "MemoryDeallocation"):
                    found = {stats[stat.metadata_id]: stat for stat in event.stats}
                    when = line.timestamp_ns * 1000 + event.offset_ps
                    levels.append((when, found["bytes_allocated"].int64_value))
    levels[:] = [level for _, level in sorted(levels)]


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
