"""Translation: train an encoder-decoder, or a decoder alone, on sentence pairs; score, translate, save, export.

    python -m tasks.translation --data pairs.tsv --epochs 12 --output-dir saved_models/zh
    python -m tasks.translation --data pairs.tsv --architecture decoder --preset smollm2_135m_instruct
    python -m tasks.translation --preset saved_models/translation/model.keras --interactive

The default data are the 3,000 interface texts of JupyterLab's Chinese language pack: enough to see every part work, and
no translator. Real sentence pairs, such as Tatoeba's, go in by --data.
"""

import functools
import pathlib
import sys
import time

from tasks import baselines, common, data, memory, plots, translators
from tasks.translators import references, translate


def load(args):
    """Training, validation and test rows of (source, target, place)."""
    rows = data.translation_rows(args.data) if args.data else data.interface_rows()
    train, test = (rows, data.translation_rows(args.test_data)) if args.test_data else common.split(rows, 0.1)
    train, validation = common.split(train, 0.1)
    train, validation, test = (common.sample(part, args.limit) for part in (train, validation, test))
    if not (train and validation and test):
        raise common.DataError(f"Expected pairs to train, validate and test on. Received: {len(rows)} rows.")
    return train, validation, test


def train(model, args, rows, validation):
    """Fits, shows translations as it goes on, and keeps the weights of the best epoch."""
    import keras

    import keras_llama

    model.compile(**common.compile_options(model, args, len(rows)))
    held = references(validation[: args.show])
    scores = keras_llama.TranslationScores(
        functools.partial(translate, model), held, held.values(), every=max(1, args.epochs // 5), tokenize=args.tokenize
    )
    best = keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    options = {"batch_size": args.batch_size, "epochs": args.epochs}
    options["validation_data"] = translators.fit_arguments(model, validation)
    with common.profiled(args) as profile:
        callbacks = [scores, best, *profile]
        return model.fit(*translators.fit_arguments(model, rows), callbacks=callbacks, **options).history


def run(args, model, train_rows, validation, test_rows):
    import keras

    from keras_llama import translation_scores

    print(f"{len(train_rows)} pairs to train on, {len(validation)} to validate, {len(test_rows)} to test")
    model.summary()
    started = time.perf_counter()
    history = train(model, args, train_rows, validation)
    seconds = time.perf_counter() - started
    output, test = pathlib.Path(args.output_dir), references(test_rows)
    sources, truth = list(test), list(test.values())
    floor = translation_scores(baselines.nearest_translations(train_rows, sources), truth, args.tokenize)
    greedy = translate(model, sources)
    beams = greedy if args.num_beams == 1 else translate(model, sources, **search(args))
    report = {
        "task": "translation",
        "architecture": args.architecture,
        "backend": keras.config.backend(),
        "rows": {"train": len(train_rows), "validation": len(validation), "test": len(test_rows)},
        "parameters": model.count_params(),
        "train_seconds": round(seconds, 1),
        "examples_per_second": round(len(train_rows) * len(history["loss"]) / seconds, 1),
        **translation_scores(beams, truth, args.tokenize),
        "greedy": translation_scores(greedy, truth, args.tokenize),
        "baseline": floor,
        "samples": [{"source": s, "translation": t} for s, t in zip(sources[:10], beams[:10], strict=True)],
        "settings": vars(args),
    }
    plots.training(output / "training.png", history)
    if hasattr(model, "alignment"):
        source_tokens, target_tokens, weights = model.alignment(sources[0], beams[0] or truth[0][0])
        plots.alignment(output / "alignment.png", source_tokens, target_tokens, weights.mean((0, 1)))
    common.write_report(args.report or output / "metrics.json", report)
    translators.deliver(model, output, sources[:3])
    for row in report["samples"][:5]:
        print(f"{row['source']}  ->  {row['translation']}")
    print(
        f"test BLEU {report['bleu']:.2f}, chrF {report['chrf']:.2f}; "
        f"the nearest training sentence's translation: BLEU {floor['bleu']:.2f}, chrF {floor['chrf']:.2f}"
    )
    if not args.data:
        print("These 3,000 interface texts show every part at work; they make no translator. See --data.")


def search(args):
    """What `generate` is told of beams; with one it is greedy."""
    return {"num_beams": args.num_beams, "length_penalty": args.length_penalty}


def interactive(model, args):
    """Reads lines and translates them, until the input ends."""
    for line in sys.stdin:
        if line.strip():
            print(translate(model, [line.strip()], **search(args))[0], flush=True)


def main(arguments=None):
    flags = common.parser("translation", __doc__, size="0.5m", epochs=20, batch_size=64, learning_rate=4e-3)
    flags.add_argument("--architecture", choices=translators.ARCHITECTURES, default=translators.ARCHITECTURES[0])
    flags.add_argument("--encoder-layers", type=common.positive, help="default: as many as the size says")
    flags.add_argument("--vocabulary-size", type=common.positive, default=4000, help="of both languages together")
    flags.add_argument("--sequence-length", type=common.positive, default=64, help="tokens of a source and of a target")
    flags.add_argument("--dropout", type=common.share, default=0.1)
    flags.add_argument("--weight-decay", type=common.not_negative, default=0.05)
    flags.add_argument("--label-smoothing", type=common.share, default=0.1, help="of an encoder-decoder")
    flags.add_argument("--num-beams", type=common.positive, default=4, help="of the test and of --interactive")
    flags.add_argument("--length-penalty", type=common.exponent, default=1.5, help="of beam search; larger is longer")
    flags.add_argument("--show", type=common.positive, default=200, help="validation pairs to translate as it trains")
    flags.add_argument("--tokenize", default="zh", help="how sacrebleu cuts words of the target: zh, 13a, ...")
    flags.add_argument("--interactive", action="store_true", help="translate lines of the input; with --preset at once")
    memory.add_flag(flags)
    args = flags.parse_args(arguments)
    try:
        trains = args.data or not (args.interactive and args.preset)
        if args.profile and not trains:
            raise common.DataError("--profile needs --data to train on.")
        parts = load(args) if trains else []
        import keras

        import keras_llama

        keras_llama.translation_scores(["a"], ["a"], args.tokenize)  # refuses it now, not after an epoch
        common.prepare_output(args)
        common.prepare_backend(args)
        keras.utils.set_random_seed(args.seed)
        model = translators.build(args, parts[0] if parts else [])
        if trains:
            common.choose_trainable(model, args)
            memory.check(model, args, best=True)
    except ValueError as error:
        flags.error(str(error))
    if trains:
        with common.told(flags):
            run(args, model, *parts)
    if args.interactive:
        interactive(model, args)


if __name__ == "__main__":
    main()
