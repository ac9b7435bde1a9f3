"""The exported causal LM beside the one in process: speed of the greedy loop, of the tokenizers, time and size.

    python -m benchmarks.export [--preset smollm2_135m_instruct] [--rounds 5] [--jit] [--data DIRECTORY]

One process on TensorFlow; the two take turns, and medians count. One prompt, 128 new tokens, no stop tokens, float32.
Tokens per second are those of the whole call, tokenizers included. `--data` adds the tokenizers of Llama 2 and 3.
"""

import argparse
import functools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "tensorflow"

import tensorflow as tf

import keras_llama
from benchmarks.tokenize_speed import texts
from keras_llama.opening import open_tokenizer

PROMPT = "The river ran through the valley, and on its banks the old town"
NEW = 128


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def taken(signature, lines: list[str]) -> float:
    """Seconds that a signature of texts takes."""
    texts = tf.constant(lines)
    return seconds(lambda: signature(texts))


def loop(args) -> None:
    lm = keras_llama.LlamaCausalLM.from_preset(args.preset, dtype="float32")
    lm.generation_config = {"eos_token_id": [], "max_new_tokens": NEW, "temperature": 0.0}
    weights = 4 * lm.count_params()
    with tempfile.TemporaryDirectory() as folder:
        needed = seconds(lambda: lm.export(folder, jit=args.jit))
        size = sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*"))
        loaded = tf.saved_model.load(folder)
    print(
        f"export {needed:.1f} s, {size / 1e6:.1f} MB, {(size - 1.05 * weights) / 1e6:.1f} MB above 1.05 x the weights"
    )
    serve, asked = loaded.signatures["serving_default"], tf.constant([PROMPT])
    calls = {"in process": lambda: [lm.generate(PROMPT)], "exported": lambda: serve(asked)["texts"].numpy().tolist()}
    written = {name: call()[0] for name, call in calls.items()}  # traces and compiles
    print("the same text" if written["exported"].decode() == written["in process"] else f"DIFFERENT: {written}")
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(args.rounds)]
    for name in calls:
        print(f"{name}: {NEW / statistics.median(turn[name] for turn in rounds):.1f} tokens/s")
    ratio = statistics.median(turn["in process"] / turn["exported"] for turn in rounds)
    print(f"exported over in process, median of {args.rounds} rounds: {ratio:.2f}")


def tokenizers(args) -> None:
    found = {args.preset: keras_llama.LlamaCausalLM.from_preset(args.preset).preprocessor.tokenizer}
    lines = [f"{PROMPT}, number {i}." for i in range(20_000)]
    if args.data is not None:
        lines = texts(args.data)
        for name in ("llama2", "llama3"):
            model = args.data / f"checkpoints/{name}_tokenizer/tokenizer.model"
            found[name] = open_tokenizer({model.name: model.read_bytes()})
    for name, tokenizer in found.items():
        backbone = keras_llama.LlamaBackbone(vocabulary_size=tokenizer.vocabulary_size, **keras_llama.size("tiny"))
        lm = keras_llama.LlamaCausalLM(backbone, keras_llama.TextPreprocessor(tokenizer, 64))
        with tempfile.TemporaryDirectory() as folder:
            lm.export(folder)
            loaded = tf.saved_model.load(folder)
        encode = functools.partial(taken, loaded.signatures["tokenize"])
        encode(lines[:64])
        many, one = min(encode(lines) for _ in range(args.rounds)), [encode(["A short line."]) for _ in range(100)]
        told = f"{len(lines) / many:,.0f} lines/s in one batch, one short line {1e3 * statistics.median(one):.1f} ms"
        print(f"tokenizer of {name}: {told}")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--preset", default="smollm2_135m_instruct")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--jit", action="store_true")
    flags.add_argument("--data", type=pathlib.Path, help="has translation/, generation/ and checkpoints/")
    args = flags.parse_args()
    loop(args)
    tokenizers(args)


if __name__ == "__main__":
    main()
