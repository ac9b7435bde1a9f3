"""Text generation: continue prompts or answer them, with a checkpoint or with a model trained here first.

    python -m tasks.generation --prompt "The capital of France is"
    python -m tasks.generation --chat --prompt "What is gravity?" --temperature 0.7 --seed 1
    python -m tasks.generation --data stories.txt --size small --epochs 3 --prompt "Once upon a time"
    python -m tasks.generation --preset saved_models/poems/preset --template "{title}\\n{content}" --prompt 春晓
    python -m tasks.generation --data answers.jsonl --preset smollm2_135m_instruct --trainable lora --chat --prompt "Hi"

Without --data the model is --preset, by default SmolLM2-135M-Instruct. With --data it is trained first,
from scratch or from --preset, and saved as a folder that Transformers reads too. Of conversations only the responses
are learned: --preview shows which tokens those are.
"""

import argparse
import itertools
import pathlib
import time

from tasks import common, data, delivery, memory, plots, records

PRESET = "smollm2_135m_instruct"


def load(args):
    """Training, validation and test rows of --data."""
    rows = data.generation_rows(args.data, args.template)
    test = data.generation_rows(args.test_data, args.template) if args.test_data else []
    train, test = (rows, test) if test else common.split(rows, 0.1)
    train, validation = common.split(train, args.validation_share)
    train, validation, test = (common.sample(part, args.limit) for part in (train, validation, test))
    if not (train and test and (validation or not args.validation_share)):
        raise common.DataError(f"Expected texts to train, validate and test on. Received: {len(rows)} rows.")
    return [[row for _, row in part] for part in (train, validation, test)]


def build(args, texts):
    """The model of --preset, or a new one over a vocabulary learned from the training texts."""
    import keras_llama

    if args.preset:
        return common.from_preset(args, keras_llama.LlamaCausalLM)
    if not isinstance(texts[0], str):
        raise common.DataError("--data holds conversations: pass the checkpoint to fine-tune as --preset.")
    tokenizer = keras_llama.SentencePieceTokenizer.train(texts, args.vocabulary_size)
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size,
        **keras_llama.size(args.size),
        tie_word_embeddings=True,
        dropout=args.dropout,
        context_length=args.sequence_length,
        dtype=args.precision,
    )
    preprocessor = keras_llama.TextPreprocessor(tokenizer, args.sequence_length, add_eos=True)
    return keras_llama.LlamaCausalLM(backbone, preprocessor)


def preview(lm, rows):
    """Prints what of these rows is only read, and what is learned."""
    decode = lm.preprocessor.tokenizer.decode
    for ids, tokens in zip(lm.encode(rows)["token_ids"], lm.preview_batch(rows), strict=True):
        flags = (learned for _, learned in tokens)
        for learned, part in itertools.groupby(zip(flags, ids, strict=True), key=lambda pair: pair[0]):
            (text,) = decode([[int(i) for _, i in part]], skip_special_tokens=False)
            print("learned:" if learned else "read:   ", text)
        print()


def train(lm, args, rows, validation, test):
    """Fits and keeps the best epoch; returns what the report says of it."""
    import keras

    lm.compile(**common.compile_options(lm, args, lm.count_rows(rows, packing=args.packing)))
    best = keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    stop, held = ([best], {"validation_data": (validation,)}) if validation else ([], {})
    started = time.perf_counter()
    options = {"batch_size": args.batch_size, "epochs": args.epochs, "packing": args.packing}
    with common.profiled(args) as profile:
        history = lm.fit(rows, callbacks=[*stop, *profile], **options, **held).history
    seconds = time.perf_counter() - started
    plots.training(pathlib.Path(args.output_dir, "training.png"), history)
    perplexity = lm.evaluate(test, batch_size=args.batch_size, return_dict=True)["perplexity"]
    return {
        "rows": {"train": len(rows), "validation": len(validation), "test": len(test)},
        "train_seconds": round(seconds, 1),
        "examples_per_second": round(len(rows) * len(history["loss"]) / seconds, 1),
        "perplexity": float(perplexity),
    }


