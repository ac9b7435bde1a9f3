"""The question answering recipe end to end on small data, and what it refuses with exit code 2."""

import io
import json
import time

import keras
import pytest

import keras_llama
from tasks import answers, baselines, common, question_answering, readers

THINGS = {"ball": "box", "cup": "bag", "book": "bed", "key": "car", "coin": "hat", "ring": "tin"}
COLOURS = ("red", "blue", "green", "black")
FAST = ["--size", "0.3m", "--vocabulary-size", "330", "--sequence-length", "64", "--batch-size", "16"]
FAST += ["--max-answer-length", "8"]


def article(thing, place, colour, **changes):
    context = f"The {colour} {thing} is in the {place}. It is not here."
    answer = {"text": f"the {place}", "answer_start": context.index(f"the {place}")}
    asked = {"id": f"{colour} {thing}", "question": f"Where is the {thing}?", "answers": [answer], **changes}
    return {"title": thing, "paragraphs": [{"context": context, "qas": [asked]}]}


def write(path, articles):
    path.write_text(json.dumps({"version": "1", "data": articles}), encoding="utf-8")
    return path


@pytest.fixture
def squad(tmp_path):
    return write(tmp_path / "train.json", [article(*pair, c) for pair in THINGS.items() for c in COLOURS])


def run(*arguments):
    question_answering.main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_trains_scores_answers_and_exports(squad, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    run("--data", squad, "--output-dir", output, *FAST, "--epochs", 3, "--pretrain-epochs", 1)
    report = json.loads((output / "metrics.json").read_text())
    assert report["task"] == "question_answering"
    assert report["rows"] == {"train": 17, "validation": 2, "test": 5}
    assert {"exact_match", "f1", "baseline", "parameters", "train_seconds", "examples_per_second"} <= set(report)
    assert 0 < report["baseline"]["f1"] < 100
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "served by a fresh process, the same answers" in printed
    assert "make no reader" not in printed  # said of the default data only
    model = keras.saving.load_model(output / "model.keras")
    context = "The red cup is in the bag."
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Where is the cup?\t{context}\n\nWhere is the ring?\n"))
    run("--preset", output / "model.keras", "--data", squad, "--interactive", "--epochs", 1, *FAST, "--limit", 20,
        "--output-dir", output)  # fmt: skip
    again = keras.saving.load_model(output / "model.keras")
    told = capsys.readouterr().out.splitlines()[-2:]
    assert told[0] == again.answer("Where is the cup?", context)["text"]
    assert model.count_params() == again.count_params()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("not_exported")
def test_generates_answers_by_prompts_and_by_chat(squad, chat_lm, tmp_path, capsys):
    flags = ["--mode", "generative", "--data", squad, "--epochs", 1, *FAST, "--retrieve", 2]
    run(*flags, "--output-dir", tmp_path / "scratch")
    report = json.loads((tmp_path / "scratch" / "metrics.json").read_text())
    assert report["mode"] == "generative"
    assert 0 <= report["retrieved"] <= 1
    assert "was found for" in capsys.readouterr().out
    chat_lm.save_to_preset(tmp_path / "preset")
    few = ["--preset", tmp_path / "preset", "--trainable", "lora", "--lora-rank", 2, "--sequence-length", 190]
    run(*flags, *few, "--output-dir", tmp_path / "chat")
    assert keras_llama.LlamaCausalLM.from_preset(tmp_path / "chat" / "preset").chat("Where?", 2) is not None
    run("--mode", "generative", "--preset", tmp_path / "preset", *FAST, "--sequence-length", 190, "--limit", 2,
        "--output-dir", tmp_path / "asked")  # fmt: skip
    assert json.loads((tmp_path / "asked" / "metrics.json").read_text())["rows"]["train"] == 0


def test_prompts_leave_room_for_the_answer(squad, chat_lm):
    rows = answers.read(squad)[:1]
    args = type("Args", (), {"mode": "generative", "max_answer_length": 8})
    chat_lm.preprocessor.sequence_length = 90
    (prompt,) = readers.prompts(chat_lm, args, rows, [["a long text " * 90]])
    assert prompt.endswith("\n\nWhere is the ball?\n")
    assert len(chat_lm.preprocessor.tokenizer.encode([prompt])[0]) <= 90 - 8
    (row,) = readers.fit_arguments(chat_lm, args, rows)
    assert row["messages"][1] == {"role": "assistant", "content": "the box"}


def test_the_default_data_are_questions_with_their_answers():
    rows = answers.read()
    assert len(rows) == 120
    assert len({row.context for row in rows}) == 30
    for row in rows:
        (answer,) = row.answers
        assert row.context[answer["answer_start"] :].startswith(answer["text"]), row
    train, validation, test = question_answering.load(common.parser("question_answering", "").parse_args([]))
    parts = [{row.context for row in part} for part in (train, validation, test)]
    assert not (parts[0] & parts[1] | parts[1] & parts[2] | parts[0] & parts[2])
    assert sum(map(len, parts)) == 30


def test_wrong_places_and_answers_are_counted(tmp_path, capsys):
    wrong = [{"text": "the box", "answer_start": 3}, {"text": "the sea", "answer_start": 0}]
    articles = [article("ball", "box", "red", answers=wrong), article("cup", "bag", "red", answers=wrong[1:])]
    articles += [article("key", "car", "red", answers=[]), article("key", "car", "red", question="")]
    rows = answers.read(write(tmp_path / "t.json", articles))
    assert "of 3 answers 1 do not stand where they should" in (printed := capsys.readouterr().out)
    assert "2 are not in their context; 1 questions are empty. These are left out." in printed
    assert [len(row.answers) for row in rows] == [1, 0, 0]
    assert [len(row.references) for row in rows] == [2, 1, 0]  # all of them are scored by
    assert [row.question for row in answers.learnable(rows)] == ["Where is the ball?", "Where is the key?"]


def test_the_clause_most_like_the_question_is_the_floor():
    context = "Tom lives in Rome. Ann likes old films, and plays every day. The dog slept in the garden."
    asked = [(question, context) for question in ("Who slept?", "Where does Tom live?")]
    assert baselines.window_answers(asked) == ["The dog slept in the garden", "lives in Rome"]
    assert baselines.window_answers([("湖水是什么颜色？", "湖水是深蓝色，风景很美，山很高，常年积雪。")]) == ["深蓝"]


def refused(capsys, *arguments):
    """What the recipe prints when it refuses; it must leave with 2, before any training."""
    started = time.perf_counter()
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 2
    assert time.perf_counter() - started < 20
    return capsys.readouterr().err


GOOD = article("ball", "box", "red")
BAD_FILES = {
    "no json": ("{oops", "expected SQuAD's JSON"),
    "a list": ("[]", "expected SQuAD's JSON"),
    "no paragraphs": ('{"data": [{"title": "a"}]}', "KeyError('paragraphs')"),
    "no question": ({"question": None}, "question red ball: expected question to be a text"),
    "a blank question": ({"question": " "}, "question red ball: expected question to be a text"),
    "a number": ({"answers": [{"text": 3}]}, "question red ball: expected answer to be a text. Received: 3"),
    "no data": ('{"data": []}', "expected at least one question"),
    "too few": ({}, "Expected questions to train, validate and test on. Received: 1"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_bad_files_by_file_and_question(tmp_path, capsys, case):
    content, message = BAD_FILES[case]
    if isinstance(content, dict):
        content = json.dumps({"data": [article("ball", "box", "red", **content)]})
    (tmp_path / "t.json").write_text(content)
    assert message in refused(capsys, "--data", tmp_path / "t.json", "--output-dir", tmp_path / "out")


def test_refuses_an_empty_context_and_a_missing_file(tmp_path, capsys):
    broken = {"title": "a", "paragraphs": [{**GOOD["paragraphs"][0], "context": ""}]}
    path = write(tmp_path / "t.json", [broken])
    assert "expected context to be a text. Received: ''" in refused(capsys, "--data", path)
    assert "none.json: cannot be read (No such file" in refused(capsys, "--data", tmp_path / "none.json")


BAD_FLAGS = {
    "--mode": (["both"], "invalid choice"),
    "--stride": (["-1"], "at least 0"),
    "--max-answer-length": (["0"], "at least 1"),
    "--sequence-length": (["7"], "`sequence_length` must be at least 8"),
    "--preset": (["nothing.keras"], "cannot be loaded"),
    "--pretrain-epochs": (["1", "--mode", "generative"], "for an extractive reader"),
    "--trainable": (["head"], "--trainable head needs --preset"),
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_refuses_bad_flags(squad, tmp_path, capsys, flag):
    values, message = BAD_FLAGS[flag]
    assert message in refused(capsys, "--data", squad, "--output-dir", tmp_path / "out", flag, *values)
