"""Question answering: find the answer in a text, or say it from texts that are found first; score, save, export.

    python -m tasks.question_answering --data train.json --test-data dev.json --output-dir saved_models/reader
    python -m tasks.question_answering --preset saved_models/question_answering/model.keras --interactive
    python -m tasks.question_answering --mode generative --preset smollm2_135m_instruct

The default data are 120 questions about 30 short passages, Chinese and English, written for this project: enough to see
every part work, and no reader. Real questions, such as those of SQuAD, CMRC 2018 and DRCD, go in by --data.
"""

import pathlib
import sys
import time

from tasks import answers, baselines, common, memory, plots, readers


def load(args):
    """Training, validation and test rows, apart by their contexts."""
    rows = answers.read(args.data or answers.PASSAGES)
    if args.test_data:
        test = answers.read(args.test_data)
        train = answers.apart(rows, test)
    else:
        train, test = common.split(rows, 0.2)
    train, validation = common.split(answers.learnable(train), 0.1)
    train, validation, test = (common.sample(part, args.limit) for part in (train, validation, test))
    if not (train and validation and test):
        raise common.DataError(f"Expected questions to train, validate and test on. Received: {len(rows)}.")
    return train, validation, test


def run(args, model, trains, train_rows, validation, test):
    import keras

    from keras_llama import answer_scores

    print(f"{len(train_rows)} questions to train on, {len(validation)} to validate, {len(test)} to test")
    model.summary()
    output, passages = pathlib.Path(args.output_dir), list(dict.fromkeys(row.context for row in test))
    found = readers.retrieved(args, test, passages)
    asked = readers.ask(model, args, test, found)  # what does not fit is refused before the training
    started = time.perf_counter()
    history, speed = readers.train(model, args, train_rows, validation) if trains else ({}, 0.0)
    seconds = time.perf_counter() - started
    texts, references = readers.answer(model, args, asked), [row.references for row in test]
    scores = answer_scores(texts, references)
    floor = answer_scores(baselines.window_answers([(row.question, row.context) for row in test]), references)
    report = {
        "task": "question_answering",
        "mode": args.mode,
        "backend": keras.config.backend(),
        "rows": {"train": len(train_rows) if trains else 0, "validation": len(validation), "test": len(test)},
        "parameters": model.count_params(),
        "train_seconds": round(seconds, 1),
        "examples_per_second": speed,
        **scores,
        "baseline": floor,
        "retrieved": sum(row.context in one for row, one in zip(test, found, strict=True)) / len(test),
        "samples": [
            {"question": row.question, "answer": text, "references": row.references}
            for row, text in list(zip(test, texts, strict=True))[:10]
        ],
        "settings": vars(args),
    }
    common.write_report(args.report or output / "metrics.json", report)
    if trains:
        plots.training(output / "training.png", history)
        readers.deliver(model, args, output, asked[:3])
    for row in report["samples"][:5]:
        print(f"{row['question']}  ->  {row['answer']}  ({row['references'][0] if row['references'] else 'no answer'})")
    for name, found in (("test", scores), ("the clause that shares most words with the question", floor)):
        print(f"{name}: exact match {found['exact_match']:.2f}, F1 {found['f1']:.2f}")
    if args.mode == readers.MODES[1]:
        print(f"The passage that has the answer was found for {report['retrieved']:.1%} of the questions.")
    if not args.data:
        print("These 120 questions show every part at work; they make no reader. See --data.")


def interactive(model, args, rows):
    """Reads lines of `question` or `question<TAB>context` and answers them, without context from the data's."""
    passages = list(dict.fromkeys(row.context for row in rows))
    for line in filter(str.strip, sys.stdin):
        question, _, context = map(str.strip, line.partition("\t"))
        try:
            if not question:
                raise common.DataError(f"Expected question or question<TAB>context. Received: {line!r}.")
            row = answers.Row(context, question, [], [], "input")
            found = [[context]] if context else readers.retrieved(args, [row], passages)
            asked = readers.ask(model, args, [row._replace(context=found[0][0])], found)
            print(readers.answer(model, args, asked)[0], flush=True)
        except ValueError as error:
            print(error, flush=True)


def parser():
    """The flags of this recipe, which a benchmark takes, too."""
    flags = common.parser("question_answering", __doc__, size="tiny", epochs=20, batch_size=32, learning_rate=2e-3)
    flags.add_argument("--mode", choices=readers.MODES, default=readers.MODES[0])
    flags.add_argument("--vocabulary-size", type=common.positive, default=8000)
    # What --preset was saved with stays, unless it is asked for.
    flags.add_argument("--sequence-length", type=common.positive, default=384, help="of a window, or prompt and answer")
    flags.add_argument("--stride", type=common.natural, default=96, help="tokens that two windows share")
    flags.add_argument("--max-answer-length", type=common.positive, default=48, help="tokens")
    flags.add_argument("--no-answer-threshold", type=float, help="where some have no answer")
    flags.add_argument("--retrieve", type=common.positive, default=1, help="passages in a prompt; generative only")
    flags.add_argument("--dropout", type=common.share, default=0.1)
    flags.add_argument("--weight-decay", type=common.not_negative, default=0.1)
    flags.add_argument("--patience", type=common.positive, default=3, help="epochs without a better validation")
    flags.add_argument("--pretrain-epochs", type=common.natural, default=0, help="as a language model; extractive only")
    flags.add_argument("--cloze", type=common.natural, default=0, help="questions made of each passage, learned first")
    flags.add_argument("--resume", help="a directory: keep the state of each epoch there, and go on from what is there")
    flags.add_argument("--interactive", action="store_true", help="answer lines of the input; with --preset at once")
    memory.add_flag(flags)
    return flags


def main(arguments=None):
    flags = parser()
    args = flags.parse_args(arguments)
    try:
        parts = load(args)
        untrained = args.preset and (args.interactive or args.mode == readers.MODES[1])
        trains = bool(args.data or not untrained)
        if args.profile and not trains:
            raise common.DataError("--profile needs --data to train on.")
        import keras

        common.prepare_output(args)
        common.prepare_backend(args)
        keras.utils.set_random_seed(args.seed)
        model = readers.build(args, *parts[:2])
        if trains:
            common.choose_trainable(model, args)
            memory.check(model, args, best=True, kept=readers.bytes_of_states(model, args, *parts[:2]))
    except ValueError as error:
        flags.error(str(error))
    if trains or not args.interactive:
        with common.told(flags):
            run(args, model, trains, *parts)
    if args.interactive:
        interactive(model, args, [row for part in parts for row in part])


if __name__ == "__main__":
    main()