def prompts_of(args):
    """The prompts of --prompt and --prompts, with --template values of its first field; each of them is answered."""
    found = [*args.prompt, *(data.text_lines(args.prompts) if args.prompts else [])]
    return [records.opening(args.template, prompt) for prompt in found] if args.template else found


def answers(lm, args, prompts):
    """The answer to every prompt, in pieces; a bad setting is refused here, before any training."""
    from keras_llama.cli import pieces

    return [pieces(lm, prompt, args) for prompt in prompts]


def told(pieces):
    """Prints an answer as it comes, and returns it."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print("\n")
    return text


def run(args, lm, parts, prompts, waiting):
    import keras

    output = pathlib.Path(args.output_dir)
    path = args.report or output / "metrics.json"
    report = {"task": "generation", "backend": keras.config.backend(), "parameters": lm.count_params()}
    report["settings"] = vars(args)
    if parts:
        report |= train(lm, args, *parts)
        print(f"test perplexity {report['perplexity']:.3f}")
        common.write_report(path, report)  # whatever comes of the rest
        delivery.preset(lm, output)
    report["generated"] = [
        {"prompt": prompt, "text": told(pieces)} for prompt, pieces in zip(prompts, waiting, strict=True)
    ]
    common.write_report(path, report)


def main(arguments=None):
    flags = common.parser("generation", __doc__, size="small", epochs=3, batch_size=16, learning_rate=1e-3)
    flags.add_argument("--prompt", action="append", default=[], help="a text to continue; may be repeated")
    flags.add_argument("--prompts", help="a file of prompts, one a line")
    flags.add_argument("--template", help='a text of the fields of .json and .jsonl files, as "{title}\\n{content}"')
    flags.add_argument("--vocabulary-size", type=common.positive, default=4000)
    flags.add_argument("--sequence-length", type=common.positive, default=512, help="tokens; longer texts are cut")
    flags.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="several texts in a row of --sequence-length, none of which sees another",
    )
    flags.add_argument("--preview", action="store_true", help="show what of the first rows is learned, and stop")
    flags.add_argument(
        "--validation-share", type=common.share, default=0.1, help="of the training rows; 0: no early stopping"
    )
    flags.add_argument("--dropout", type=common.share, default=0.0)
    flags.add_argument("--weight-decay", type=common.not_negative, default=0.1)
    memory.add_flag(flags)
    from keras_llama.cli import add_generation_flags  # starts Keras

    add_generation_flags(flags)
    args = flags.parse_args(arguments)
    try:
        parts, prompts = load(args) if args.data else [], prompts_of(args)
        if not parts and args.trainable != "all":
            raise common.DataError(f"--trainable {args.trainable} needs --data to train on.")
        if not parts and args.preset_layers:
            raise common.DataError("--preset-layers needs --data: fewer blocks must be trained to be of use.")
        if args.preview and not parts:
            raise common.DataError("--preview needs --data to show.")
        if not parts and args.profile:
            raise common.DataError("--profile needs --data to train on.")
        if not parts and not prompts:
            raise common.DataError("Expected --prompt, --prompts or --data. Received: none of them.")
        import keras

        common.prepare_output(args)
        if not parts:  # the model is asked as it is
            args.preset = args.preset or PRESET
            common.leave(args, "precision", "sequence_length")
        common.prepare_backend(args)
        keras.utils.set_random_seed(args.seed)
        lm = build(args, parts[0] if parts else [])
        if args.preview:
            return preview(lm, parts[0][:3])
        if parts:
            common.choose_trainable(lm, args)
            memory.check(lm, args, best=args.validation_share > 0)
        waiting = answers(lm, args, prompts)
    except ValueError as error:
        flags.error(str(error))
    with common.told(flags):
        return run(args, lm, parts, prompts, waiting)


if __name__ == "__main__":
    main()
