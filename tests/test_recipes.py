"""The classification recipe end to end on small data, and what it refuses with exit code 2."""

import json
import subprocess
import sys
import time
import types

import keras
import numpy as np
import pytest
import safetensors.numpy
from tensorboard.backend.event_processing import event_accumulator

import keras_llama
from tasks import baselines, classification, classifiers, common, data, delivery, plots, speed

WORDS = {"sport": ["ball", "team", "goal", "match"], "tech": ["chip", "code", "robot", "data"]}


def rows(count, seed=0):
    generator = np.random.default_rng(seed)
    for i in range(count):
        label = ["sport", "tech"][i % 2]
        yield f"{' '.join(generator.choice(WORDS[label], 4))} {generator.integers(1000)}", label


@pytest.fixture
def tsv(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label in rows(200)), encoding="utf-8")
    return path


FAST = ["--vocabulary-size", "330", "--sequence-length", "16", "--batch-size", "16", "--epochs", "3"]


@pytest.mark.slow
def test_trains_reports_saves_and_exports(tsv, tmp_path, capsys):
    output = tmp_path / "out"
    classification.main(["--data", str(tsv), "--output-dir", str(output), "--tensorboard", "--profile", *FAST])
    report = json.loads((output / "metrics.json").read_text())
    assert report["rows"] == {"train": 144, "validation": 16, "test": 40}
    assert report["accuracy"] >= 0.9
    assert report["baseline_accuracy"] >= 0.9
    assert {"task", "parameters", "train_seconds", "examples_per_second", "macro_f1"} <= set(report)
    assert report["classes"]["sport"]["support"] + report["classes"]["tech"]["support"] == 40
    assert 0 <= report["standard_error"] < 0.05
    for picture in ("training.png", "confusion.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    for part in ("train", "validation"):
        logged = event_accumulator.EventAccumulator(str(output / "logs" / "0" / part)).Reload()
        assert [event.step for event in logged.Tensors("epoch_accuracy")] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "LinearSVC" in printed
    assert f"{output / 'profile'}: a profile of 5 training steps" in printed
    assert [found for found in (output / "profile").rglob("*") if found.is_file()]
    model = keras.saving.load_model(output / "model.keras")
    assert model.classify("goal match team")["label"] == "sport"
    assert delivery.serve(output / "saved_model", ["goal match team"])["labels"] == ["sport"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("not_exported")
def test_goes_on_from_a_saved_model_with_other_flags(tsv, tmp_path):
    first = tmp_path / "first"
    test = tmp_path / "test.tsv"
    test.write_text("".join(f"{text}\t{label}\n" for text, label in rows(40, seed=1)), encoding="utf-8")
    arguments = ["--data", str(tsv), "--test-data", str(test), "--limit", "40", "--batch-size", "16", "--epochs", "1"]
    classification.main([*arguments, *FAST[:4], "--output-dir", str(first), "--precision", "mixed_bfloat16"])
    report = tmp_path / "deep" / "report.json"
    arguments += ["--preset", str(first / "model.keras"), "--validation-share", "0"]
    classification.main([*arguments, "--output-dir", str(first), "--report", str(report)])
    found = json.loads(report.read_text())
    kept = {"precision": "mixed_bfloat16", "sequence_length": 16, "vocabulary_size": None, "head_dropout": None}
    assert found["settings"] | kept == found["settings"]
    assert found["rows"] == {"train": 40, "validation": 0, "test": 40}
    assert found["val_accuracy"] is None
    before = json.loads((first / "metrics.json").read_text())
    assert before["rows"] == {"train": 40, "validation": 20, "test": 40}
    assert found["parameters"] == before["parameters"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("not_exported")
def test_pretrains_averages_and_goes_on_after_an_interruption(tsv, tmp_path, capsys, monkeypatch):
    """Interrupted in the second classifier, it ends as it would have without."""
    texts = tmp_path / "more.txt"
    texts.write_text("the goal\n\nthe chip\n" * 20)
    arguments = ["--data", str(tsv), *FAST, "--models", "2", "--pretrain-epochs", "1", "--pretrain-data", str(texts)]
    arguments += ["--class-weights", "balanced", "--epochs", "1"]
    classification.main([*arguments, "--resume", str(tmp_path / "a"), "--output-dir", str(tmp_path / "whole")])
    train, calls = classifiers.train, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args)

    again = [*arguments, "--resume", str(tmp_path / "b"), "--output-dir", str(tmp_path / "again")]
    with monkeypatch.context() as patch:
        patch.setattr(classifiers, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            classification.main(again)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["classifier_0", "pretraining"]
    classification.main(again)
    reports = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "again")]
    np.testing.assert_allclose(reports[0]["val_accuracy"], reports[1]["val_accuracy"])
    models = [keras.saving.load_model(tmp_path / name / "model.keras") for name in ("whole", "again")]
    asked = [text for text, _ in rows(20, seed=5)]
    assert len(models[0].members) == 2
    np.testing.assert_allclose(*(model.predict(asked, verbose=0) for model in models), atol=1e-4)
    assert "precision" in capsys.readouterr().out


@pytest.mark.plain
def test_the_speed_is_of_the_epochs_that_are_run_now(monkeypatch):
    clock, models = [0.0], 2 * [types.SimpleNamespace(compile=lambda **_: None, head="score")]

    def pretrain(*_):
        clock[0] += 100

    def fit(args, model, name, texts, labels, callbacks, **_):
        clock[0] += 4
        callbacks[0].on_epoch_end(3, {})
        return types.SimpleNamespace(history={"loss": [1.0] * 4})  # three of them before an interruption

    monkeypatch.setattr(common, "fit", fit)
    monkeypatch.setattr(classifiers, "pretrain", pretrain)
    monkeypatch.setattr(keras_llama, "LlamaClassifierEnsemble", list)
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    made, args = [(*row, "") for row in rows(20)], classification.parser().parse_args(["--pretrain-epochs", "1"])
    _, histories, found = classifiers.fit(args, models, [], made, made)
    assert (len(histories[0]["loss"]), found.per_second) == (4, 5)


@pytest.mark.plain
def test_a_presets_own_labels_and_pooling_stay(tokenizer, make_backbone, tmp_path):
    preprocessor = keras_llama.TextPreprocessor(tokenizer, 16)
    backbone = make_backbone(vocabulary_size=tokenizer.vocabulary_size)
    before = keras_llama.LlamaTextClassifier(backbone, labels=["tech", "sport"], preprocessor=preprocessor)
    before.save_to_preset(tmp_path / "preset")
    flags = ["--preset", str(tmp_path / "preset"), "--sequence-length", "16", "--head-dropout", "0.3"]
    args = classification.parser().parse_args(flags)
    model = classifiers.build(args, [], ["sport", "tech"])
    assert (model.labels, model.pooling, model.dropout) == (["tech", "sport"], "last", 0.3)
    texts = ["a good film", "goal"]
    np.testing.assert_array_equal(model.predict(texts, verbose=0), before.predict(texts, verbose=0))
    with pytest.raises(common.DataError, match=r"with the labels \['a', 'b'\]. Received: \['tech', 'sport'\]"):
        classifiers.build(args, [], ["a", "b"])


def test_pretrained_weights_are_each_classifiers_own(monkeypatch):
    """Arrays that two models share are gone, on JAX, when one of them is used."""
    args = classification.parser().parse_args([*FAST, "--pretrain-epochs", "1", "--ngram-count", "2"])
    texts = [text for text, _ in rows(16)]
    models = [classifiers.build(args, texts, ["a", "b"], number) for number in range(2)]
    classifiers.pretrain(args, models, texts, [])
    answers = [[model.predict(texts, verbose=0) for model in models] for _ in range(2)]
    np.testing.assert_array_equal(*answers)
    with monkeypatch.context() as full:
        full.setattr("keras_llama.backend.free_memory", lambda: 1000)
        with pytest.raises(common.DataError, match="--force trains anyway"):
            classifiers.pretrain(args, models, texts, [])
    for one, other in zip(*(model.backbone.weights for model in models), strict=True):
        np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(weight) for weight in (one, other)))


