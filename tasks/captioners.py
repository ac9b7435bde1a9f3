"""What the captioning recipe trains: a captioner of an image encoder and a decoder, and what it delivers."""

import pathlib

from tasks import common

ENCODERS = ("cnn", "vit")
AUGMENTATIONS = ("flip", "crop", "rotation")


def build(args, rows):
    """A captioner over a vocabulary learned from the captions, or started from --preset."""
    import keras_llama

    cls, options = keras_llama.LlamaImageCaptioner, {"label_smoothing": args.label_smoothing}
    if args.preset:
        if not args.preset.endswith(".keras") and not pathlib.Path(args.preset, "image_encoder.keras").exists():
            options["image_encoder"] = encoder(args)
        return common.from_preset(args, cls, **options)
    captions = [row.caption for row in rows]
    tokenizer = keras_llama.SentencePieceTokenizer.train(captions, args.vocabulary_size, split_ideographs=True)
    preprocessor = keras_llama.TextPreprocessor(tokenizer, args.sequence_length)
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size,
        **keras_llama.size(args.size),
        dropout=args.dropout,
        dtype=args.precision,
    )
    return cls(backbone, encoder(args), preprocessor, **options)


def encoder(args):
    """The image encoder of --encoder."""
    if args.encoder not in ENCODERS and not args.encoder.endswith(".keras"):
        raise common.DataError(f"--encoder must be cnn, vit or a .keras file. Received: {args.encoder}.")
    import keras

    import keras_llama

    if args.encoder.endswith(".keras"):
        made = keras.saving.load_model(args.encoder)
    else:
        make = keras_llama.vit_encoder if args.encoder == "vit" else keras_llama.convolutional_encoder
        made = make(args.image_size)
    made.trainable = not args.freeze_encoder
    return made


def augmentation(args, size):
    """The layers of --augment, for images of `size`."""
    from keras import layers

    height, width = size
    made = {
        "flip": [layers.RandomFlip("horizontal")],
        "crop": [layers.RandomCrop(height * 7 // 8, width * 7 // 8), layers.Resizing(height, width)],
        "rotation": [layers.RandomRotation(0.03, fill_mode="nearest")],
    }
    return [layer for name in args.augment for layer in made[name]]


def deliver(model, output, files):
    """Saves, reloads, exports and serves the model, and raises if any of them captions these files otherwise."""
    import keras

    expected = model.generate(files, temperature=0)
    model.save(output / "model.keras")
    if keras.saving.load_model(output / "model.keras").generate(files, temperature=0) != expected:
        raise RuntimeError("The reloaded model captions otherwise.")
    print(f"{output / 'model.keras'}: reloaded, the same captions")
    common.deliver_adapter(model, output)
    answer = common.exported(model, output / "saved_model", files, "--files")
    if answer is not None and answer["texts"] != expected:
        raise RuntimeError(f"The exported model captions otherwise: {answer}.")
    if answer is not None:
        print(f"{output / 'saved_model'}: served by a fresh process, the same captions")
