"""Classifiers on one split: this project, the article's LSTMs, KerasHub, embeddings alone, a linear one.

    python -m benchmarks.classification [--data train.txt --test-data test.txt] [--epochs 4] [--seeds 0 1 2]
                                        [--models keras_llama lstm keras_hub embeddings linear] [--speed]

The split, the vocabulary and the validation rows are the recipe's, whose flags may follow. Each network trains for
`--epochs`, keeps the best epoch by the validation rows, and reads the test once; its seconds are told, not limited. One
process for each model and seed; "mean" are the probabilities of the seeds averaged. `--speed` instead measures examples
per second of `fit` at KerasHub's size without n-grams, in turns: both padded to the 99th percentile, and this project
with lengths as they are.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.engines import Engine, serve
from tasks import baselines, classification, classifiers, common

SIZE = "tiny"
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Peer:
    """A network that is not this project's, with its settings."""

    build: Callable
    learning_rate: float
    padded: bool = False


def masked_mean(hidden, mask):
    from keras import ops

    real = ops.expand_dims(ops.cast(mask, "float32"), -1)
    return ops.sum(hidden * real, axis=1) / ops.maximum(ops.sum(real, axis=1), 1.0)


def inputs():
    import keras

    return {name: keras.Input((None,), dtype="int32", name=name) for name in ("token_ids", "padding_mask")}


def lstm(vocabulary: int, classes: int):
    """The article's model: an embedding, three LSTMs, a dense layer."""
    import keras

    given = inputs()
    real = keras.ops.cast(given["padding_mask"], "bool")
    x = keras.layers.Dropout(0.3)(keras.layers.Embedding(vocabulary, 64)(given["token_ids"]))
    for last in (False, False, True):
        x = keras.layers.LSTM(128, return_sequences=not last)(x, mask=real)
    return keras.Model(given, keras.layers.Dense(classes)(keras.layers.Dropout(0.4)(x)))


def keras_hub(vocabulary: int, classes: int):
    import keras
    import keras_hub

    import keras_llama

    given = inputs()
    backbone = keras_hub.models.Llama3Backbone(vocabulary_size=vocabulary, **keras_llama.size(SIZE), dropout=0.1)
    pooled = masked_mean(backbone(given), given["padding_mask"])
    return keras.Model(given, keras.layers.Dense(classes)(keras.layers.Dropout(0.4)(pooled)))


def embeddings(vocabulary: int, classes: int):
    """This project's inputs, n-grams included, without blocks."""
    import keras

    from keras_llama.ngrams import NgramEmbedding

    given = inputs()
    x = keras.layers.Embedding(vocabulary, 128)(given["token_ids"])
    x += NgramEmbedding(buckets=65_536, width=128)(given["token_ids"], given["padding_mask"])
    pooled = masked_mean(keras.layers.Dropout(0.3)(x), given["padding_mask"])
    return keras.Model(given, keras.layers.Dense(classes)(keras.layers.Dropout(0.4)(pooled)))


PEERS = {
    "lstm": Peer(lstm, 2e-3),
    "keras_hub": Peer(keras_hub, 1e-3, padded=True),
    "embeddings": Peer(embeddings, 2e-3),
}
MODELS = ("keras_llama", *PEERS, "linear")


def batches(preprocessor, rows, labels, seed=None, length=None):
    """Token ids with one-hot rows, in the buckets of this project or padded to `length`."""
    from keras_llama import backend
    from keras_llama.batches import Batches

    ids = preprocessor.encode([row[0] for row in rows])
    ids = [row[:length] for row in ids]
    targets = np.eye(len(labels), dtype="float32")[[labels.index(row[1]) for row in rows]]

    def padded(chosen):
        chosen = [ids[i] for i in chosen]
        return preprocessor.pad({"token_ids": chosen}, length or max(map(len, chosen)))

    def finish(x, y, _):
        return x, y

    return backend.stream(
        Batches(padded, [len(row) for row in ids], finish, targets, batch_size=BATCH, shuffle_seed=seed)
    )


def percentile(preprocessor, rows) -> int:
    return int(np.percentile([len(row) for row in preprocessor.encode([row[0] for row in rows])], 99))


def settings(args, **changes) -> argparse.Namespace:
    """The recipe's flags with its defaults."""
    given = ["--data", args.data, "--test-data", args.test_data] if args.data else []
    flags = [*given, "--seed", str(args.seeds[0]), "--epochs", str(args.epochs), *args.flags]
    return argparse.Namespace(**{**vars(classification.parser().parse_args(flags)), **changes})


def train_peer(args, recipe, train, validation, asked, labels):
    """A peer: seconds, parameters, and its probabilities of the texts `asked`."""
    import keras

    peer = PEERS[args.child]
    preprocessor = classifiers.build(recipe, [row[0] for row in train], labels).preprocessor
    length = percentile(preprocessor, train) if peer.padded else None
    keras.utils.set_random_seed(recipe.seed)
    model = peer.build(preprocessor.tokenizer.vocabulary_size, len(labels))
    recipe.learning_rate, model.head = peer.learning_rate, "dense"
    model.compile(
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        **{**common.compile_options(model, recipe, len(train), recipe.epochs), "jit_compile": False},
    )
    best = keras.callbacks.EarlyStopping("val_accuracy", mode="max", patience=9, restore_best_weights=True)
    started = time.perf_counter()
    history = model.fit(
        batches(preprocessor, train, labels, recipe.seed, length),
        validation_data=batches(preprocessor, validation, labels, length=length),
        epochs=recipe.epochs,
        shuffle=False,
        callbacks=[best],
        verbose=0,
    )
    seconds = time.perf_counter() - started
    ids = preprocessor.encode([row[0] for row in asked])
    found = [model.predict(preprocessor.pad({"token_ids": [r[:length] for r in ids[i : i + 500]]}, length), verbose=0)
             for i in range(0, len(ids), 500)]  # fmt: skip
    return seconds, history.history, model.count_params(), np.asarray(keras.ops.softmax(np.concatenate(found)))


