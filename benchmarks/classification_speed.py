"""Examples per second of training a classifier, beside KerasHub's `Llama3Backbone` of the same size.

    python -m benchmarks.classification_speed [--data train.txt --test-data test.txt] [--rounds 5] [--size tiny]

The flags of the recipe may follow. `fit` in one pass without n-grams, TensorFlow, in turns: both padded to the 99th
percentile, and this project with lengths as they are.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.classification_peers import batches, keras_hub, percentile
from benchmarks.engines import Engine, serve
from tasks import classification, classifiers, common

BATCHES, BATCH = 50, 128


def child(library: str, data: list[str]) -> Callable[[str], float]:
    """Examples a second of an epoch, by "padded" or "natural"."""
    import keras

    flags = ["--ngram-count", "0", "--embedding-dropout", "0.1", "--r-drop", "0"]
    recipe = classification.parser().parse_args([*data, *flags])
    train, *_, labels = classification.load(recipe)
    train = common.sample(train, BATCHES * BATCH)
    texts = [row[0] for row in train]
    model: Any = classifiers.build(recipe, texts, labels)
    preprocessor = model.preprocessor
    length = percentile(preprocessor, train)
    if library == "keras_hub":
        model = keras_hub(model, len(labels))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    jit: Any = "auto" if library == "keras_llama" else False
    model.compile(keras.optimizers.AdamW(1e-3), loss, metrics=["accuracy"], jit_compile=jit)

    def examples(lengths):
        rows = batches(preprocessor, train, labels, BATCH, 0, length if lengths == "padded" else None)
        started = time.perf_counter()
        keras.Model.fit(model, rows, shuffle=False, verbose=0)
        return len(train) / (time.perf_counter() - started)

    return examples


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data")
    flags.add_argument("--test-data")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args, rest = flags.parse_known_args()
    data = [*rest, *(["--data", args.data, "--test-data", args.test_data] if args.data else [])]
    if args.child:
        return serve(lambda: child(args.child.split("/")[0], data))
    names = ("keras_llama", "keras_hub")
    engines = {name: Engine("benchmarks.classification_speed", f"{name}/tensorflow", *data) for name in names}
    asked = [("keras_llama", "padded"), ("keras_llama", "natural"), ("keras_hub", "padded")]
    for name, lengths in asked:
        engines[name].ask(lengths)
    taken = [{one: engines[one[0]].ask(one[1]) for one in asked} for _ in range(args.rounds)]
    for one in asked:
        ratio = statistics.median(times[one] / times[asked[2]] for times in taken)
        print(f"{one[0]}, {one[1]}: {statistics.median(t[one] for t in taken):.0f} examples/s, {ratio:.2f} of KerasHub")
    for engine in engines.values():
        engine.close()
    return None


if __name__ == "__main__":
    main()
