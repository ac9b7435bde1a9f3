"""Captioning: train an image encoder and a LLaMA decoder on images and captions; score, show, save, export.

    python -m tasks.captioning
    python -m tasks.captioning --data captions.txt --images images --augment flip crop rotation --epochs 20

The default data are shapes drawn by Pillow, in 1,296 combinations of shape, colour, size and place, a fifth of which
are the test: none of it is seen in training.
"""

import pathlib
import time

import numpy as np

from tasks import baselines, captioners, common, memory, pictures, plots


def load(args):
    """Training, validation and test rows."""
    if args.split and args.test_data:
        raise common.DataError("--split names the test images: leave --test-data out.")
    if args.data:
        rows = pictures.captions_file(args.data, args.images, args.skip_missing)
    elif args.split or args.test_data:
        raise common.DataError("--split and --test-data need --data.")
    else:
        rows = pictures.shapes(args.variants)
    if args.split:
        parts = pictures.split(rows, args.split)
    else:
        test = pictures.captions_file(args.test_data, args.images, args.skip_missing) if args.test_data else None
        train, test = (rows, test) if test else common.split(rows, 0.2)
        parts = [*common.split(train, 0.1), test]
    parts = [common.sample(part, args.limit) for part in parts]
    if not all(parts):
        raise common.DataError(f"Expected images to train, validate and test on. Received: {len(rows)} rows.")
    return parts


def train(model, args, rows, validation):
    """Fits, and keeps the weights of the best epoch."""
    import keras

    model.compile(**common.compile_options(model, args, len(rows)))
    best = keras.callbacks.EarlyStopping("val_loss", patience=args.patience, restore_best_weights=True)
    images, captions = [row.image for row in rows], [row.caption for row in rows]
    held = [row.image for row in validation], [row.caption for row in validation]
    options = {"batch_size": args.batch_size, "epochs": args.epochs, "validation_data": held}
    options["augmentation"] = captioners.augmentation(args, model.image_size)
    with common.profiled(args) as profile:
        return model.fit(images, captions, callbacks=[best, *profile], **options).history


def run(args, model, rows, validation, test):
    import keras

    print(f"{len(rows)} captions to train on, {len(validation)} to validate, {len(test)} to test")
    model.summary()
    started = time.perf_counter()
    history = train(model, args, rows, validation)
    seconds = time.perf_counter() - started
    output, (images, references) = pathlib.Path(args.output_dir), pictures.by_image(test)
    captions = model.generate(images, temperature=0, num_beams=args.num_beams, length_penalty=args.length_penalty)
    frequent = baselines.most_frequent_caption([row.caption for row in rows])
    known, described = pictures.by_image(rows)
    nearest = baselines.nearest_captions(known, [texts[0] for texts in described], images)
    shown = np.linspace(0, len(images) - 1, min(12, len(images))).astype(int)  # drawings of one kind stand together
    report = {
        "task": "captioning",
        "backend": keras.config.backend(),
        "rows": {"train": len(rows), "validation": len(validation), "test": len(test)},
        "images": {"train": len(known), "test": len(images)},
        "parameters": model.count_params(),
        "train_seconds": round(seconds, 1),
        "examples_per_second": round(len(rows) * len(history["loss"]) / seconds, 1),
        **pictures.scores(captions, references),
        "greedy": pictures.scores(model.generate(images, temperature=0, num_beams=1), references),
        "baselines": {
            "most_frequent": pictures.scores([frequent] * len(images), references),
            "nearest_colours": pictures.scores(nearest, references),
        },
        "samples": [{"caption": captions[i], "references": references[i]} for i in shown],
        "settings": vars(args),
    }
    plots.training(output / "training.png", history)
    plots.captioned(
        output / "captions.png", images[shown], [captions[i] for i in shown], [references[i][0] for i in shown]
    )
    common.write_report(args.report or output / "metrics.json", report)
    for row in report["samples"][:5]:
        print(f"{row['references'][0]}  ->  {row['caption']}")
    for name, found in {"test": report, **report["baselines"]}.items():
        numbers = (found[key] for key in ("bleu", "cider", "exact_match"))
        print("{}: BLEU-4 {:.1f}, CIDEr {:.1f}, exact match {:.1f} %".format(name.replace("_", " "), *numbers))
    captioners.deliver(model, output, pictures.files(images[shown[:3]], output / "samples"))


def main(arguments=None):
    flags = common.parser("captioning", __doc__, size="tiny", epochs=8, batch_size=32, learning_rate=2e-3)
    flags.add_argument("--images", help="folder of the images of --data; default: images, beside it")
    flags.add_argument("--split", nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help="files that name the images")
    flags.add_argument("--skip-missing", action="store_true", help="leave rows out whose image is missing")
    flags.add_argument("--variants", type=common.positive, default=16, help="drawings of each combination of shapes")
    flags.add_argument("--encoder", help="cnn (the default), vit, or a .keras file")
    flags.add_argument("--freeze-encoder", action="store_true", help="train projector and decoder alone")
    flags.add_argument("--image-size", type=common.positive, help=f"of cnn and vit, default {captioners.IMAGE_SIZE}")
    flags.add_argument(
        "--augment", nargs="*", choices=captioners.AUGMENTATIONS, default=[], help="of images in training"
    )
    flags.add_argument("--vocabulary-size", type=common.positive, default=400)
    flags.add_argument("--sequence-length", type=common.positive, default=40, help="tokens of a caption")
    flags.add_argument("--dropout", type=common.share, default=0.0)
    flags.add_argument("--weight-decay", type=common.not_negative, default=0.01)
    flags.add_argument("--label-smoothing", type=common.share, default=0.0)
    flags.add_argument("--patience", type=common.positive, default=5, help="epochs without a better validation loss")
    flags.add_argument("--num-beams", type=common.positive, default=3)
    flags.add_argument("--length-penalty", type=common.exponent, default=1.0)
    memory.add_flag(flags)
    args = flags.parse_args(arguments)
    try:
        parts = load(args)
        import keras

        common.prepare_output(args)
        common.prepare_backend(args)
        keras.utils.set_random_seed(args.seed)
        model = captioners.build(args, parts[0])
        common.choose_trainable(model, args)
        parts = [pictures.read(part, model.image_size) for part in parts]
        memory.check(model, args, best=True)
    except ValueError as error:
        flags.error(str(error))
    with common.told(flags):
        run(args, model, *parts)


if __name__ == "__main__":
    main()
