"""Pretraining: a language model of text files of any length, from scratch or from a checkpoint.

    python -m tasks.pretraining --data stories.txt --size 3m --epochs 5 --prompt "Once upon a time"
    python -m tasks.pretraining --data books/ news.jsonl --tokenizer hf://org/name --size 100m --precision auto
    python -m tasks.pretraining --data poems.json --template "{title}\\n{content}" --split-ideographs --resume run

The text is read in parts, tokenized and written into OUTPUT_DIR/tokens-..., from which training reads rows of
--sequence-length tokens: neither has to fit into memory. Every --save-every steps the model is validated, shown by
--prompt, and saved as OUTPUT_DIR/preset, which every recipe takes as --preset and Transformers reads; with --resume
all that training depends on is saved, too, and a run that was interrupted ends as an unbroken one.
"""

import importlib.util
import math
import pathlib
import time

from tasks import common, corpus, delivery, memory, plots, records


def prepare(args):
    """The model and what to train and validate it on; all that can be wrong with data and arguments is told here."""
    if not args.data:
        raise common.DataError("Expected --data: text files, folders of them, .json or .jsonl files. Received: none.")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise common.DataError("--tensorboard needs TensorBoard: pip install tensorboard.")
    paths = (corpus.files(args.data), corpus.files(args.test_data or []))
    source = corpus.Source(*paths, args.validation_share, args.template, args.limit)
    import keras

    from tasks import pretrainers

    common.prepare_output(args)
    common.prepare_backend(args)
    keras.utils.set_random_seed(args.seed)
    lm, folder = pretrainers.build(args, source)
    common.choose_trainable(lm, args)
    memory.check(lm, args)
    pretrainers.Checkpoints(args, lm)  # refuses a prompt now, not after --save-every steps
    if not folder.exists():
        corpus.write(source, lm.preprocessor, folder)
    return lm, corpus.opened(folder), folder


def train(lm, args, sides):
    """Fits; returns the history, the last samples, and all rows to validate on."""
    import keras

    from tasks import pretrainers

    length, size = lm.preprocessor.sequence_length, args.batch_size
    steps = args.steps or math.ceil(args.epochs * pretrainers.rows_of_pass(sides[0], length) / size)
    epochs = math.ceil(steps / args.save_every)
    rows = pretrainers.TrainingRows(sides[0], length, size, args.save_every, args.seed)
    # At each save on a tenth as many rows as were trained since the last one: a thirtieth of the time.
    held, some = (
        pretrainers.ValidationRows(sides[1], length, size, most) if sides[1:] else None
        for most in (None, size * max(1, args.save_every // 10))
    )
    lm.compile(**common.compile_options(lm, args, steps * size, 1))
    peak = args.peak_flops or pretrainers.measured_flops(lm.dtype_policy.compute_dtype)
    flops = pretrainers.flops_of_token(lm, length)
    print(f"{steps} steps of {size * length} tokens, {flops:.3g} operations a token; {peak:.3g} a second")
    samples = pretrainers.Checkpoints(args, lm)
    callbacks = [pretrainers.Measures(size * length, flops, peak, some and some.bits_per_byte), samples]
    callbacks.append(pretrainers.LastStep(steps, args.save_every))
    if args.tensorboard:
        callbacks.append(keras.callbacks.TensorBoard(pathlib.Path(args.output_dir, "logs")))
    with common.profiled(args) as profile:
        options = {"validation_data": some, "callbacks": callbacks + profile, "shuffle": False}
        history = common.fit(args, lm, "pretraining", rows, epochs=epochs, **options).history
    return history, samples.texts, held


def run(args, lm, sides, folder):
    import keras

    counts = [side.counts for side in sides]
    for name, count in zip(corpus.SIDES, counts, strict=False):
        print(f"{folder}, {name}: {count['tokens']:,} tokens of {count['bytes']:,} bytes, {count['texts']:,} texts")
    lm.summary()
    started = time.perf_counter()
    history, samples, held = train(lm, args, sides)
    seconds = time.perf_counter() - started
    measured = held.measured(lm) if held else {}
    output = pathlib.Path(args.output_dir)
    plots.training(output / "training.png", history)
    report = {
        "task": "pretraining",
        "backend": keras.config.backend(),
        "data": dict(zip(corpus.SIDES, counts, strict=False)),
        "parameters": lm.count_params(),
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round(history["tokens/s"][-1], 1),
        "mfu": history["mfu"][-1],
        "loss": history["loss"],
        "samples": samples,
        "settings": vars(args),
        **measured,
    }
    if measured:
        print(f"validation perplexity {measured['perplexity']:.3f}, bits per byte {measured['bits_per_byte']:.4f}")
    common.write_report(args.report or output / "metrics.json", report)
    delivery.preset(lm, output)


def parser():
    flags = common.parser(
        "pretraining", __doc__, files="+", size="3m", epochs=1, batch_size=16, learning_rate=1e-2, optimizer="muon"
    )
    flags.add_argument("--template", default=records.TEMPLATE, help="of texts, by fields of .json and .jsonl")
    flags.add_argument("--validation-share", type=common.share, default=0.1, help="of the text, without --test-data")
    flags.add_argument("--tokenizer", help="a checkpoint's, tokenizer.json or .model; default: learned from --data")
    flags.add_argument("--vocabulary-size", type=common.positive, default=4000)
    flags.add_argument("--split-ideographs", action="store_true", help="Chinese characters are tokens of their own")
    flags.add_argument("--sequence-length", type=common.positive, default=256, help="tokens of a row")
    flags.add_argument("--tied", action="store_true", help="the head is the embedding, which has fewer weights")
    flags.add_argument("--dropout", type=common.share, default=0.0)
    flags.add_argument("--weight-decay", type=common.not_negative, default=0.1)
    flags.add_argument("--steps", type=common.positive, help="in place of --epochs")
    flags.add_argument("--save-every", type=common.positive, default=500, help="steps")
    flags.add_argument("--resume", help="a directory: keep the state of training there, and go on from what is there")
    flags.add_argument("--prompt", action="append", default=[], help="a text to continue as it trains; may be repeated")
    flags.add_argument("--max-new-tokens", type=common.positive, help="default: 128, or what --sequence-length leaves")
    flags.add_argument("--peak-flops", type=common.above_zero, help="operations a second; default: of a matrix product")
    flags.add_argument("--tensorboard", action="store_true", help="write OUTPUT_DIR/logs")
    memory.add_flag(flags)
    return flags


def main(arguments=None):
    flags = parser()
    args = flags.parse_args(arguments)
    with common.told(flags):
        try:
            made = prepare(args)
        except ValueError as error:
            flags.error(str(error))
        run(args, *made)


if __name__ == "__main__":
    main()
