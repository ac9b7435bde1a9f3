"""Searches hyper-parameters of tasks.classification: each trial is scored by cross-validation on the training rows.

    python -m tasks.tune --data train.tsv --trials 20 --folds 5 --search bayesian

Takes the flags of tasks.classification. The test rows are left for that recipe. The same command goes on with a search
that was interrupted, or that is to have more trials.
"""

import hashlib
import importlib.util
import json
import pathlib
import shlex

from tasks import classification, classifiers, common, folds, memory

SEARCHES = ("random", "bayesian")
OTHERS = ("resume", "tensorboard", "profile", "label_noise_report")  # of one training
OWN = ("trials", "search", "folds", "output_dir", "report")  # of a search


def prepare(args):
    """The folds, and the search as far as it has come."""
    train, validation, _, labels = classification.load(args)
    for name in OTHERS:
        if getattr(args, name):
            raise common.DataError(f"{common.flag(name)} is for one training, by tasks.classification.")
    if importlib.util.find_spec("keras_tuner") is None:
        raise common.DataError("tasks.tune needs keras-tuner: pip install keras-tuner.")
    more = classification.unlabelled(args)
    parts = folds.Folds(args, train + validation, labels, more)
    from tasks import tuners

    common.prepare_output(args)
    common.prepare_backend(args)
    first, *_ = classifiers.built(args, [text for text, *_ in parts.rows], labels)  # refuses bad flags now
    memory.check(first, args, best=args.validation_share > 0, trained=args.models - 1)
    project = f"search_{_digest(args, parts)}"
    try:
        return tuners.CrossValidation(args, parts, project)
    except (ValueError, KeyError, RuntimeError) as error:
        path = pathlib.Path(args.output_dir, project)
        raise common.DataError(f"{path}: no search that could go on ({error}). Remove it.") from error


def _digest(args, parts):
    """Names what all trials of a search have in common, so that none of another search counts."""
    places = ("data", "test_data", "pretrain_data", "output_dir", "report", "trials", "force", "asked")
    common_settings = {name: value for name, value in vars(args).items() if name not in places}
    known = json.dumps([common_settings, [row[:2] for row in parts.rows], parts.more], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()[:8]


def command(args, best):
    """The command line of the recipe with what was asked for, and the best hyper-parameters."""
    words = ["python", "-m", "tasks.classification"]
    for name, value in {**vars(args), **best}.items():
        if name in best or (name in args.asked and name not in OWN):
            values = value if isinstance(value, list) else [value]
            words += [common.flag(name), *([] if value is True else map(str, values))]
    return shlex.join(words)


def run(args, search):
    import keras

    done = len(search.results())
    if done:
        print(f"{search.project_dir}: goes on after {done} trials")
    search.search()
    trials, rows = search.results(), len(search.parts.rows)
    report = {
        "task": "tune",
        "backend": keras.config.backend(),
        "rows": rows,
        "labels": search.parts.labels,
        "trials": trials,
        "command": command(args, trials[0]["hyperparameters"]),
        "settings": vars(args),
    }
    common.write_report(args.report or pathlib.Path(args.output_dir) / "tune.json", report)
    names = list(trials[0]["hyperparameters"])
    print(f"{rows} rows in {len(search.parts.held)} folds; trial 0 has the settings that were given")
    print("  ".join(["trial", "accuracy", "error ", *names]))
    for trial in trials:
        numbers = [f"{trial['trial']:5d}", f"{trial['accuracy']:8.4f}", f"{trial['standard_error']:.4f}"]
        values = (f"{trial['hyperparameters'][name]:{len(name)}g}" for name in names)
        print("  ".join([*numbers, *values]))
    print(report["command"])


def parser():
    flags = classification.parser("tune", __doc__)
    flags.add_argument("--trials", type=common.positive, default=20)
    flags.add_argument("--search", choices=SEARCHES, default=SEARCHES[0])
    return flags


def main(arguments=None):
    flags = parser()
    args = flags.parse_args(arguments)
    try:
        search = prepare(args)
    except ValueError as error:
        flags.error(str(error))
    with common.told(flags):
        run(args, search)


if __name__ == "__main__":
    main()
