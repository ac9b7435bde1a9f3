"""Training beside the peers in one run: tokens per second of `fit`, and peak memory of the process.

    python -m benchmarks.train [--shapes 4x256 1x2048] [--dtypes mixed_bfloat16 float32] [--rounds 3]
                               [--engines keras_llama/tensorflow keras_hub/tensorflow-graph ...] [--lora 8]

SmolLM2-135M's shape with random weights, AdamW, token cross-entropy on random ids. The engines take turns, several
rounds, each in a new process (together they would not fit into memory): a step to compile and two to warm up, then
two that count; medians over the rounds. "-graph" is Keras' `jit_compile=False`, "-xla" is True, "-remat" is
`remat="block"`; without them it is the engine's own choice. Memory is the peak of resident pages of the whole process,
or of what it held of the GPU. The limit is 6 x parameters x tokens (forward and backward, attention left out) over the
rate of a large matrix product by torch, measured here. With `--lora` adapters of that rank beside query and value are
trained, by PEFT where Transformers stands, and the limit is 4 x, as no gradient of a kernel is asked for.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.engines import BACKENDS, SHAPE, Engine, keras_hub_lm, keras_llama_lm, serve, transformers_lm
from benchmarks.machine import arithmetic, peak_memory

PARAMETERS = 134_515_008
STEPS = 2
WAYS = ("", "-graph", "-xla")
REMAT = "-remat"
ENGINES = (
    *(f"{name}/tensorflow{way}" for name in ("keras_llama", "keras_hub") for way in WAYS),
    *(f"{name}/{backend}" for name in ("keras_llama", "keras_hub") for backend in BACKENDS[1:]),
    *(f"keras_llama/{backend}{REMAT}" for backend in BACKENDS),
    "transformers/torch",
)
USUAL = (
    *(f"keras_llama/{backend}" for backend in BACKENDS),
    *("keras_hub/tensorflow-graph", "keras_hub/tensorflow-xla", "keras_hub/jax", "transformers/torch"),
)


def keras_engine(name: str, dtype: str, batch: int, rank: int):
    """A function that fits token ids (rows, T) with Keras."""
    import keras

    library, _, backend = name.partition("/")
    way = backend.partition("-")[2]
    jit = {"graph": False, "xla": True}.get(way, "auto")
    adam = keras.optimizers.AdamW(1e-4)
    if library == "keras_llama":
        lm = keras_llama_lm(dtype, remat="block" if way == "remat" else None)
        if rank:
            lm.enable_lora(rank, targets="query|value")
        lm.compile(adam, jit_compile=jit)
        return lambda ids: lm.fit(ids, batch_size=batch, shuffle=False, verbose=0)
    lm = keras_hub_lm(dtype)
    if rank:
        lm.backbone.enable_lora(rank)  # of itself beside query and value
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    lm.compile(optimizer=adam, loss=loss, weighted_metrics=["sparse_categorical_accuracy"], jit_compile=jit)

    def fit(ids):
        weights = np.ones(ids.shape, "float32")
        weights[:, -1] = 0
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        lm.fit(batches(inputs, np.roll(ids, -1, axis=1), weights), verbose=0)

    def batches(*arrays):
        """As a user who knows of the tuner of tf.data would hand them in: see `keras_llama.backend.stream`."""
        import tensorflow as tf

        options = tf.data.Options()
        options.autotune.enabled = False
        return tf.data.Dataset.from_tensor_slices(arrays).batch(batch).with_options(options)

    return fit


def transformers_engine(dtype: str, batch: int, rank: int):
    import torch

    half = dtype == "mixed_bfloat16"
    model = transformers_lm("float32" if half else dtype).train()
    if rank:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    adam = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-4)

    def fit(ids):
        for rows in torch.tensor(ids, dtype=torch.long, device=model.device).split(batch):
            adam.zero_grad()
            with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
                loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            adam.step()
        loss.item()  # a GPU has done it all by then

    return fit


def child(name: str, dtype: str, batch: int, length: int, rank: int) -> Callable[[int], tuple[float, float]]:
    """The seconds of so many steps, and the peak of memory so far, in GiB."""
    engine = transformers_engine if name.startswith("trans") else functools.partial(keras_engine, name)
    fit = engine(dtype, batch, rank)
    backend = name.split("/")[1].split("-")[0]

    def run(steps):
        ids = np.random.default_rng(0).integers(3, SHAPE["vocabulary_size"], (steps * batch, length)).astype("int32")
        started = time.perf_counter()
        fit(ids)
        seconds = time.perf_counter() - started
        return seconds, peak_memory(backend) / 2**30

    return run


def compare(engines: list[str], dtype: str, batch: int, length: int, rounds: int, rank: int) -> None:
    limit = arithmetic(dtype) / ((4 if rank else 6) * PARAMETERS)
    print(f"\n{dtype}, {batch} x {length}; arithmetic allows {limit:.0f} tokens/s")
    taken: list[dict[str, tuple[float, float, float]]] = [{} for _ in range(rounds)]
    for times in taken:
        for name in engines:
            flags = ("--dtypes", dtype, "--shapes", f"{batch}x{length}", "--lora", str(rank))
            engine = Engine("benchmarks.train", name, *flags)
            first = engine.ask(1)[0]
            engine.ask(STEPS)  # Keras' second `fit` is slower than those after it
            times[name] = (*engine.ask(STEPS), first)
            engine.close()
            print(f"    {name}: {STEPS * batch * length / times[name][0]:.0f} tokens/s", flush=True)
    speeds, memory, first = (
        {name: statistics.median(value(times[name]) for times in taken) for name in engines}
        for value in (lambda t: STEPS * batch * length / t[0], lambda t: t[1], lambda t: t[2])
    )
    for name in engines:
        print(f"  {name:28}{speeds[name]:7.0f} tokens/s{memory[name]:7.2f} GiB; first step {first[name]:.0f} s")
    for ours in (n for n in engines if n.startswith("keras_llama")):
        for other in (n for n in engines if not n.startswith("keras_llama")):
            ratio = statistics.median(t[other][0] / t[ours][0] for t in taken)
            print(f"  {ours} over {other}: {ratio:.2f} x the speed, {memory[ours] / memory[other]:.2f} x the memory")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--engines", nargs="+", choices=ENGINES, default=list(USUAL))
    flags.add_argument("--dtypes", nargs="+", default=["mixed_bfloat16", "float32"])
    flags.add_argument("--shapes", nargs="+", default=["4x256", "1x2048"], metavar="BxT")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--lora", type=int, default=0, metavar="RANK")
    flags.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    args = flags.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    if args.child:
        batch, length = shapes[0]
        return serve(lambda: child(args.child, args.dtypes[0], batch, length, args.lora))
    for dtype in args.dtypes:
        for batch, length in shapes:
            compare(args.engines, dtype, batch, length, args.rounds, args.lora)
    return None


if __name__ == "__main__":
    main()
