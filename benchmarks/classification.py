"""Classifiers on one split: this project, the article's LSTMs, KerasHub, embeddings alone, a linear one.

    python -m benchmarks.classification [--data train.txt --test-data test.txt] [--epochs 4] [--seeds 0 1 2]
                                        [--models keras_llama lstm keras_hub embeddings linear]

The split, the vocabulary, the validation rows and the batch size are the recipe's, whose flags may follow. Each network
trains for `--epochs`, keeps the best epoch by the validation rows if there are any, and reads the test once; its
seconds are told, not limited. One process for each model and seed; "mean" are the probabilities of the seeds averaged.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.classification_peers import PEERS, batches, percentile
from tasks import baselines, classification, classifiers, common

MODELS = ("keras_llama", *PEERS, "linear")


def settings(args) -> argparse.Namespace:
    """The recipe's flags with its defaults."""
    given = ["--data", args.data, "--test-data", args.test_data] if args.data else []
    flags = [*given, "--seed", str(args.seeds[0]), "--epochs", str(args.epochs), *args.flags]
    return classification.parser().parse_args(flags)


def train_peer(args, recipe, train, validation, asked, labels):
    """A peer: seconds, parameters, and its probabilities of the texts `asked`."""
    import keras

    peer = PEERS[args.child]
    classifier = classifiers.build(recipe, [row[0] for row in train], labels)
    preprocessor = classifier.preprocessor
    length = percentile(preprocessor, train) if peer.padded else None
    keras.utils.set_random_seed(recipe.seed)
    model = peer.build(classifier, len(labels))
    recipe.learning_rate, model.head = peer.learning_rate, "dense"
    model.compile(
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        **{**common.compile_options(model, recipe, len(train), recipe.epochs), "jit_compile": False},
    )
    best = keras.callbacks.EarlyStopping("val_accuracy", mode="max", patience=9, restore_best_weights=True)
    held = batches(preprocessor, validation, labels, recipe.batch_size, length=length) if validation else None
    started = time.perf_counter()
    history = model.fit(
        batches(preprocessor, train, labels, recipe.batch_size, recipe.seed, length),
        validation_data=held,
        epochs=recipe.epochs,
        shuffle=False,
        callbacks=[best] if validation else [],
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
    model = classifiers.build(recipe, [row[0] for row in train], labels)
    more = classification.unlabelled(recipe)
    started = time.perf_counter()
    _, (history,), _ = classifiers.fit(recipe, [model], more, train, validation)
    seconds = time.perf_counter() - started
    logits = model.predict([row[0] for row in asked], verbose=0)
    return seconds, history, model.count_params(), np.asarray(model.probabilities(logits))


def train_linear(args, recipe, train, validation, asked, labels):
    """The floor, which has no use for validation rows but to learn from them where the test is asked."""
    started = time.perf_counter()
    found = baselines.linear_labels(train + validation * (args.part == "test"), [row[0] for row in asked])
    seconds = time.perf_counter() - started
    return seconds, {}, 0, np.eye(len(labels))[[labels.index(label) for label in found]]


def child(args) -> None:
    recipe = settings(args)
    train, validation, test, labels = classification.load(recipe)
    asked = validation if args.part == "validation" else test
    run: Any = {"keras_llama": train_project, "linear": train_linear}.get(args.child, train_peer)
    seconds, history, parameters, shares = run(args, recipe, train, validation, asked, labels)
    np.savez(args.shares, shares=shares, truth=[labels.index(row[1]) for row in asked])
    told = {"seconds": seconds}
    if epochs := len(history.get("loss", [])):
        told |= {"parameters": parameters, "epochs": epochs, "examples/s": len(train) * epochs / seconds}
    if "val_accuracy" in history:
        told["validation"] = max(history["val_accuracy"])
    print(json.dumps(told))


def scores(shares, truth) -> str:
    from sklearn.metrics import f1_score

    found = shares.argmax(1)
    accuracy = (found == truth).mean()
    error = classification.standard_error(accuracy, len(truth))
    return f"accuracy {accuracy:.4f} ± {error:.4f}, macro F1 {f1_score(truth, found, average='macro'):.4f}"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data")
    flags.add_argument("--test-data")
    flags.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    flags.add_argument("--epochs", type=int, default=4, help="of each network")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--part", choices=("validation", "test"), default="test")
    flags.add_argument("--shares", help=argparse.SUPPRESS)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args, rest = flags.parse_known_args()
    args.flags = rest
    if args.child:
        return child(args)
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
                found = np.load(shares.name)
            together.append(found["shares"])
            print(f"{model}, seed {seed}: {scores(together[-1], found['truth'])}; {told}", flush=True)
        if len(together) > 1:
            print(f"{model}, mean of {len(together)}: {scores(np.mean(together, axis=0), found['truth'])}", flush=True)
    return None


if __name__ == "__main__":
    main()
