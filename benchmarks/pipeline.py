"""What making batches costs beside the steps: seconds of tokenizing and of batches in one epoch of `fit`.

    python -m benchmarks.pipeline [--backends tensorflow jax torch] [--rows 6400]

A small classifier, whose steps are short: 64 rows of 20 to 60 words a step, drawn from a vocabulary of
two thousand. TensorFlow makes batches in another thread, ahead of the steps, so that its share is an upper bound.
"""

import argparse
import time

import numpy as np

from benchmarks.engines import BACKENDS, Engine, serve


def timed(owner, name: str, taken: list[float]) -> None:
    """Has a method of a class note how long each call takes."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            taken.append(time.perf_counter() - started)

    setattr(owner, name, call)


def child():
    import keras_llama
    from keras_llama.batches import Batches

    random = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in random.integers(0, 26, 6)) for _ in range(2_000)]
    tokenizer = keras_llama.SentencePieceTokenizer.train(words, vocabulary_size=1_000)
    backbone = keras_llama.LlamaBackbone(vocabulary_size=1_000, **keras_llama.size("tiny"), causal=False)
    classifier = keras_llama.LlamaTextClassifier(
        backbone, labels=["a", "b"], preprocessor=keras_llama.TextPreprocessor(tokenizer, 256), pooling="mean"
    )
    classifier.compile()
    tokenizing: list[float] = []
    batches: list[float] = []
    timed(keras_llama.TextPreprocessor, "encode", tokenizing)
    timed(Batches, "__getitem__", batches)

    def epoch(rows):
        texts = [" ".join(random.choice(words, random.integers(20, 61))) for _ in range(rows)]
        labels = [("a", "b")[i % 2] for i in range(rows)]
        tokenizing.clear()
        batches.clear()
        started = time.perf_counter()
        classifier.fit(texts, labels, batch_size=64, verbose=0)
        return time.perf_counter() - started, sum(tokenizing), sum(batches)

    return epoch


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    flags.add_argument("--rows", type=int, default=6_400)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return serve(child)
    for backend in args.backends:
        engine = Engine("benchmarks.pipeline", f"keras_llama/{backend}")
        engine.ask(args.rows)  # compiles
        whole, tokenizing, batches = engine.ask(args.rows)
        engine.close()
        print(
            f"{backend:12} epoch {whole:.1f} s; tokenizing {tokenizing:.2f} s, {tokenizing / whole:.1%};"
            f" batches {batches:.2f} s, {batches / whole:.1%}",
            flush=True,
        )
    return None


if __name__ == "__main__":
    main()