def train_project(args, recipe, train, validation, asked, labels):
    import keras

    keras.utils.set_random_seed(recipe.seed)
    texts = [row[0] for row in train]
    model = classifiers.build(recipe, texts, labels)
    started = time.perf_counter()
    if recipe.pretrain_epochs:
        classifiers.pretrain(recipe, [model], texts)
    history = classifiers.train(recipe, model, train, validation)
    seconds = time.perf_counter() - started
    logits = model.predict([row[0] for row in asked], verbose=0)
    return seconds, history, model.count_params(), np.asarray(model.probabilities(logits))


def child(args) -> None:
    recipe = settings(args)
    train, validation, test, labels = classification.load(recipe)
    asked = validation if args.part == "validation" else test
    if args.child == "linear":
        started = time.perf_counter()
        accuracy = baselines.linear_classifier(train + validation * (args.part == "test"), asked)
        print(json.dumps({"accuracy": accuracy, "seconds": time.perf_counter() - started}))
        return
    run: Any = train_project if args.child == "keras_llama" else train_peer
    seconds, history, parameters, shares = run(args, recipe, train, validation, asked, labels)
    np.savez(args.shares, shares=shares, truth=[labels.index(row[1]) for row in asked])
    told = {"seconds": seconds, "parameters": parameters, "epochs": len(history["loss"])}
    told["examples/s"] = len(train) * len(history["loss"]) / seconds
    print(json.dumps({**told, "validation": max(history["val_accuracy"])}))


def scores(shares, truth) -> str:
    from sklearn.metrics import f1_score

    found = shares.argmax(1)
    accuracy = (found == truth).mean()
    error = (accuracy * (1 - accuracy) / len(truth)) ** 0.5
    return f"accuracy {accuracy:.4f} ± {error:.4f}, macro F1 {f1_score(truth, found, average='macro'):.4f}"


def speed_child(args) -> Callable[[str], float]:
    """Examples a second of an epoch, by "padded" or "natural"."""
    import keras

    recipe = settings(args, ngram_buckets=0, dropout=0.1)
    train, *_, labels = classification.load(recipe)
    train = common.sample(train, 100 * BATCH)
    preprocessor = classifiers.build(recipe, [row[0] for row in train], labels).preprocessor
    length = percentile(preprocessor, train)
    if args.child == "keras_hub":
        model: Any = keras_hub(preprocessor.tokenizer.vocabulary_size, len(labels))
    else:
        model = classifiers.build(recipe, [row[0] for row in train], labels)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    jit: Any = "auto" if args.child == "keras_llama" else False
    model.compile(keras.optimizers.AdamW(1e-3), loss, metrics=["accuracy"], jit_compile=jit)

    def examples(lengths):
        data = batches(preprocessor, train, labels, 0, length if lengths == "padded" else None)
        started = time.perf_counter()
        keras.Model.fit(model, data, shuffle=False, verbose=0)
        return len(train) / (time.perf_counter() - started)

    return examples


def speed(args) -> None:
    flags = ["--speed", "--epochs", "1", *(["--data", args.data, "--test-data", args.test_data] if args.data else [])]
    names = ("keras_llama", "keras_hub")
    engines = {name: Engine("benchmarks.classification", f"{name}/tensorflow", *flags) for name in names}
    asked = [("keras_llama", "padded"), ("keras_llama", "natural"), ("keras_hub", "padded")]
    for name, lengths in asked:
        engines[name].ask(lengths)
    taken = [{one: engines[one[0]].ask(one[1]) for one in asked} for _ in range(args.rounds)]
    for one in asked:
        ratio = statistics.median(times[one] / times[asked[2]] for times in taken)
        print(f"{one[0]}, {one[1]}: {statistics.median(t[one] for t in taken):.0f} examples/s, {ratio:.2f} of KerasHub")
    for engine in engines.values():
        engine.close()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data")
    flags.add_argument("--test-data")
    flags.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    flags.add_argument("--epochs", type=int, default=4, help="of each network")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--part", choices=("validation", "test"), default="test")
    flags.add_argument("--speed", action="store_true")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--shares", help=argparse.SUPPRESS)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args, rest = flags.parse_known_args()
    args.flags = rest
    if args.child and args.speed:
        args.child = args.child.split("/")[0]
        return serve(lambda: speed_child(args))
    if args.child:
        return child(args)
    if args.speed:
        return speed(args)
    for model in args.models:
        together = []
        for seed in args.seeds if model != "linear" else [0]:
            with tempfile.NamedTemporaryFile(suffix=".npz") as shares:
                command = [sys.executable, "-m", "benchmarks.classification", "--child", model, "--seeds", str(seed)]
                command += ["--epochs", str(args.epochs), "--part", args.part, "--shares", shares.name, *args.flags]
                command += ["--data", args.data, "--test-data", args.test_data] if args.data else []
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                told = {name: round(value, 4) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
                if model == "linear":
                    print(f"{model}: {told}", flush=True)
                    continue
                found = np.load(shares.name)
            together.append(found["shares"])
            print(f"{model}, seed {seed}: {scores(together[-1], found['truth'])}; {told}", flush=True)
        if len(together) > 1:
            print(f"{model}, mean of {len(together)}: {scores(np.mean(together, axis=0), found['truth'])}", flush=True)
    return None


if __name__ == "__main__":
    main()
