"""Would weight-only int8 or int4 make decoding faster? Products of one row by the kernels of a step, in five ways.

    python -m benchmarks.int8 [--backends tensorflow jax torch] [--ways float32 ...] [--rounds 20]

The kernels of SmolLM2-135M's blocks and head, random, each read once: the products alone of a step with one prompt.
int8 kernels have a scale for each column, and are cast inside of the compiled function; Keras' own `Dense.quantize`
rounds the row that comes in, too (its int4: two numbers in a byte). The error is that of the product, relative to its
largest number.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.engines import BACKENDS, SHAPE, Engine, serve

WAYS = ("float32", "bfloat16", "int8", "keras int8", "keras int4")
WIDTH, INNER = SHAPE["hidden_dim"], SHAPE["intermediate_dim"]
KERNELS = [(WIDTH, 960), (WIDTH, WIDTH), (WIDTH, 2 * INNER), (INNER, WIDTH)] * SHAPE["num_layers"]
KERNELS += [(WIDTH, SHAPE["vocabulary_size"])]


def products(way: str, kernels: list[np.ndarray]) -> tuple[Callable, list, list]:
    """A function (rows by width, arrays) -> the products of all kernels; these arrays; the variables that it reads."""
    import keras
    from keras import ops

    if way.startswith("keras "):
        layers = [keras.layers.Dense(kernel.shape[1], use_bias=False) for kernel in kernels]
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.build((1, len(kernel)))
            layer.kernel.assign(kernel)
            layer.quantize(way.removeprefix("keras "))
        named = [(len(kernel), layer) for kernel, layer in zip(kernels, layers, strict=True)]
        variables = [variable for layer in layers for variable in layer.variables]
        return lambda rows, _: [layer(rows[width]) for width, layer in named], [], variables
    if way == "int8":
        scales = [np.abs(kernel).max(axis=0) / 127 for kernel in kernels]
        whole = [np.round(kernel / scale).astype("int8") for kernel, scale in zip(kernels, scales, strict=True)]
        pairs = list(zip(whole, scales, strict=True))
        return (
            lambda rows, pairs: [ops.matmul(rows[w.shape[0]], ops.cast(w, "float32")) * s for w, s in pairs],
            pairs,
            [],
        )
    arrays = [ops.cast(ops.convert_to_tensor(kernel), way) for kernel in kernels]
    return lambda rows, arrays: [ops.matmul(ops.cast(rows[a.shape[0]], way), a) for a in arrays], arrays, []


def child(way: str) -> Callable[[int], tuple[float, float]]:
    """The median of so many turns, in ms, and the error of the head's product."""
    import keras

    from keras_llama import backend

    random = np.random.default_rng(0)
    kernels = [random.normal(size=shape).astype("float32") for shape in KERNELS]
    rows = {width: random.normal(size=(1, width)).astype("float32") for width in (WIDTH, INNER)}
    function, arrays, variables = products(way, kernels)
    call = backend.Compiled(function, variables, jit_compile=True)
    given = keras.tree.map_structure(keras.ops.convert_to_tensor, (rows, arrays))

    def run(turns):
        times = []
        for _ in range(turns + 1):
            started = time.perf_counter()
            found = keras.ops.convert_to_numpy(keras.ops.cast(call(*given)[-1], "float32"))
            times.append(time.perf_counter() - started)
        exact = rows[WIDTH] @ kernels[-1]
        return statistics.median(times[1:]) * 1e3, float(np.abs(found - exact).max() / np.abs(exact).max())

    return run


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    flags.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    flags.add_argument("--rounds", type=int, default=20)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return serve(lambda: child(args.child.split("/")[0]))
    for backend in args.backends:
        for way in args.ways:
            engine = Engine("benchmarks.int8", f"{way}/{backend}")
            ms, error = engine.ask(args.rounds)
            engine.close()
            print(f"{backend:12}{way:12}{ms:8.1f} ms a step, error {error:.4f}", flush=True)
    return None


if __name__ == "__main__":
    main()
