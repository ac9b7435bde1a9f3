"""What a training step takes on torch besides its products, this project beside PEFT and Transformers in one run.

    python -m benchmarks.overhead [--dtypes mixed_bfloat16 bfloat16] [--lora 8] [--shapes 4x256] [--rounds 5]

The steps are those of `benchmarks.train`, on a CPU. Products of matrices and fused attention are counted, by operation
and dtype, but not computed: what they return is an array that nothing is written to. What is left, work on elements and
on memory, a processor without arithmetic for bfloat16 does, too, while a product takes it a hundred times as long as in
float32. Both engines pay for each operation's way through Python, some 20 microseconds, and neither for the first touch
of what a product would have written. Ratios are those of each round, of which the median is told.
"""

import argparse
import statistics
import time
from collections import Counter

import numpy as np

from benchmarks.engines import SHAPE, Engine, serve
from benchmarks.train import keras_engine, transformers_engine

OURS, THEIRS = ENGINES = ("keras_llama/torch", "transformers/torch")
STEPS = 2
# Parts of the names of what computes products.
PRODUCTS = ("mm", "mv", "attention", "linear", "matmul", "conv", "dot")


def without_products(counts: Counter):
    """A scope in which torch computes no product on a CPU; `counts` gets how many and their floating-point operations.

    Of attention these are those of all keys, also where it is causal and the kernel may leave some out.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    its_gradient = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def product(*inputs):
        left, right = inputs[-2:]
        return left.new_empty((*left.shape[:-1], right.shape[-1])), 2 * left.numel() * right.shape[-1]

    def attended(query, key, value):
        scale = query.new_empty(query.shape[:-1], dtype=torch.float32)
        return (torch.empty_like(query), scale), 4 * query.numel() * key.shape[-2]

    def attention_gradient(upstream, query, key, *_):
        # The kernel writes (B, T, N, H), whatever the order of what comes in.
        found = (torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype) for x in (query, key, key))
        return tuple(found), 10 * query.numel() * key.shape[-2]

    known = {kind.default: product for kind in (aten.mm, aten.bmm, aten.addmm)}
    known |= {attention: attended, its_gradient: attention_gradient}

    class WithoutProducts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts["operations"] += 1
            kind = str(function)
            if function not in known:
                if any(part in kind for part in PRODUCTS):
                    raise RuntimeError(f"{kind} may be a product, and this benchmark does not know it.")
                return function(*args, **(kwargs or {}))
            arrays = [x for x in args if isinstance(x, torch.Tensor)]
            found, operations = known[function](*arrays)
            causal = " causal" if any(x is True for x in args) else ""
            counts[f"GFLOP of {kind}{causal} in {arrays[1].dtype}"] += operations / 1e9
            return found

    return WithoutProducts()


def child(name: str, dtype: str, batch: int, length: int, rank: int):
    """The seconds of so many steps, and what one of them counts."""
    import torch

    torch.set_flush_denormal(True)  # in arrays that nothing is written to there may be any numbers
    fit = transformers_engine(dtype, batch, rank) if name == THEIRS else keras_engine(name, dtype, batch, rank)

    def run(steps):
        ids = np.random.default_rng(0).integers(3, SHAPE["vocabulary_size"], (steps * batch, length)).astype("int32")
        counts: Counter = Counter()
        with without_products(counts):
            started = time.perf_counter()
            fit(ids)
            seconds = time.perf_counter() - started
        return seconds, {kind: count / steps for kind, count in counts.items()}

    return run


def compare(dtype: str, batch: int, length: int, rank: int, rounds: int) -> None:
    flags = ("--dtypes", dtype, "--shapes", f"{batch}x{length}", "--lora", str(rank))
    engines = {name: Engine("benchmarks.overhead", name, *flags) for name in ENGINES}
    taken: dict[str, list[float]] = {name: [] for name in ENGINES}
    print(f"\n{dtype}, {batch} x {length}, rank {rank}")
    for name, engine in engines.items():
        engine.ask(1)  # Keras goes through a model once more when it is built
        _, counts = engine.ask(STEPS)
        for kind, count in counts.items():
            print(f"  {name:20}{count:8.1f} {kind}")
    for _ in range(rounds):
        for name, engine in engines.items():
            taken[name].append(engine.ask(STEPS)[0] / STEPS)
    for name, engine in engines.items():
        engine.close()
        seconds = taken[name]
        print(f"  {name:20}{statistics.median(seconds):6.2f} s a step ({min(seconds):.2f} to {max(seconds):.2f})")
    ratios = [theirs / ours for ours, theirs in zip(taken[OURS], taken[THEIRS], strict=True)]
    print(f"  {THEIRS} over {OURS}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--dtypes", nargs="+", default=["mixed_bfloat16", "bfloat16"])
    flags.add_argument("--shapes", nargs="+", default=["4x256"], metavar="BxT")
    flags.add_argument("--lora", type=int, default=8, metavar="RANK")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    args = flags.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    if args.child:
        batch, length = shapes[0]
        return serve(lambda: child(args.child, args.dtypes[0], batch, length, args.lora))
    for dtype in args.dtypes:
        for batch, length in shapes:
            compare(dtype, batch, length, args.lora, args.rounds)
    return None


if __name__ == "__main__":
    main()
