"""What copies of kernels gain: the products of a decoding step by the layout of its kernels and the number of rows.

    python -m benchmarks.layouts [--backends torch tensorflow jax] [--dtypes float32 bfloat16] [--rounds 20]

The kernels of SmolLM2-135M's blocks and head, random, each read once. "apart" has q, k, v, gate and up in kernels of
their own, as a model's weights are; "joined" those of one input as one; "packed" these as `backend.packed` has them.
Medians of whole turns, and the milliseconds that joining and packing take.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.engines import BACKENDS, SHAPE, Engine, serve

WIDTH, INNER, LAYERS = SHAPE["hidden_dim"], SHAPE["intermediate_dim"], SHAPE["num_layers"]
HEAD = WIDTH // SHAPE["num_query_heads"]
SHARED = SHAPE["num_key_value_heads"] * HEAD
GROUPS = [(WIDTH, (WIDTH, SHARED, SHARED)), (WIDTH, (WIDTH,)), (WIDTH, (INNER, INNER)), (INNER, (WIDTH,))] * LAYERS
GROUPS += [(WIDTH, (SHAPE["vocabulary_size"],))]
LAYOUTS = ("apart", "joined", "packed")
ROWS = (1, 2, 4, 8, 16, 32)


def child(layout: str, dtype: str) -> Callable:
    """Makes the kernels; the milliseconds of making them, or of a median turn with so many rows."""
    from keras import ops

    from keras_llama import backend

    random = np.random.default_rng(0)
    apart = [
        [ops.cast(ops.convert_to_tensor(random.normal(size=(width, n)).astype("float32")), dtype) for n in sizes]
        for width, sizes in GROUPS
    ]

    def arrange(groups):
        joined = [ops.concatenate(group, axis=-1) if len(group) > 1 else group[0] for group in groups]
        return [backend.packed(kernel, dtype) for kernel in joined] if layout == "packed" else joined

    def multiply(inputs, kernels):
        return [backend.multiply(x, kernel) for x, kernel in zip(inputs, kernels, strict=True)]

    started = time.perf_counter()
    if layout == "apart":
        kernels, widths = [kernel for group in apart for kernel in group], []
        for width, sizes in GROUPS:
            widths += [width] * len(sizes)
    else:
        kernels, widths = backend.Compiled(arrange, [], True)(apart), [width for width, _ in GROUPS]
    making = (time.perf_counter() - started) * 1e3
    call = backend.Compiled(multiply, [], True)

    def turn(rows, turns):
        made = {width: ops.cast(ops.ones((rows, width)), dtype) for width in (WIDTH, INNER)}
        inputs = [made[width] for width in widths]
        times = []
        for _ in range(turns + 1):
            started = time.perf_counter()
            ops.convert_to_numpy(ops.sum(call(inputs, kernels)[-1]))  # waits for what a device may still compute
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:]) * 1e3

    return lambda rows, turns: turn(rows, turns) if rows else making


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    flags.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    flags.add_argument("--rounds", type=int, default=20)
    flags.add_argument("--dtype", help=argparse.SUPPRESS)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return serve(lambda: child(args.child.split("/")[0], args.dtype))
    for backend in args.backends:
        for dtype in args.dtypes:
            print(f"\n{backend}, {dtype}: ms a step with {', '.join(map(str, ROWS))} rows")
            for layout in LAYOUTS:
                engine = Engine("benchmarks.layouts", f"{layout}/{backend}", "--dtype", dtype)
                times = [engine.ask(rows, args.rounds) for rows in ROWS]
                print(
                    f"  {layout:8}", *(f"{ms:6.1f}" for ms in times), f"  made in {engine.ask(0, 0):.0f} ms", flush=True
                )
                engine.close()
    return None


if __name__ == "__main__":
    main()
