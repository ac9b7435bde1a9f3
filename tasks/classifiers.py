"""What the classification recipe trains: a classifier, several of them as one, and a language model before."""

import pathlib
from collections import Counter

import numpy as np

from tasks import common, memory


def build(args, texts, labels, number=0):
    """A classifier over a vocabulary learned from the training texts, or that of --preset."""
    import keras_llama
    from keras_llama.checkpoints.presets import open_checkpoint

    if args.preset:
        options = {"dropout": args.head_dropout}
        if common.is_file(args.preset) or open_checkpoint(args.preset).head != keras_llama.LlamaTextClassifier.head:
            options |= {"labels": labels, "pooling": "mean"}  # of a head that is new
        model = common.from_preset(args, keras_llama.LlamaTextClassifier, **options)
        if sorted(model.labels or []) != labels:
            raise common.DataError(
                f"--preset {args.preset}: expected a classifier with the labels {labels}. Received: {model.labels}."
            )
        if args.trainable == "head":
            common.kept(args, "r_drop", why="--trainable head makes one pass over vectors")
            model.r_drop = 0.0
        else:
            common.settle(args, model, "r_drop")
        return model
    tokenizer = keras_llama.SpelledTokenizer.train(texts, args.vocabulary_size)
    preprocessor = keras_llama.TextPreprocessor(tokenizer, args.sequence_length)
    return keras_llama.LlamaTextClassifier(
        backbone(args, preprocessor, texts, causal=False),  # a classifier may read the whole text at once
        labels=labels,
        preprocessor=preprocessor,
        pooling="mean",
        dropout=args.head_dropout,
        r_drop=args.r_drop,
        name=f"classifier_{number}",
    )


def backbone(args, preprocessor, texts, causal):
    """Blocks over the characters of `preprocessor`, and the characters, pairs and triples that `texts` hold often."""
    import keras_llama
    from keras_llama import ngrams

    characters, listed = preprocessor.tokenizer.characters, []
    if args.ngram_count:
        listed = ngrams.frequent(preprocessor.encode(texts), characters, args.ngram_count)
    made = keras_llama.LlamaBackbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size,
        **keras_llama.size(args.size),
        dropout=args.dropout,
        embedding_dropout=args.embedding_dropout,
        causal=causal,
        num_ngrams=len(listed),
        final_norm=causal,  # in a mean over the text some tokens weigh more than others
        dtype=args.precision,
    )
    if len(listed):
        made.ngram_embedding.know(listed, characters)
    return made


def pretrain(args, models, texts, more):
    """Trains the blocks as a causal language model on `texts` and `more`, then gives the classifiers their weights."""
    import keras

    import keras_llama

    tokenizer = models[0].preprocessor.tokenizer
    preprocessor = keras_llama.TextPreprocessor(tokenizer, args.sequence_length, add_eos=True)
    lm = keras_llama.LlamaCausalLM(backbone(args, models[0].preprocessor, texts, causal=True), preprocessor)
    memory.check(lm, args)
    lm.compile(**common.compile_options(lm, args, len(texts + more), args.pretrain_epochs))
    common.fit(args, lm, "pretraining", texts + more, batch_size=args.batch_size, epochs=args.pretrain_epochs)
    learned = {weight.path: keras.ops.convert_to_numpy(weight) for weight in lm.backbone.weights}
    for weight in (weight for model in models for weight in model.backbone.weights):
        weight.assign(learned[weight.path])


def head(args, backbone, labels):
    """A classifier whose head is new, on the backbone of another."""
    import keras_llama

    model = keras_llama.LlamaTextClassifier(backbone, labels=labels, dropout=args.head_dropout, pooling="mean")
    model.freeze_base()
    return model


def built(args, texts, labels):
    """All the classifiers that --models asks for, each begun by its own seed."""
    import keras

    models = []
    for number in range(args.models):
        keras.utils.set_random_seed(args.seed + number)
        models.append(build(args, texts, labels, number))
        common.choose_trainable(models[-1], args)
    return models


def fit(args, models, more, rows, validation):
    """Trains the models one after another: the classifier that all of them make, each one's history, and the speed."""
    import keras

    import keras_llama
    from tasks.speed import Speed

    if args.pretrain_epochs:
        pretrain(args, models, [text for text, *_ in rows], more)
    histories, speed = [], Speed()
    for number, model in enumerate(models):
        keras.utils.set_random_seed(args.seed + number)
        with speed.of(len(rows)) as counting:
            histories.append(train(args, model, rows, validation, number, [counting]))
    return models[0] if len(models) == 1 else keras_llama.LlamaClassifierEnsemble(models), histories, speed


def train(args, model, rows, validation, number=0, callbacks=()):
    """Fits with early stopping on the validation rows, if any, and keeps the weights of the best epoch.

    For --trainable head the rows may hold vectors in place of texts.
    """
    import keras

    texts, labels = _columns(rows)
    held = _columns(validation) if validation else None
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=args.label_smoothing)
    model.compile(loss=loss, **common.compile_options(model, args, len(rows), args.epochs))
    best = keras.callbacks.EarlyStopping("val_accuracy", mode="max", patience=args.patience, restore_best_weights=True)
    callbacks = [*callbacks, *([best] if held else [])]
    if args.tensorboard:
        callbacks.append(keras.callbacks.TensorBoard(pathlib.Path(args.output_dir, "logs", str(number))))
    options = {
        "sample_weight": balanced(labels) if args.class_weights == "balanced" else None,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "validation_data": held,
    }
    with common.profiled(args, number) as profile:
        options["callbacks"] = callbacks + profile
        return common.fit(args, model, f"classifier_{number}", texts, labels, **options).history


def _columns(rows):
    """The texts and the labels of rows, or their vectors and labels."""
    texts, labels, _ = zip(*rows, strict=True)
    return (texts if isinstance(texts[0], str) else np.stack(texts)), labels


def balanced(labels):
    """A weight for each row, by which all classes count alike and the mean is 1."""
    counts = Counter(labels)
    return [len(labels) / len(counts) / counts[label] for label in labels]
