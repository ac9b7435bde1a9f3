"""What the captioning recipe trains: a captioner of an image encoder and a decoder, and what it delivers."""

from tasks import common, delivery

ENCODERS = ("cnn", "vit")
AUGMENTATIONS = ("flip", "crop", "rotation")
IMAGE_SIZE = 64


def build(args, rows):
    """A captioner over a vocabulary learned from the captions, or started from --preset."""
    import keras_llama

    if args.preset:
        model = from_preset(args)
    else:
        captions = [row.caption for row in rows]
        tokenizer = keras_llama.SentencePieceTokenizer.train(captions, args.vocabulary_size, split_ideographs=True)
        preprocessor = keras_llama.TextPreprocessor(tokenizer, args.sequence_length)
        backbone = keras_llama.LlamaBackbone(
            vocabulary_size=tokenizer.vocabulary_size,
            **keras_llama.size(args.size),
            dropout=args.dropout,
            dtype=args.precision,
        )
        model = keras_llama.LlamaImageCaptioner(
            backbone, encoder(args), preprocessor, label_smoothing=args.label_smoothing
        )
    image_encoder = model.image_encoder
    if bool(image_encoder.trainable_weights) == args.freeze_encoder:  # else what is frozen inside of it stays so
        image_encoder.trainable = args.freeze_encoder  # TensorFlow takes no notice of a value that is there already
        image_encoder.trainable = not args.freeze_encoder
    return model


def from_preset(args):
    """The captioner of --preset with its own encoder, or the decoder of a text model behind a new one."""
    import keras_llama
    from keras_llama.checkpoints.presets import open_checkpoint
    from keras_llama.heads.image_captioner import encoder_file

    own = common.is_file(args.preset) or encoder_file(open_checkpoint(args.preset)) is not None
    if own:
        common.kept(args, "encoder", "image_size")
    options = {} if own else {"image_encoder": encoder(args)}
    model = common.from_preset(args, keras_llama.LlamaImageCaptioner, **options)
    common.settle(args, model, "label_smoothing", own=own)
    return model


def encoder(args):
    """The image encoder of --encoder."""
    name = args.encoder or ENCODERS[0]
    if name not in ENCODERS and not name.endswith(".keras"):
        raise common.DataError(f"--encoder must be cnn, vit or a .keras file. Received: {name}.")
    import keras

    import keras_llama

    if not name.endswith(".keras"):
        make = keras_llama.vit_encoder if name == "vit" else keras_llama.convolutional_encoder
        return make(args.image_size or IMAGE_SIZE)
    if args.image_size:
        raise common.DataError(f"--image-size is for cnn and vit: leave it out. {name} has a size of its own.")
    return keras.saving.load_model(name)


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
    expected = model.generate(files, temperature=0)
    again = delivery.reloaded(model, output)
    found, asked = again.generate(files, temperature=0), {"images": files}
    delivery.check_texts(model, expected, found, lambda inputs: again.predict(inputs, verbose=0), asked)
    print(f"{output / 'model.keras'}: reloaded, the same weights and captions")
    if model.adapters and model.image_encoder.trainable_weights:
        delivery.outdated(output / "adapter")
        print("No adapter alone: the image encoder that was trained beside it is in model.keras only.")
    else:
        delivery.adapter(model, output)
    served = output / "saved_model"
    answer = delivery.exported(model, served, files, "--files")
    if answer is None:
        return
    delivery.check_texts(
        model, expected, answer["texts"], lambda inputs: delivery.served_logits(served, inputs, "--files"), asked
    )
    print(f"{served}: served by a fresh process, the same captions")