def refused(capsys, *arguments):
    """What the recipe prints when it refuses; it must leave with 2, before any training."""
    started = time.perf_counter()
    with pytest.raises(SystemExit) as left:
        classification.main([str(argument) for argument in arguments])
    assert left.value.code == 2
    assert time.perf_counter() - started < 20
    return capsys.readouterr().err


BAD_FILES = {
    "a row of one column": (
        "t.tsv",
        b"good\tpos\nno label\n",
        r"t.tsv:2: expected text<TAB>label. Received: 1 columns",
    ),
    "a row of three columns": ("t.tsv", b"good\tpos\nbad\tneg\tmore\n", "t.tsv:2"),
    "an empty text": ("t.tsv", b"good\tpos\n\tneg\n", "t.tsv:2: expected a text and a label"),
    "no UTF-8": ("t.tsv", b"good\tpos\n\xff\xfe\tneg\n", "t.tsv:2: expected UTF-8"),
    "an empty file": ("t.tsv", b"", "t.tsv: expected at least one row"),
    "a csv without label": ("t.csv", b"text,class\na,b\n", "t.csv:1: expected a header"),
    "a short csv row": ("t.csv", b"text,label\na,b\nc\n", "t.csv:3: expected 2 columns"),
    "no json": ("t.jsonl", b'{"text": "a", "label": "b"}\n{oops\n', "t.jsonl:2: expected a JSON object"),
    "json without label": ("t.jsonl", b'{"text": "a"}\n', "t.jsonl:1"),
    "a number for a text": ("t.jsonl", b'{"text": 3, "label": "b"}\n', "t.jsonl:1: expected a text"),
    "another ending": ("t.xml", b"<a/>", "t.xml: expected a file ending in"),
    "one class only": ("t.tsv", b"".join(b"text %d\tpos\n" % i for i in range(50)), "at least two labels"),
    "too few rows": ("t.tsv", b"good\tpos\nbad\tneg\n", "Expected rows of two labels"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_bad_files_by_file_and_line(tmp_path, capsys, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    assert message in refused(capsys, "--data", tmp_path / name)


@pytest.mark.plain
def test_refuses_a_missing_file(tmp_path, capsys):
    assert "none.tsv: cannot be read (No such file" in refused(capsys, "--data", tmp_path / "none.tsv")


@pytest.mark.plain
def test_refuses_a_test_label_that_training_lacks(tsv, tmp_path, capsys):
    (tmp_path / "test.tsv").write_text("x\tsport\ny\tart\n")
    assert "test.tsv:2: expected a label of" in refused(capsys, "--data", tsv, "--test-data", tmp_path / "test.tsv")


BAD_FLAGS = {
    "--limit": ("0", "at least 1"),
    "--epochs": ("0", "at least 1"),
    "--sequence-length": ("0", "at least 1"),
    "--size": ("enormous", "`size` must be one of"),
    "--vocabulary-size": ("5", "`vocabulary_size` must be at least"),
    "--dropout": ("1.5", "must lie in [0, 1)"),
    "--ngram-count": ("-1", "at least 0"),
    "--models": ("0", "at least 1"),
    "--class-weights": ("heavy", "invalid choice"),
    "--learning-rate": ("-1", "above 0"),
    "--precision": ("int3", "invalid choice"),
    "--optimizer": ("lion", "invalid choice"),
    "--jit": ("maybe", "invalid choice"),
    "--preset": ("nothing.keras", "--preset nothing.keras: cannot be loaded"),
}


@pytest.mark.plain
@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_refuses_bad_flags(tsv, capsys, flag):
    value, message = BAD_FLAGS[flag]
    assert message in refused(capsys, "--data", tsv, flag, value)


@pytest.mark.plain
def test_refuses_a_preset_of_other_labels_or_without_a_tokenizer(tsv, tmp_path, capsys, tokenizer):
    backbone = keras_llama.LlamaBackbone(vocabulary_size=300, **keras_llama.size("tiny"))
    for preprocessor, message in (
        (keras_llama.TextPreprocessor(tokenizer, 16), "with the labels ['sport', 'tech']"),
        (None, "expected a model with a tokenizer"),
    ):
        classifier = keras_llama.LlamaTextClassifier(backbone, labels=["a", "b"], preprocessor=preprocessor)
        classifier.save(tmp_path / "other.keras")
        assert message in refused(capsys, "--data", tsv, "--preset", tmp_path / "other.keras")


@pytest.mark.plain
def test_bad_data_are_told_before_keras_starts(tmp_path):
    code = "import sys; from tasks import classification\ntry: classification.main(['--data', 'none.tsv'])\n"
    code += "except SystemExit: print('keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.plain
def test_reads_all_formats_alike(tmp_path):
    wanted = [("good, really", "pos"), ('bad "one"', "neg")]
    files = {
        "a.tsv": '\ufeffgood, really\tpos\r\nbad "one"\tneg\r\n',
        "b.csv": 'label,text\npos,"good, really"\nneg,"bad ""one"""\n',
        "c.jsonl": '{"text": "good, really", "label": "pos"}\n{"label": "neg", "text": "bad \\"one\\""}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        assert [row[:2] for row in data.labelled_texts(str(tmp_path / name))] == wanted
    (tmp_path / "d.csv").write_text("label,title,description\npos,good,really\n")
    assert data.labelled_texts(str(tmp_path / "d.csv"))[0][0] == "good really"


@pytest.mark.plain
def test_reviews_are_distinct_consistent_and_split_by_text():
    found = data.review_rows()
    texts = [text for text, *_ in found]
    assert len(texts) == len(set(texts)) == 17_363
    train, test = common.split(found, 0.2)
    assert (len(train), len(test)) == (13_890, 3_473)
    assert not {row[0] for row in train} & {row[0] for row in test}
    assert common.split(found, 0.2) == (train, test)


@pytest.fixture
def resumed(tsv, tmp_path):
    """Arguments that keep the state of a short training, and the file of its classifier's."""
    arguments = ["--data", tsv, *FAST, "--epochs", "1", "--limit", "32", "--output-dir", tmp_path / "out"]
    return [*arguments, "--resume", tmp_path / "state"], tmp_path / "state" / "classifier_0" / "training.safetensors"


@pytest.mark.plain
def test_a_resume_directory_of_something_else_is_refused(resumed, tmp_path, capsys):
    arguments, state = resumed
    state.parent.mkdir(parents=True)
    state.write_bytes(b"no state")
    assert "must be a state that an earlier training wrote" in refused(capsys, *arguments)
    assert state.read_bytes() == b"no state"
    assert not (tmp_path / "out" / "model.keras").exists()


@pytest.mark.plain
@pytest.mark.usefixtures("not_exported")
def test_a_resume_directory_of_other_data_is_refused(resumed, tmp_path, capsys):
    arguments, state = resumed
    classification.main([*map(str, arguments)])
    before, model = state.read_bytes(), (tmp_path / "out" / "model.keras").read_bytes()
    (tmp_path / "other.tsv").write_text("".join(f"{text}!\t{label}\n" for text, label in rows(200, seed=3)))
    message = refused(capsys, *arguments, "--data", tmp_path / "other.tsv")
    assert "must be of" in message
    assert (state.read_bytes(), (tmp_path / "out" / "model.keras").read_bytes()) == (before, model)


@pytest.mark.plain
def test_a_full_disk_is_told(resumed, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    message = refused(capsys, *resumed[0])
    assert "training.safetensors: cannot be written" in message
    assert not list((tmp_path / "state" / "classifier_0").iterdir())


BAD_TEXTS = {
    "empty": (b"", "expected at least one line of text. Received: an empty file"),
    "blank": (b"\n \n", "expected at least one line of text"),
    "binary": (b"good\n\x00\x01\n", "more.txt:2: expected text. Received: the character"),
    "no UTF-8": (b"\xff\xfe\n", "more.txt:1: expected UTF-8"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_TEXTS)
def test_refuses_bad_pretraining_texts(tsv, tmp_path, capsys, case):
    content, message = BAD_TEXTS[case]
    (tmp_path / "more.txt").write_bytes(content)
    options = ["--pretrain-epochs", "1", "--pretrain-data", tmp_path / "more.txt", "--output-dir", tmp_path / "out"]
    assert message in refused(capsys, "--data", tsv, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.plain
@pytest.mark.parametrize("flags", [["--models", "2"], ["--pretrain-epochs", "1"]])
def test_a_preset_has_its_weights(tsv, capsys, flags):
    assert "are for a model from scratch" in refused(capsys, "--data", tsv, "--preset", "some.keras", *flags)


@pytest.fixture
def classifier(tokenizer, make_backbone):
    def made(dtype):
        backbone = make_backbone(vocabulary_size=tokenizer.vocabulary_size, dtype=dtype)
        preprocessor = keras_llama.TextPreprocessor(tokenizer, 64)
        return keras_llama.LlamaTextClassifier(backbone, labels=["a", "b"], preprocessor=preprocessor)

    return made


@pytest.mark.plain
@pytest.mark.parametrize(("dtype", "near"), [("float32", 5e-5), ("mixed_float16", 5e-3), ("bfloat16", 3e-2)])
def test_an_export_may_round_as_its_precision_does(classifier, tmp_path, monkeypatch, dtype, near):
    model, texts = classifier(dtype), ["a good film", "a bad film"]
    exact = keras.ops.convert_to_numpy(model.probabilities(model.predict(texts, verbose=0)))

    def served(apart):
        found = exact + np.array([apart, -apart])
        labels = [model.labels[i] for i in found.argmax(axis=1)]
        monkeypatch.setattr(delivery, "exported", lambda *_: {"probabilities": found.tolist(), "labels": labels})

    served(near)
    delivery.classifier(model, tmp_path, texts)
    served(4 * near)
    with pytest.raises(RuntimeError, match="answers otherwise"):
        delivery.classifier(model, tmp_path, texts)
    served(near)
    model.labels.reverse()
    with pytest.raises(RuntimeError, match="answers otherwise"):
        delivery.classifier(model, tmp_path, texts)


@pytest.mark.plain
def test_the_report_is_written_before_anything_is_delivered(tsv, classifier, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("The exported model answers otherwise")

    model = classifier("float32")
    model.labels = sorted(WORDS)
    monkeypatch.setattr(classifiers, "built", lambda *_: [model])
    fitted = model, [{"loss": [1.0], "val_accuracy": [1.0]}], speed.Speed(1, 1.0)
    monkeypatch.setattr(classifiers, "fit", lambda *_: fitted)
    monkeypatch.setattr(delivery, "classifier", fail)
    with pytest.raises(RuntimeError, match="answers otherwise"):
        classification.main(["--data", str(tsv), "--output-dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["task"] == "classification"


@pytest.mark.plain
def test_tensorboard_must_be_there(tsv, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        classification.main(["--data", str(tsv), *FAST, "--tensorboard"])
    assert "--tensorboard needs TensorBoard: pip install tensorboard" in capsys.readouterr().err


@pytest.mark.plain
def test_pretraining_data_need_epochs(tsv, capsys):
    assert "--pretrain-data needs --pretrain-epochs" in refused(capsys, "--data", tsv, "--pretrain-data", tsv)


@pytest.mark.plain
def test_training_rows_that_stand_in_the_test_are_left_out(capsys):
    train = [("a", "x", "1"), ("b", "x", "2"), ("a", "x", "3"), ("c", "y", "4")]
    assert data.distinct(train, [("b", "x", "t")]) == [("a", "x", "1"), ("c", "y", "4")]
    assert "2 training rows left out" in capsys.readouterr().out


@pytest.mark.plain
def test_balanced_weights_make_classes_count_alike():
    labels = ["a"] * 6 + ["b"] * 2 + ["c"]
    weights = classifiers.balanced(labels)
    sums = [sum(w for w, label in zip(weights, labels, strict=True) if label == name) for name in "abc"]
    np.testing.assert_allclose(sums, 3)
    assert np.mean(weights) == pytest.approx(1)


@pytest.mark.plain
@pytest.mark.parametrize("fonts", [plots.CHINESE_FONTS, ()], ids=["a font", "no font"])
def test_a_confusion_matrix_is_drawn_with_chinese_names(tmp_path, recwarn, monkeypatch, fonts):
    """Or with their numbers where no font has them, but never with boxes."""
    from matplotlib import figure, font_manager

    labels, save = [], figure.Figure.savefig

    def watched(self, *args, **kwargs):
        labels.extend(label.get_text() for label in self.axes[0].get_xticklabels())
        save(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", watched)
    monkeypatch.setattr(plots, "CHINESE_FONTS", fonts)
    plots.confusion(
        tmp_path / "confusion.png", ["体育", "财经", "\x1f$_$"], np.array([[8, 2, 0], [0, 0, 0], [1, 0, 3]])
    )
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]  # what matplotlib says of a box
    if fonts and not {font.name for font in font_manager.fontManager.ttflist} & set(fonts):
        pytest.skip("needs a Chinese font")
    assert labels == [*(["体育", "财经"] if fonts else [r"\u4f53\u80b2", r"\u8d22\u7ecf"]), r"\x1f$_$"]


@pytest.mark.plain
def test_equal_texts_stay_on_one_side():
    repeated = [(f"text {i % 30}", "a", "") for i in range(120)]
    train, test = common.split(repeated, 0.2)
    assert not {row[0] for row in train} & {row[0] for row in test}
    assert len(test) == 24


@pytest.mark.plain
def test_the_baseline_learns():
    table = [(text, label, "") for text, label in rows(60)]
    assert baselines.linear_classifier(table[:40], table[40:]) == 1.0
    assert baselines.linear_classifier(table[:40], [(text, "tech", "") for text, *_ in table[40:]]) == 0.5


@pytest.mark.plain
def test_news_and_reviews_of_the_shared_data_are_read(shared_data):
    assert len(data.labelled_texts(str(shared_data / "news" / "thucnews" / "dev.txt"))) == 10_000
    assert len(data.labelled_texts(str(shared_data / "news" / "ag_news" / "ag_news_7600.csv"))) == 7_600
    assert len({row[1] for row in data.labelled_texts(str(shared_data / "sentiment/chnsenticorp/dev.tsv"))}) == 2


@pytest.mark.plain
def test_labels_are_text_or_numbers(tmp_path):
    path = tmp_path / "train.jsonl"
    for label in ("null", '["a"]', "true"):
        path.write_text(f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {label}}}\n')
        with pytest.raises(common.DataError, match=r"train\.jsonl:2: expected a text and a label"):
            data.labelled_texts(str(path))


@pytest.mark.plain
def test_a_csv_field_that_is_too_long_is_named(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "x" * 200_000 + ",a\n")
    with pytest.raises(common.DataError, match=r"train\.csv:\d: expected rows of a CSV"):
        data.labelled_texts(str(path))


@pytest.mark.plain
def test_a_place_that_cannot_be_written_to_is_told_before_training(tsv, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for wrong in (["--output-dir", str(tmp_path / "file")], ["--report", str(tmp_path / "file" / "r.json")]):
        with pytest.raises(SystemExit) as left:
            classification.main(["--data", str(tsv), "--output-dir", str(tmp_path / "out"), *FAST, *wrong])
        assert left.value.code == 2
        assert "cannot be made a directory" in capsys.readouterr().err


@pytest.mark.plain
@pytest.mark.parametrize("flag", [["--weight-decay", "nan"], ["--learning-rate", "inf"], ["--dropout", "1"]])
def test_numbers_that_cannot_train_are_refused(tsv, flag):
    with pytest.raises(SystemExit) as left:
        classification.main(["--data", str(tsv), *FAST, *flag])
    assert left.value.code == 2


@pytest.mark.plain
def test_a_label_that_only_the_held_out_rows_have_is_known(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("".join(f"text {i}\tlabel{i % 12}\n" for i in range(120)))
    args = classification.parser().parse_args(["--data", str(path), "--limit", "20"])
    *_, labels = classification.load(args)
    assert len(labels) == 12


@pytest.mark.plain
def test_muon_turns_matrices_alone(rng):
    backbone = keras_llama.LlamaBackbone(vocabulary_size=30, **keras_llama.size("tiny"))
    classifier = keras_llama.LlamaTextClassifier(backbone, num_classes=3)
    for variable in classifier.trainable_variables:  # no gradient is 0, not even behind a matrix of zeros
        variable.assign(variable + rng.normal(0, 0.1, variable.shape))
    rate = 1e-3
    classifier.compile(common.optimizer("muon", rate, 0.0, classifier.head), jit_compile=False)
    before = {variable.path: keras.ops.convert_to_numpy(variable) for variable in classifier.trainable_variables}
    classifier.fit(rng.integers(1, 30, (64, 16)), rng.integers(0, 3, 64), batch_size=64, epochs=1, verbose=0)
    moved = {v.path: keras.ops.convert_to_numpy(v) - before[v.path] for v in classifier.trainable_variables}
    for path, change in moved.items():
        if change.ndim == 1 or any(name in path for name in ("embedding", "score")):
            largest = np.abs(change).max()  # the first step of AdamW is its rate, whatever the gradient
            np.testing.assert_allclose(largest, 2 * rate, rtol=0.05, err_msg=path)
        else:  # at least eight directions turned alike, and as far as AdamW would
            singular = np.linalg.svd(change, compute_uv=False) / (0.2 * rate * max(change.shape) ** 0.5)
            assert 0.6 < singular[7] <= singular[0] < 1.3, path
    assert sum("kernel" in path for path in moved) > sum("score" in path for path in moved)
