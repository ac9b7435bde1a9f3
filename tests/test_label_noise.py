"""Cross-validated predictions never come from a model that saw the text, and swapped labels are found by them."""

import csv

import numpy as np
import pytest

import keras_llama
from tasks import classification, classifiers, common, folds, label_noise

WORDS = {"sport": ["ball", "team", "goal", "match"], "tech": ["chip", "code", "robot", "data"]}
LABELS = sorted(WORDS)
SHORT = ["--sequence-length", "16", "--batch-size", "16", "--epochs", "3"]
FAST = ["--vocabulary-size", "330", "--size", "0.3m", *SHORT]


def rows(count=160, swapped=()):
    generator = np.random.default_rng(0)
    made = []
    for i in range(count):
        kind = LABELS[i % 2]
        text = f"{' '.join(generator.choice(WORDS[kind], 4))} {i}"
        made.append((text, LABELS[1 - i % 2] if i in swapped else kind, f"train.tsv:{i + 1}"))
    return made


def arguments(*flags, fast=FAST):
    return classification.parser().parse_args([*fast, *map(str, flags)])


def of_a_preset(preset, *flags):
    return arguments("--preset", preset, "--trainable", "head", "--folds", 2, *flags, fast=SHORT)


@pytest.mark.plain
def test_equal_texts_stay_together_and_labels_are_shared_out():
    table = [*rows(60), *rows(60)]
    held = folds.split(table, LABELS, 4)
    assert sorted(np.concatenate(held)) == list(range(120))
    texts = [{table[i][0] for i in part} for part in held]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 60
    for part in held:
        assert abs([table[i][1] for i in part].count("sport") - len(part) / 2) <= 2


@pytest.mark.plain
def test_no_model_has_seen_what_it_is_asked(monkeypatch):
    """Every text is asked once, by a model trained on no row of that text."""
    table = [*rows(40), *rows(10)]
    seen, fit = [], classifiers.fit

    def spied(args, models, more, train, validation):
        seen.append({text for text, *_ in train + validation})
        return fit(args, models, more, train, validation)

    monkeypatch.setattr(classifiers, "fit", spied)
    parts = folds.Folds(arguments("--folds", 2, "--epochs", 1, "--resume", "nowhere", "--profile"), table, LABELS)
    found = label_noise.out_of_fold(parts)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    for held, trained in zip(parts.held, seen, strict=True):
        assert trained == {row[0] for row in table} - {table[i][0] for i in held}


@pytest.fixture
def preset(chat_lm, tmp_path):
    chat_lm.save_to_preset(tmp_path / "preset")
    return tmp_path / "preset"


@pytest.mark.plain
def test_a_frozen_base_reads_each_text_once(preset, monkeypatch):
    from keras_llama import LlamaTextClassifier

    asked, features = [], LlamaTextClassifier.features
    monkeypatch.setattr(
        LlamaTextClassifier, "features", lambda self, x, *args: asked.extend(x) or features(self, x, *args)
    )
    args = of_a_preset(preset, "--learning-rate", 0.05, "--epochs", 20)
    table = [(f"{'what is a good' if i % 2 else 'the answer'} {i}", LABELS[i % 2], "") for i in range(32)]
    parts = folds.Folds(args, table, LABELS)
    found = label_noise.out_of_fold(parts)
    assert sorted(asked) == sorted(text for text, *_ in table)
    assert np.mean(found.argmax(axis=1) == np.arange(32) % 2) > 0.65
    again = parts.probabilities(0, of_a_preset(preset, "--learning-rate", 1e-6))
    assert np.abs(again - found[parts.held[0]]).max() > 0.05  # another rate, from the start
    assert len(asked) == 32


@pytest.mark.plain
def test_a_fold_has_the_same_seed_whenever_it_is_asked(preset):
    table = [(f"what is {i}", LABELS[i % 2], "") for i in range(8)]
    parts = folds.Folds(of_a_preset(preset, "--epochs", 1), table, LABELS)
    np.testing.assert_array_equal(*(parts.probabilities(0) for _ in range(2)))


@pytest.mark.plain
def test_a_classifier_that_may_have_seen_the_rows_is_refused(chat_lm, tmp_path):
    known = keras_llama.LlamaTextClassifier(chat_lm.backbone, labels=LABELS, preprocessor=chat_lm.preprocessor)
    known.save_to_preset(tmp_path / "known")
    with pytest.raises(common.DataError, match="known: may have been trained on the rows"):
        folds.Folds(arguments("--preset", tmp_path / "known", "--folds", 2), rows(8), LABELS)


@pytest.mark.plain
def test_suspects_are_ranked_by_the_probability_of_the_given_label():
    given = np.array([0, 1] * 20)
    probabilities = np.where(np.eye(2)[given] == 1, 0.9, 0.1)
    probabilities[4], probabilities[7] = (0.1, 0.9), (0.95, 0.05)
    assert label_noise.suspects(given, probabilities).tolist() == [7, 4]
    assert label_noise.suspects(given, np.where(np.eye(2)[given] == 1, 0.9, 0.1)).tolist() == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("not_exported")
def test_the_recipe_finds_swapped_labels(tmp_path, capsys):
    swapped = set(range(0, 200, 25))
    path, output = tmp_path / "train.tsv", tmp_path / "deep" / "noise.csv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label, _ in rows(200, swapped)), encoding="utf-8")
    flags = ["--data", path, "--label-noise-report", output, "--folds", 3, "--output-dir", tmp_path / "out", *FAST]
    classification.main([str(flag) for flag in flags])
    with output.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [*found[0]] == ["place", "text", "label", "suggested", "quality"]
    qualities = [float(row["quality"]) for row in found]
    assert qualities == sorted(qualities)
    train, _ = common.split([(*row[:2], f"{path}:{i}") for i, row in enumerate(rows(200, swapped), 1)], 0.2)
    known = {place: (text, label) for text, label, place in train}
    wrong = {place for _, _, place in train if int(place.rsplit(":", 1)[1]) - 1 in swapped}
    assert all((row["text"], row["label"]) == known[row["place"]] for row in found)
    assert all({row["label"], row["suggested"]} == set(LABELS) for row in found)
    # How many are found depends on what three small models learn, and so on a backend's rounding.
    hits = wrong.intersection(row["place"] for row in found)
    assert len(hits) >= 0.7 * len(wrong)
    assert len(hits) >= 0.5 * len(found)
    assert f"{output}: {len(found)} of {len(train)} training rows" in capsys.readouterr().out


@pytest.fixture
def refused(tmp_path, capsys):
    path = tmp_path / "train.tsv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label, _ in rows(40)), encoding="utf-8")

    def run(*flags):
        with pytest.raises(SystemExit) as left:
            classification.main(["--data", str(path), "--label-noise-report", str(tmp_path / "noise.csv"), *flags])
        assert left.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.plain
def test_what_it_cannot_start_with_is_refused(refused, tmp_path, monkeypatch):
    assert "--folds must be at least 2" in refused("--folds", "1")
    assert "has 13 to train on. Received: 17" in refused("--folds", "17")
    assert "model.keras: may have been trained" in refused("--preset", "model.keras")
    assert "expected a file to write to" in refused("--label-noise-report", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs cleanlab: pip install cleanlab" in refused()
