"""What the classification recipe trains: a classifier, several of them as one, and a language model before."""

import pathlib
from collections import Counter

from tasks import common


def build(args, texts, labels, number=0):
    """A classifier over a vocabulary learned from the training texts, or that of --preset."""
    import keras_llama

    if args.preset:
        options = {"labels": labels, "dropout": args.dropout, "pooling": "mean"}
        model = common.from_preset(args, keras_llama.LlamaTextClassifier, **options)
        if model.labels != labels:
            raise common.DataError(f"--preset {args.preset}: expected a classifier with the labels {labels}.")
        return model
    tokenizer = keras_llama.SpelledTokenizer.train(texts, args.vocabulary_size)
    preprocessor = keras_llama.TextPreprocessor(tokenizer, args.sequence_length)
    return keras_llama.LlamaTextClassifier(
        backbone(args, preprocessor, texts, causal=False),  # a classifier may read the whole text at once
        labels=labels,
        preprocessor=preprocessor,
        pooling="mean",
        dropout=args.head_dropout,
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
    lm.compile(**common.compile_options(lm, args, len(texts + more), args.pretrain_epochs))
    _fit(args, lm, "pretraining", texts + more, batch_size=args.batch_size, epochs=args.pretrain_epochs)
    learned = {weight.path: keras.ops.convert_to_numpy(weight) for weight in lm.backbone.weights}
    for weight in (weight for model in models for weight in model.backbone.weights):
        weight.assign(learned[weight.path])


def train(args, model, rows, validation, number=0):
    """Fits with early stopping on the validation rows, and keeps the weights of the best epoch."""
    import keras

    (texts, labels, _), (held_texts, held_labels, _) = (zip(*part, strict=True) for part in (rows, validation))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=args.label_smoothing)
    model.compile(loss=loss, **common.compile_options(model, args, len(rows), args.epochs))
    callbacks = [
        keras.callbacks.EarlyStopping("val_accuracy", mode="max", patience=args.patience, restore_best_weights=True)
    ]
    if args.tensorboard:
        callbacks.append(keras.callbacks.TensorBoard(pathlib.Path(args.output_dir, "logs", str(number))))
    return _fit(
        args,
        model,
        f"classifier_{number}",
        texts,
        labels,
        sample_weight=balanced(labels) if args.class_weights == "balanced" else None,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=(held_texts, held_labels),
        callbacks=callbacks,
    ).history


def _fit(args, model, name, *data, **options):
    """`fit` that keeps its state in a directory of --resume, and goes on from what is there."""
    if not args.resume:
        return model.fit(*data, **options)
    try:
        return model.fit(*data, resume=pathlib.Path(args.resume, name), **options)
    except ValueError as error:
        raise common.DataError(f"--resume {args.resume}: {error}") from error


def balanced(labels):
    """A weight for each row, by which all classes count alike and the mean is 1."""
    counts = Counter(labels)
    return [len(labels) / len(counts) / counts[label] for label in labels]
