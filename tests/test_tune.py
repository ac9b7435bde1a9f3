"""A search scores trials on folds of the training rows, goes on where it stopped, and tells the best settings."""

import json
import math
import shlex

import numpy as np
import pytest

from tasks import classification, folds, tune, tuners

WORDS = {"sport": ["ball", "team", "goal", "match"], "tech": ["chip", "code", "robot", "data"]}
LABELS = sorted(WORDS)
SEARCHES = ["random", pytest.param("bayesian", marks=pytest.mark.slow)]


@pytest.fixture
def arguments(tmp_path):
    generator = np.random.default_rng(0)
    rows = [(f"{' '.join(generator.choice(WORDS[LABELS[i % 2]], 4))} {i}", LABELS[i % 2]) for i in range(120)]
    (tmp_path / "train set.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    fast = ["--vocabulary-size", 330, "--sequence-length", 16, "--batch-size", 16, "--epochs", 2, "--size", "0.3m"]
    flags = [*fast, "--data", tmp_path / "train set.tsv", "--output-dir", tmp_path / "out", "--folds", 3]
    return [str(flag) for flag in flags]


@pytest.fixture
def asked(monkeypatch):
    """Instead of training, answers as well as the learning rate is near to 4e-3; gives what was asked for."""
    calls = []

    def answer(self, fold, args):
        calls.append((args.learning_rate, fold))
        held = [self.rows[i] for i in self.held[fold]]
        wrong = round(len(held) * min(0.9, 0.2 * abs(math.log(args.learning_rate / 4e-3)))) + fold
        given = np.array([self.labels.index(label) for _, label, _ in held])
        given[:wrong] = 1 - given[:wrong]
        return np.eye(2)[given]

    monkeypatch.setattr(folds.Folds, "probabilities", answer)
    return calls


def result(tmp_path):
    return json.loads((tmp_path / "out" / "tune.json").read_text())


@pytest.mark.plain
@pytest.mark.parametrize("search", SEARCHES)
def test_trials_are_scored_by_folds_and_the_best_is_told(arguments, asked, tmp_path, capsys, search):
    tune.main([*arguments, "--trials", "8", "--search", search])
    report = result(tmp_path)
    trials = report["trials"]
    assert sorted(trial["trial"] for trial in trials) == list(range(8))
    assert len(asked) == 24
    assert [trial["accuracy"] for trial in trials] == sorted((trial["accuracy"] for trial in trials), reverse=True)
    for trial in trials:
        assert trial["accuracy"] == pytest.approx(np.mean(trial["folds"]))
        assert trial["standard_error"] == pytest.approx(np.std(trial["folds"]) / math.sqrt(2))
    given = next(trial["hyperparameters"] for trial in trials if trial["trial"] == 0)
    assert given["learning_rate"] == 2e-3
    assert given == {name: getattr(classification.parser().parse_args([]), name) for name in given}
    assert len({tuple(trial["hyperparameters"].values()) for trial in trials}) == 8
    best = trials[0]["hyperparameters"]
    assert report["command"] == capsys.readouterr().out.splitlines()[-1]
    program, words = shlex.split(report["command"])[:3], shlex.split(report["command"])[3:]
    assert program == ["python", "-m", "tasks.classification"]
    told = vars(classification.parser().parse_args(words))
    wanted = {**vars(classification.parser().parse_args(arguments)), **best}
    different = {name for name in told if told[name] != wanted[name]}
    assert different == {"output_dir", "folds", "asked"}


@pytest.mark.plain
def test_the_command_has_what_was_asked_for():
    flags = ["--force", "--pretrain-epochs", "1", "--pretrain-data", "a", "b c", "--preset", "x", "--trials", "3"]
    args = tune.parser().parse_args(flags)
    words = shlex.split(tune.command(args, {"learning_rate": 0.1}))[3:]
    told = classification.parser().parse_args(words)
    assert sorted(told.asked) == ["force", "learning_rate", "preset", "pretrain_data", "pretrain_epochs"]
    assert told.force is True
    assert told.pretrain_data == ["a", "b c"]


@pytest.mark.plain
@pytest.mark.parametrize("preset", [[], ["--preset", "x"]])
def test_only_what_a_training_reads_is_searched(preset):
    space = tuners.hyperparameters(tune.parser().parse_args(preset)).values
    assert "head_dropout" in space
    assert ("embedding_dropout" in space) == (not preset)
    assert "dropout" not in space


@pytest.mark.plain
def test_test_rows_are_not_among_the_folds(arguments):
    args = tune.parser().parse_args(arguments)
    train, validation, test, _ = classification.load(args)
    rows = tune.prepare(args).parts.rows
    assert sorted(rows) == sorted(train + validation)
    assert not {row[0] for row in rows} & {row[0] for row in test}


@pytest.mark.long
@pytest.mark.plain
@pytest.mark.parametrize("search", SEARCHES)
def test_an_interrupted_search_goes_on(arguments, asked, tmp_path, capsys, monkeypatch, search):
    flags = [*arguments, "--search", search]
    answer = folds.Folds.probabilities

    def interrupted(self, fold, args):
        if len(asked) == 7:  # in the third trial
            raise KeyboardInterrupt
        return answer(self, fold, args)

    with monkeypatch.context() as patch:
        patch.setattr(folds.Folds, "probabilities", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune.main([*flags, "--trials", "4"])
    assert not (tmp_path / "out" / "tune.json").exists()
    tune.main([*flags, "--trials", "4"])
    assert "goes on after 2 trials" in capsys.readouterr().out
    assert len(asked) == 7 + 6
    assert asked[6] == asked[7]  # the trial that was cut short has its settings still
    tune.main([*flags, "--trials", "8"])
    assert len(asked) == 7 + 6 + 12
    assert len(result(tmp_path)["trials"]) == 8
    tune.main([*flags, "--trials", "8", "--epochs", "1"])  # of other settings nothing counts
    assert len(asked) == 7 + 6 + 12 + 24


@pytest.mark.plain
def test_an_error_ends_the_search(arguments, monkeypatch):
    def broken(*_):
        raise ValueError("no memory")

    monkeypatch.setattr(folds.Folds, "probabilities", broken)
    with pytest.raises(RuntimeError, match=r"trial 0, .*learning_rate.*: no memory"):
        tune.main([*arguments, "--trials", "4"])


@pytest.mark.plain
def test_trains_on_folds(arguments, tmp_path):
    tune.main([*arguments, "--trials", "1", "--folds", "2", "--learning-rate", "0.005"])
    (first,) = result(tmp_path)["trials"]
    assert first["accuracy"] > 0.8
    assert len(first["folds"]) == 2


@pytest.mark.plain
def test_what_it_cannot_start_with_is_refused(arguments, tmp_path, capsys, monkeypatch):
    def refused(*flags):
        with pytest.raises(SystemExit) as left:
            tune.main([*arguments, *flags])
        assert left.value.code == 2
        return capsys.readouterr().err

    (tmp_path / "empty.tsv").write_text("")
    assert "--folds must be at least 2" in refused("--folds", "1")
    assert "to train on. Received: 90." in refused("--folds", "90")
    assert "expected at least one row" in refused("--data", str(tmp_path / "empty.tsv"))
    assert "--resume is for one training" in refused("--resume", "somewhere")
    assert "model.keras: may have been trained" in refused("--preset", "model.keras")
    assert "invalid choice" in refused("--search", "hyperband")
    assert "at least 1" in refused("--trials", "0")
    assert "`size` must be one of" in refused("--size", "enormous")
    with monkeypatch.context() as full:
        full.setattr("keras_llama.backend.free_memory", lambda: 1000)
        assert "--force trains anyway" in refused()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs keras-tuner: pip install keras-tuner" in refused()


@pytest.mark.plain
def test_a_damaged_search_is_refused(arguments, asked, tmp_path, capsys):
    tune.main([*arguments, "--trials", "1"])
    (state,) = (tmp_path / "out").glob("search_*/oracle.json")
    state.write_text(state.read_text()[:50])
    with pytest.raises(SystemExit) as left:
        tune.main([*arguments, "--trials", "2"])
    assert left.value.code == 2
    assert "no search that could go on" in capsys.readouterr().err
