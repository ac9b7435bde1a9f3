"""A classifier on a pretrained base, from few rows, beside two floors.

    python -m benchmarks.fine_tuning --data ag_news_7600.csv --rows 200 --draws 0 1 2 [--trainable head] [--epochs 30]
                                     [--vectors vectors.npz] [--floors svm regression]

2,000 rows, always the same, are the test; each draw takes `--rows` of the others to train on. Beside it stand TF-IDF
with a linear support vector machine, and a logistic regression on mean vectors of the whole frozen base, its strength
chosen by cross-validation; its vectors, which take long, are kept in `--vectors`. With `--averaged` the model's
probabilities are averaged with those of a second one, a head on the frozen base or on the first `--frozen-layers` of
its blocks (`fit_head`, 30 epochs, rate 1e-3), whose seconds hold the vectors that no file or draw before has. Flags of
`tasks.classification` may follow. With `--part validation` 2,000 rows that no draw trains on stand for the test, for
choices.
"""

import argparse
import os
import time

import numpy as np

from tasks import baselines, classification, classifiers, common, data

TEST = 2000
FLOORS = ("svm", "regression")


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


class Frozen:
    """The base's mean vectors, which are computed once for each text and kept in a file, if any."""

    def __init__(self, base, path: str | None):
        self.base, self.path = base, path
        self.vectors: dict[str, np.ndarray] = {}
        if path and os.path.exists(path):
            with np.load(path) as kept:
                self.vectors = dict(zip(kept["texts"].tolist(), kept["vectors"], strict=True))

    def __call__(self, texts: list[str]) -> np.ndarray:
        if missing := [text for text in dict.fromkeys(texts) if text not in self.vectors]:
            found = np.asarray(self.base.features(missing), "float32")  # a file knows no bfloat16
            self.vectors.update(zip(missing, found, strict=True))
            if self.path:
                np.savez(self.path, texts=[*self.vectors], vectors=[*self.vectors.values()])
        return np.stack([self.vectors[text] for text in texts])


def beside(args, frozen: Frozen, train, texts: list[str]):
    """Probabilities by a head on the frozen base, whose vectors are known."""
    import keras

    settings = {"trainable": "head", "epochs": 30, "learning_rate": 1e-3, "batch_size": 32}
    args = argparse.Namespace(**{**vars(args), **settings})
    model = classifiers.head(args, frozen.base.backbone, frozen.base.labels)
    vectors = frozen([row[0] for row in train])
    classifiers.train(args, model, [(vector, *row[1:]) for vector, row in zip(vectors, train, strict=True)], [])
    head = keras.Model(model.head_input, model.output)
    return model.probabilities(head.predict(frozen(texts), verbose=0))


def told(start: str, right: np.ndarray, seconds: float) -> None:
    error = classification.standard_error(right.mean(), len(right))
    print(f"{start} {100 * right.mean():.2f} ± {100 * error:.2f} in {seconds:.0f} s", flush=True)


def compared(name: str, right: np.ndarray, floor: np.ndarray) -> str:
    """A floor's accuracy, and on how many rows one is right where the other errs."""
    better, worse = (right & ~floor).sum(), (~right & floor).sum()
    return f"  {name} {100 * floor.mean():.2f} (right where it errs {better}, the reverse {worse})"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True)
    flags.add_argument("--rows", type=int, default=200)
    flags.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--part", choices=("validation", "test"), default="test")
    flags.add_argument("--vectors", metavar="FILE")
    flags.add_argument("--averaged", action="store_true")
    flags.add_argument("--frozen-layers", type=common.positive, help="blocks of the frozen base; all unless given")
    flags.add_argument("--floors", nargs="*", choices=FLOORS, default=FLOORS)
    args, rest = flags.parse_known_args()
    recipe = settings(args, rest)
    import keras

    rows = data.labelled_texts(args.data)
    drawn, asked = parts(rows, args.part)
    labels, truth = sorted({row[1] for row in rows}), np.array([row[1] for row in asked])
    texts = [row[0] for row in asked]
    floor = Frozen(classifiers.build(recipe, [], labels), args.vectors)
    first = argparse.Namespace(**{**vars(recipe), "preset_layers": args.frozen_layers})
    frozen = Frozen(classifiers.build(first, [], labels), None) if args.frozen_layers else floor
    for draw in args.draws:
        keras.utils.set_random_seed(draw)
        train = [drawn[i] for i in np.random.default_rng(draw).permutation(len(drawn))[: args.rows]]
        model = classifiers.build(recipe, [], labels)
        common.choose_trainable(model, recipe)
        started = time.perf_counter()
        classifiers.train(recipe, model, train, [])
        seconds = time.perf_counter() - started
        found = keras.ops.convert_to_numpy(model.probabilities(model.predict(texts, verbose=0)))
        right = np.array(labels)[found.argmax(1)] == truth
        told(f"draw {draw}:", right, seconds)
        if args.averaged:
            frozen(texts)  # scoring, whose time does not count
            started = time.perf_counter()
            both = found + keras.ops.convert_to_numpy(beside(recipe, frozen, train, texts))
            right = np.array(labels)[both.argmax(1)] == truth
            told("  averaged with a head on the frozen base:", right, seconds + time.perf_counter() - started)
        learned, known = ([row[i] for row in train] for i in (0, 1))
        if "svm" in args.floors:
            found = baselines.linear_labels(train, texts) == truth
            print(compared("TF-IDF + LinearSVC", right, found), flush=True)
        if "regression" in args.floors:
            found = regression(floor(learned), known, floor(texts)) == truth
            print(compared("frozen vectors + logistic regression", right, found), flush=True)


if __name__ == "__main__":
    main()
