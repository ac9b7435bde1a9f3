"""A classifier on a pretrained base, from few rows, beside two floors.

    python -m benchmarks.fine_tuning --data ag_news_7600.csv --rows 200 --draws 0 1 2 [--trainable head] [--epochs 30]

2,000 rows, always the same, are the test; each draw takes `--rows` of the others to train on. Beside it stand TF-IDF
with a linear support vector machine, and a logistic regression on the frozen base's mean vectors, its strength chosen
by cross-validation. Flags of `tasks.classification` may follow. With `--part validation` 2,000 rows that no draw trains
on stand for the test, for choices.
"""

import argparse
import time
from typing import Any

import numpy as np

from tasks import baselines, classification, classifiers, common, data

TEST = 2000


def settings(args, rest) -> argparse.Namespace:
    """The recipe's flags, with defaults for a pretrained base."""
    given = {"preset": "smollm2_135m_instruct", "sequence_length": 64, "batch_size": 32, "validation_share": 0.0}
    parser = classification.parser()
    parser.set_defaults(**given, trainable="head", epochs=30, learning_rate=1e-3, label_smoothing=0.0)
    return parser.parse_args(["--data", args.data, *rest])


def parts(rows, part: str) -> tuple[list, list]:
    """The rows to draw from, and those to be asked."""
    order = np.random.default_rng(0).permutation(len(rows))
    test, held, drawn = order[:TEST], order[-TEST:], order[TEST:-TEST] if part == "validation" else order[TEST:]
    return [rows[i] for i in drawn], [rows[i] for i in (held if part == "validation" else test)]


def regression(vectors, labels, asked) -> np.ndarray:
    """Labels by a logistic regression on vectors."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    strengths = LogisticRegressionCV(Cs=[1e-4, 1e-3, 1e-2, 1e-1], cv=5, max_iter=1000)
    return make_pipeline(StandardScaler(), strengths).fit(vectors, labels).predict(asked)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True)
    flags.add_argument("--rows", type=int, default=200)
    flags.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--part", choices=("validation", "test"), default="test")
    args, rest = flags.parse_known_args()
    recipe = settings(args, rest)
    import keras

    rows = data.labelled_texts(args.data)
    drawn, asked = parts(rows, args.part)
    labels, truth = sorted({row[1] for row in rows}), np.array([row[1] for row in asked])
    base: Any = classifiers.build(recipe, [], labels)
    texts = [row[0] for row in asked]
    started = time.perf_counter()
    vectors = base.features(texts)
    print(f"vectors of {len(texts)} texts: {time.perf_counter() - started:.0f} s", flush=True)
    for draw in args.draws:
        keras.utils.set_random_seed(draw)
        train = [drawn[i] for i in np.random.default_rng(draw).permutation(len(drawn))[: args.rows]]
        model = classifiers.build(recipe, [], labels)
        common.choose_trainable(model, recipe)
        started = time.perf_counter()
        classifiers.train(recipe, model, train, [])
        seconds = time.perf_counter() - started
        if recipe.trainable == "head":
            found = keras.Model(model.get_layer(model.pooled).output, model.output).predict(vectors, verbose=0)
        else:
            found = model.predict(texts, verbose=0)
        known = base.features([row[0] for row in train])
        frozen = regression(known, [row[1] for row in train], vectors) == truth
        right = np.array(labels)[found.argmax(1)] == truth
        error = (right.mean() * (1 - right.mean()) / len(right)) ** 0.5
        print(
            f"draw {draw}: {100 * right.mean():.2f} ± {100 * error:.2f} in {seconds:.0f} s of training; TF-IDF + "
            f"LinearSVC {100 * baselines.linear_classifier(train, asked):.2f}, frozen vectors + logistic regression "
            f"{100 * frozen.mean():.2f} (right where it errs {(right & ~frozen).sum()}, the reverse "
            f"{(~right & frozen).sum()})",
            flush=True,
        )


if __name__ == "__main__":
    main()
