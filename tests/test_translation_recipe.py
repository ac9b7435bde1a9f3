"""The translation recipe end to end on small data, and what it refuses with exit code 2."""

import io
import json
import time

import keras
import pytest

import keras_llama
from tasks import baselines, data, delivery, translation

WORDS = {"red": "红", "blue": "蓝", "small": "小", "big": "大"}
THINGS = {"ball": "球", "car": "车", "house": "房子", "dog": "狗", "book": "书", "cup": "杯子"}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    rows = [
        (f"a {w} {v} {thing}", f"{x}的{y}{name}")
        for w, x in WORDS.items()
        for v, y in WORDS.items()
        for thing, name in THINGS.items()
    ]
    path.write_text("".join(f"{source}\t{target}\tby nobody\n" for source, target in rows), encoding="utf-8")
    return path


SHORT = ["--sequence-length", "32", "--batch-size", "16", "--num-beams", "2"]
FAST = ["--size", "0.3m", "--vocabulary-size", "300", *SHORT]


def run(*arguments):
    translation.main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_trains_scores_translates_and_exports(pairs, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    run("--data", pairs, "--output-dir", output, *FAST, "--epochs", 2, "--encoder-layers", 1)
    report = json.loads((output / "metrics.json").read_text())
    assert report["task"] == "translation"
    assert report["rows"] == {"train": 77, "validation": 9, "test": 10}
    assert {"bleu", "chrf", "greedy", "parameters", "train_seconds", "examples_per_second"} <= set(report)
    assert 0 < report["baseline"]["bleu"] < 100
    assert len(report["samples"]) == 10
    for picture in ("training.png", "alignment.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "nearest training sentence's translation" in printed
    assert "make no translator" not in printed  # said of the default data only
    model = keras.saving.load_model(output / "model.keras")
    assert delivery.serve(output / "saved_model", ["a red big dog"])["texts"] == [model.generate("a red big dog")]
    monkeypatch.setattr("sys.stdin", io.StringIO("a red big dog\n\n"))
    run("--preset", output / "model.keras", "--interactive", "--output-dir", tmp_path / "other", *SHORT)
    assert capsys.readouterr().out.splitlines()[-1] == model.generate("a red big dog", num_beams=2, length_penalty=1.5)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("not_exported")
def test_a_decoder_alone_is_fine_tuned(pairs, chat_lm, tmp_path, capsys):
    chat_lm.save_to_preset(tmp_path / "preset")
    flags = ["--data", pairs, "--limit", 24, "--epochs", 1, *SHORT, "--preset", tmp_path / "preset"]
    flags += ["--sequence-length", 64, "--label-smoothing", 0.3]
    for architecture, kind in (
        ("decoder", keras_llama.LlamaCausalLM),
        ("encoder-decoder", keras_llama.LlamaSeq2SeqLM),
    ):
        output = tmp_path / architecture
        few = ["--trainable", "lora", "--lora-rank", 2]
        run(*flags, "--architecture", architecture, "--output-dir", output, *few)
        model = keras.saving.load_model(output / "model.keras")
        assert isinstance(model, kind)
        assert {weight.path.rsplit("/", 1)[1] for weight in model.trainable_weights} == {"lora_a", "lora_b"}
        assert (output / "adapter" / "adapter_model.safetensors").is_file()
        assert getattr(model, "label_smoothing", 0.3) == 0.3
        assert json.loads((output / "metrics.json").read_text())["architecture"] == architecture


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("not_exported")
def test_a_decoder_from_scratch_cuts_what_is_too_long(pairs, tmp_path):
    with pairs.open("a", encoding="utf-8") as file:
        file.writelines(f"{'a red big dog and ' * 20}number {i}\t红的大狗\n" for i in range(12))
    flags = ["--data", pairs, "--architecture", "decoder", "--epochs", 1, *FAST, "--output-dir", tmp_path / "out"]
    run(*flags, "--sequence-length", 24)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]["test"] == 11


@pytest.mark.plain
def test_the_default_data_are_pairs_of_interface_text():
    rows = data.interface_rows()
    assert len(rows) > 3000
    assert len({row[:2] for row in rows}) == len(rows)
    assert ("Files", "文件", "jupyterlab_language_pack_zh_CN") in rows


@pytest.mark.plain
def test_the_nearest_sentence_is_the_floor():
    train = [("a red ball", "红球"), ("the weather is fine", "天气很好")]
    assert baselines.nearest_translations(train, ["the weather was fine", "red balls"]) == ["天气很好", "红球"]


def refused(capsys, *arguments):
    """What the recipe prints when it refuses; it must leave with 2, before any training."""
    started = time.perf_counter()
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 2
    assert time.perf_counter() - started < 20
    return capsys.readouterr().err


BAD_FILES = {
    "one column": ("t.tsv", "a\tb\nonly\n", "t.tsv:2: expected source<TAB>target. Received: 1 column"),
    "an empty source": ("t.tsv", "a\tb\n\tc\n", "t.tsv:2: expected a source and a target"),
    "an empty target": ("t.tsv", "a\tb\nc\t \n", "t.tsv:2: expected a source and a target"),
    "no json": ("t.jsonl", '{"source": "a", "target": "b"}\n{oops\n', "t.jsonl:2: expected a JSON object"),
    "json without target": ("t.jsonl", '{"source": "a"}\n', "t.jsonl:1: expected a JSON object"),
    "a number": ("t.jsonl", '{"source": "a", "target": 3}\n', "t.jsonl:1: expected a source and a target"),
    "another ending": ("t.csv", "a,b\n", "t.csv: expected a file ending in"),
    "an empty file": ("t.tsv", "", "t.tsv: expected at least one pair"),
    "too few pairs": ("t.tsv", "a\tb\nc\td\n", "Expected pairs to train, validate and test on"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_bad_files_by_file_and_line(tmp_path, capsys, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert message in refused(capsys, "--data", tmp_path / name, "--output-dir", tmp_path / "out")


BAD_FLAGS = {
    "--num-beams": ("0", "at least 1"),
    "--length-penalty": ("9", "must lie in (-9, 9)"),
    "--label-smoothing": ("1", "must lie in [0, 1)"),
    "--architecture": ("encoder", "invalid choice"),
    "--preset": ("nothing.keras", "cannot be loaded"),
    "--tokenize": ("chinese", "`tokenize` must be one of"),
}


@pytest.mark.plain
@pytest.mark.parametrize(("flag", "value"), [("--label-smoothing", 0.2), ("--encoder-layers", 1)])
def test_a_decoder_alone_refuses_what_it_has_not(pairs, tmp_path, capsys, flag, value):
    flags = ["--data", pairs, "--output-dir", tmp_path / "out", "--architecture", "decoder", flag, value]
    assert f"Leave out {flag}: --architecture decoder has none" in refused(capsys, *flags)
    assert not (tmp_path / "out" / "model.keras").exists()


@pytest.mark.plain
@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_refuses_bad_flags(pairs, tmp_path, capsys, flag):
    value, message = BAD_FLAGS[flag]
    assert message in refused(capsys, "--data", pairs, "--output-dir", tmp_path / "out", flag, value)
