"""CMRC 2018: a reader from scratch beside the clause that shares most words with the question.

    python -m benchmarks.question_answering --data-dir DIRECTORY [--part validation] [recipe's flags]

DIRECTORY holds cmrc2018_trial.json, cmrc2018_dev.json and DRCD_dev.json. It trains on the trial part, 80 % of the dev
part by paragraph and DRCD in simplified characters (pip install opencc-python-reimplemented), and is tested on the rest
of the dev part, or with --part validation on a tenth of the training paragraphs, which are then not trained on. First
come `--pretrain-epochs` as a language model on the training passages, 0 for none, then the questions `--repeats` times,
each time with another part of the context around the answer. With `--cloze` N questions made of each passage come
between. What stands in RESULTS.md are the defaults.
"""

import argparse
import json
import pathlib
import time

from tasks import answers, baselines, cloze, common, question_answering, readers


def simplified(rows):
    """The rows in simplified characters."""
    import opencc

    convert = opencc.OpenCC("t2s").convert
    known: dict[str, str] = {}
    for row in rows:
        known.setdefault(row.context, convert(row.context))
    return [
        row._replace(
            context=known[row.context],
            question=convert(row.question),
            references=[convert(text) for text in row.references],
            answers=[
                {**answer, "text": text}
                for answer in row.answers
                if (text := convert(answer["text"])) in known[row.context]
            ],
        )
        for row in rows
    ]


def load(directory, part):
    """Rows to train on and to ask."""
    trial, dev, other = (
        answers.read(pathlib.Path(directory, name))
        for name in ("cmrc2018_trial.json", "cmrc2018_dev.json", "DRCD_dev.json")
    )
    kept, test = common.split(dev, 0.2)
    train = answers.apart([*trial, *kept, *simplified(other)], test)
    if part == "validation":
        train, test = common.split(train, 0.1)
    return answers.learnable(train), test


def train(model, args, rows):
    """Pretraining, made questions, real questions; prints what each takes."""
    started = time.perf_counter()

    def told(name, history):
        print(f"{time.perf_counter() - started:.0f} s: {name}, loss {history['loss'][-1]:.3f}", flush=True)

    if args.pretrain_epochs:
        told("language model", readers.pretrain(args, model, answers.pieces(rows, args.sequence_length)))
    records = readers.fit_arguments(model, args, rows)
    contexts = list(dict.fromkeys(row.context for row in rows))
    stages = [("questions", records * args.repeats, args.crop, 0.5)]
    if args.cloze:
        stages.insert(0, ("made questions", cloze.questions(contexts, args.cloze, args.seed), args.cloze_crop, 0))
    for name, data, length, without in stages:
        data = cloze.crops(data, length, without, args.seed)
        model.compile(**common.compile_options(model, args, len(data), 1))
        history = model.fit(data, batch_size=args.batch_size, verbose=1).history
        told(f"{len(data)} {name}", history)
    return time.perf_counter() - started


def main():
    flags = question_answering.parser()
    flags.description, flags.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    flags.set_defaults(sequence_length=224, stride=80, size="0.3m", pretrain_epochs=1, cloze=0)
    flags.add_argument("--data-dir", required=True)
    flags.add_argument("--part", choices=("validation", "test"), default="test")
    flags.add_argument("--repeats", type=common.positive, default=5)
    flags.add_argument("--crop", type=common.positive, default=160, help="characters of a context in training")
    flags.add_argument("--cloze-crop", type=common.positive, default=64, help="characters for a made question")
    args = flags.parse_args()
    rows, asked = load(args.data_dir, args.part)
    references = [row.references for row in asked]
    floor = scored(baselines.window_answers([(row.question, row.context) for row in asked]), references)
    print(f"{len(rows)} questions to train on, {len(asked)} to ask; the clause most like the question: {floor}")
    import keras

    keras.utils.set_random_seed(args.seed)
    common.prepare_backend(args)
    model = readers.build(args, rows)
    model.no_answer_threshold = 0.0  # so that it learns from parts without the answer
    seconds = train(model, args, rows)
    model.no_answer_threshold = None
    found = readers.answer(model, args, readers.ask(model, args, asked, None))
    scores = scored(found, references)
    report = {
        "parameters": model.count_params(),
        "train_seconds": round(seconds),
        "scores": scores,
        "baseline": floor,
        "times the baseline's F1": round(scores["f1"] / floor["f1"], 3),
    }
    print(json.dumps(report))


def scored(found, references):
    from keras_llama import answer_scores

    return {name: round(value, 2) for name, value in answer_scores(found, references).items()}


if __name__ == "__main__":
    main()
