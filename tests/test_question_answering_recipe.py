"""The question answering recipe end to end on small data, and what it refuses with exit code 2."""

import argparse
import io
import json
import time
import types

import keras
import numpy as np
import pytest

import keras_llama
from tasks import answers, baselines, cloze, common, question_answering, readers, speed

THINGS = {"ball": "box", "cup": "bag", "book": "bed", "key": "car", "coin": "hat", "ring": "tin"}
COLOURS = ("red", "blue", "green", "black")
SHORT = ["--batch-size", "16", "--max-answer-length", "8"]
FAST = ["--size", "0.3m", "--vocabulary-size", "330", "--sequence-length", "64", *SHORT]


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
    asked = f"\t{context}\nWhere is the cup?\t{context}\n\nWhere is the ring?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(asked))
    run("--preset", output / "model.keras", "--data", squad, "--interactive", "--epochs", 1, *SHORT, "--limit", 20,
        "--output-dir", output)  # fmt: skip
    again = keras.saving.load_model(output / "model.keras")
    told = capsys.readouterr().out.splitlines()[-3:]
    assert "Expected question or question<TAB>context. Received: '\\tThe red cup" in told[0]  # and goes on
    assert told[1] == again.answer("Where is the cup?", context)["text"]
    assert model.count_params() == again.count_params()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("not_exported")
def test_generates_answers_by_prompts_and_by_chat(squad, chat_lm, tmp_path, capsys):
    flags = ["--mode", "generative", "--data", squad, "--epochs", 1, *SHORT, "--retrieve", 2]
    run(*flags, *FAST[:6], "--output-dir", tmp_path / "scratch")
    report = json.loads((tmp_path / "scratch" / "metrics.json").read_text())
    assert report["mode"] == "generative"
    assert 0 <= report["retrieved"] <= 1
    assert "was found for" in capsys.readouterr().out
    chat_lm.save_to_preset(tmp_path / "preset")
    few = ["--preset", tmp_path / "preset", "--trainable", "lora", "--lora-rank", 2, "--sequence-length", 190]
    run(*flags, *few, "--output-dir", tmp_path / "chat")
    logits = [
        keras_llama.LlamaCausalLM.from_preset(path / "preset").predict(["Where?"], verbose=0)
        for path in (tmp_path, tmp_path / "chat")
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1e-4
    run("--mode", "generative", "--preset", tmp_path / "preset", *SHORT, "--sequence-length", 190, "--limit", 2,
        "--output-dir", tmp_path / "asked")  # fmt: skip
    assert json.loads((tmp_path / "asked" / "metrics.json").read_text())["rows"]["train"] == 0
    assert [path.name for path in (tmp_path / "asked").iterdir()] == ["metrics.json"]  # nothing was trained


@pytest.mark.plain
def test_prompts_leave_room_for_the_answer(squad, chat_lm, capsys):
    rows = answers.read(squad)[:1]
    args = argparse.Namespace(mode="generative", max_answer_length=8)
    chat_lm.preprocessor.sequence_length = 90
    ((context, question),) = readers.ask(chat_lm, args, rows, [["a long text " * 90]])
    assert question == "\n\nWhere is the ball?\n"
    asked = [{"role": "user", "content": context + question}]
    assert 78 <= len(chat_lm.preprocessor.tokenizer.encode_chat(asked)) <= 82
    assert "1 of 1 contexts are cut: a prompt has 82 tokens." in capsys.readouterr().out
    chat_lm.preprocessor.sequence_length = 190
    far = rows[0]._replace(context="It is so. " * 40 + rows[0].context)
    (row,) = readers.fit_arguments(chat_lm, args, [far, rows[0]])  # of the first the answer is cut off
    content = f"{rows[0].context}\n\nWhere is the ball?\n"
    assert row["messages"] == [{"role": "user", "content": content}, {"role": "assistant", "content": "the box"}]
    assert "1 of 2 questions are left out: their answer was cut off." in capsys.readouterr().out
    with pytest.raises(common.DataError, match="Expected prompts that hold their answer"):
        readers.fit_arguments(chat_lm, args, [far])
    chat_lm.preprocessor.sequence_length = 20
    with pytest.raises(common.DataError, match="expected room for a question, some of its context"):
        readers.ask(chat_lm, args, rows, [[rows[0].context]])


def built(*flags, rows, validation=()):
    args = question_answering.parser().parse_args([str(flag) for flag in flags])
    return args, readers.build(args, rows, validation)


SETTINGS = ("stride", "max_answer_length", "no_answer_threshold")


@pytest.mark.plain
def test_a_preset_keeps_its_settings_unless_flags_say_otherwise(squad, tmp_path):
    rows = answers.read(squad)
    nothing = [row._replace(references=[], answers=[]) for row in rows[:2]]
    args, reader = built(*FAST, "--stride", 7, rows=rows)
    assert [getattr(reader, name) for name in SETTINGS] == [7, 8, None]
    assert built(*FAST, rows=rows, validation=nothing)[1].no_answer_threshold == 0
    reader.save(tmp_path / "reader.keras")
    reader.save_to_preset(tmp_path / "reader")
    for preset in (tmp_path / "reader.keras", tmp_path / "reader"):
        args, again = built("--preset", preset, rows=rows)
        for found in (args, again):
            assert [getattr(found, name) for name in SETTINGS] == [7, 8, None]
        assert args.sequence_length == again.preprocessor.sequence_length == 64
        given = ["--stride", 0, "--max-answer-length", 3, "--no-answer-threshold", 0.5, "--sequence-length", 32]
        args, again = built("--preset", preset, *given, rows=rows)
        assert [getattr(again, name) for name in SETTINGS] == [0, 3, 0.5]
        assert again.preprocessor.sequence_length == 32
        assert built("--preset", preset, rows=[*rows, *nothing])[1].no_answer_threshold == 0
        with pytest.raises(ValueError, match="context"):
            built("--preset", preset, "--sequence-length", 65, rows=rows)


@pytest.mark.plain
def test_a_language_model_is_made_a_reader_by_the_recipes_settings(squad, chat_lm, tmp_path):
    rows = answers.read(squad)
    chat_lm.save_to_preset(tmp_path / "lm")
    args, reader = built("--preset", tmp_path / "lm", rows=rows)
    assert [getattr(reader, name) for name in SETTINGS] == [96, 48, None]
    for flags, length in (([], 200), (["--data", squad], 64), (["--sequence-length", 99], 99)):  # 200 is its context
        args, lm = built("--preset", tmp_path / "lm", "--mode", "generative", *flags, rows=rows)
        assert args.sequence_length == lm.preprocessor.sequence_length == length
        assert args.max_answer_length == 48


@pytest.mark.plain
@pytest.mark.usefixtures("not_exported")
def test_questions_without_an_answer(squad, tmp_path):
    """A reader that always gave one learns to give none."""
    readers.build(question_answering.parser().parse_args(FAST), answers.read(squad)).save(tmp_path / "reader.keras")
    asked = [article(*pair, c, answers=[], is_impossible=True) for pair in list(THINGS.items())[:3] for c in COLOURS]
    path = write(tmp_path / "2.json", [*json.loads(squad.read_text())["data"][12:], *asked])
    output = tmp_path / "out"
    run("--data", path, "--preset", tmp_path / "reader.keras", "--epochs", 1, "--output-dir", output)
    assert json.loads((output / "metrics.json").read_text())["settings"]["no_answer_threshold"] == 0
    assert keras.saving.load_model(output / "model.keras").no_answer_threshold == 0
    run("--data", path, *FAST, "--epochs", 1, "--no-answer-threshold", -50, "--output-dir", output)  # hardly ever any
    report = json.loads((output / "metrics.json").read_text())
    assert all(row["answer"] == "" for row in report["samples"])
    unanswered = [not row["references"] for row in report["samples"]]
    assert report["exact_match"] == 100 * sum(unanswered) / len(unanswered)


@pytest.mark.plain
@pytest.mark.usefixtures("not_exported")
@pytest.mark.parametrize("trainable", ["lora", "head"])
def test_trains_little_of_a_checkpoint(squad, chat_lm, tmp_path, trainable, capsys, monkeypatch):
    heads = []
    fit_head = keras_llama.LlamaQuestionAnswering.fit_head
    monkeypatch.setattr(
        keras_llama.LlamaQuestionAnswering, "fit_head", lambda *args, **kw: heads.append(1) or fit_head(*args, **kw)
    )
    chat_lm.save_to_preset(tmp_path / "lm")
    flags = ["--preset", tmp_path / "lm", "--trainable", trainable, "--epochs", 1, "--output-dir", tmp_path / "out"]
    run("--data", squad, *flags)
    assert "has no qa_outputs.bias, qa_outputs.weight: drawn at random" in capsys.readouterr().out
    model = keras.saving.load_model(tmp_path / "out" / "model.keras")
    assert bool(heads) == (trainable == "head")
    assert (tmp_path / "out" / "adapter").is_dir() == (trainable == "lora")
    base = keras.ops.convert_to_numpy(chat_lm.backbone.token_embedding.embeddings)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.backbone.token_embedding.embeddings), base)


@pytest.mark.plain
def test_memory_of_states_that_are_kept_is_checked(squad, chat_lm, tmp_path, monkeypatch, capsys):
    chat_lm.save_to_preset(tmp_path / "lm")
    rows = answers.read(squad)
    args, model = built("--preset", tmp_path / "lm", "--trainable", "head", "--sequence-length", 64, rows=rows)
    windows = len(model.encode(readers.fit_arguments(model, args, rows))["token_ids"])
    number = windows * 64 * model.backbone.config.hidden_dim
    assert readers.bytes_of_states(model, args, rows[:8], rows[8:]) == 8 * number
    args.cloze = 50
    clozes = len(model.encode(readers.cloze_questions(args, rows))["token_ids"])
    assert clozes > windows
    assert readers.bytes_of_states(model, args, rows, []) == 8 * clozes * 64 * model.backbone.config.hidden_dim
    args.trainable = "lora"
    assert readers.bytes_of_states(model, args, rows, []) == 0
    monkeypatch.setattr("keras_llama.backend.has_gpu", lambda: False)
    monkeypatch.setattr("keras_llama.backend.free_memory", lambda: 2**60)
    monkeypatch.setattr(readers, "bytes_of_states", lambda *_: 2**61)
    with pytest.raises(SystemExit):
        run("--data", squad, "--preset", tmp_path / "lm", "--trainable", "head", "--output-dir", tmp_path / "out")
    assert "fewer rows (--limit), or LoRA; --force trains anyway" in capsys.readouterr().err


@pytest.mark.plain
def test_a_head_alone_has_no_state_to_resume(squad, chat_lm, tmp_path, capsys):
    chat_lm.save_to_preset(tmp_path / "lm")
    with pytest.raises(SystemExit):
        run("--data", squad, "--preset", tmp_path / "lm", "--trainable", "head", "--output-dir", tmp_path / "out",
            "--resume", tmp_path / "state")  # fmt: skip
    assert "`fit_head` has no such options" in capsys.readouterr().err


@pytest.mark.plain
def test_the_report_is_written_before_anything_is_delivered(squad, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("The exported model answers otherwise")

    monkeypatch.setattr(readers, "train", lambda *_: ({"loss": [1.0]}, 1.0))
    monkeypatch.setattr(readers, "deliver", fail)
    with pytest.raises(RuntimeError, match="answers otherwise"):
        run("--data", squad, *FAST, "--output-dir", tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["examples_per_second"] == 1


@pytest.mark.plain
def test_of_answers_as_probable_either_may_be_given():
    one = [{"text": "red", "score": 0.5}]
    for dtype, near, far in (("float32", 0.50001, 0.51), ("bfloat16", 0.51, 0.9)):
        model = types.SimpleNamespace(compute_dtype=dtype)
        readers.check(model, "reloaded", ["red, blue"], one, [{"text": "blue", "score": near}])
        for text, score in (("blue", far), ("green", 0.5)):
            with pytest.raises(RuntimeError, match="The reloaded model answers otherwise"):
                readers.check(model, "reloaded", ["red, blue"], one, [{"text": text, "score": score}])


@pytest.mark.plain
def test_the_speed_is_of_the_epochs_that_are_run_now(squad, monkeypatch):
    rows = answers.read(squad)
    args, model = built(*FAST, "--cloze", 1, rows=rows)
    clock = [0.0]

    def fit(args, model, name, data, callbacks=(), **_):
        clock[0] += {"cloze": 100, "reader": 4}[name]
        for callback in callbacks:
            if isinstance(callback, keras.callbacks.LambdaCallback):
                callback.on_epoch_end(3, {})
        return types.SimpleNamespace(history={"loss": [1.0] * 4})  # three of them before an interruption

    monkeypatch.setattr(common, "fit", fit)
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    assert readers.train(model, args, rows, rows)[1] == len(rows) / 4


@pytest.mark.plain
def test_memory_of_the_language_model_before_is_checked(squad, monkeypatch):
    args, model = built(*FAST, rows=answers.read(squad))
    monkeypatch.setattr("keras_llama.backend.free_memory", lambda: 1000)
    with pytest.raises(common.DataError, match="--force trains anyway"):
        readers.pretrain(args, model, ["a text"])


@pytest.mark.plain
def test_contexts_of_the_test_data_are_not_trained_on(squad, tmp_path, capsys):
    test = write(tmp_path / "test.json", json.loads(squad.read_text())["data"][:5])
    args = question_answering.parser().parse_args(["--data", str(squad), "--test-data", str(test)])
    train, validation, test = question_answering.load(args)
    assert len(train) + len(validation) == 19
    assert len(test) == 5
    assert not {row.context for row in test} & {row.context for row in train + validation}
    assert "5 training questions left out: their context is in the test data." in capsys.readouterr().out


@pytest.mark.plain
def test_questions_are_made_of_sentences():
    contexts = [
        "An old ferry crosses this river at noon on weekdays.",
        "长江发源于青藏高原，在上海附近注入东方。",
        "短句。",
        "Between 1870 and 1912 every mill ground oats for 300 farms.",
    ]
    rows = cloze.questions(contexts, 20, seed=1)
    assert rows == cloze.questions(contexts, 20, seed=1)
    assert [sum(row["context"] == context for row in rows) for context in contexts] == [20, 20, 0, 20]
    words = [word for asking in cloze._ASKING.values() for word in asking]
    for row in rows:
        ((text, start),) = [tuple(answer.values()) for answer in row["answers"]]
        assert row["context"].startswith(text, start)
        assert any(word in row["question"] for word in words)
        assert not set(cloze._WORD.findall(text)) & set(cloze._WORD.findall(row["question"])), row
        chinese = row["context"] == contexts[1]
        assert row["question"][-1] == ("？" if chinese else "?")
        numbers = any(character.isdigit() for character in text)
        assert numbers == any(word in row["question"] for word in cloze._ASKING[chinese, True])
    assert len({row["question"] for row in rows}) > 30


@pytest.mark.plain
def test_crops_hold_the_answer_or_nothing_like_it():
    context = "a b c. " * 30 + "The key is in the car. " + "d e f. " * 30
    row = {"question": "Where is the key?", "context": context, "answers": "the car"}
    found = cloze.crops([row] * 20, 60, without=1.0)
    held = [crop for crop in found if crop["answers"]]
    assert len(held) == len(found) - len(held) == 20
    assert all(len(crop["context"]) == 60 for crop in found)
    assert len({crop["context"] for crop in held}) > 5
    for crop in held:
        assert crop["context"].startswith("the car", crop["answers"][0]["answer_start"])
    twice = {**row, "context": f"I see the car. {context}", "answers": {"text": "the car", "answer_start": 239}}
    for crop in cloze.crops([twice] * 20, 60, without=1.0):
        assert bool(crop["answers"]) == ("the car" in crop["context"])
    assert not any(crop["answers"] for crop in cloze.crops([{**row, "answers": []}], 60))
    assert not cloze.crops([row], 5)  # shorter than the answer


@pytest.mark.plain
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


@pytest.mark.plain
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


@pytest.mark.plain
def test_answers_without_a_place_and_in_columns(tmp_path, capsys):
    columns = {"text": ["the box", "box"], "answer_start": [19, None]}
    articles = [article("ball", "box", "red", answers=columns)]
    articles.append(article("ball", "box", "red", answers=[{"text": "the box"}]))
    del (asked := article("cup", "bag", "red", is_impossible=True))["paragraphs"][0]["qas"][0]["answers"]
    rows = answers.read(write(tmp_path / "t.json", [*articles, asked]))
    assert [row.references for row in rows] == [["the box", "box"], ["the box"], []]
    assert "do not stand" not in capsys.readouterr().out


@pytest.mark.plain
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
    "no answers": (
        '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": 7, "question": "b"}]}]}]}',
        "question 7: expected answers",
    ),
    "null": ({"answers": None}, "question red ball: expected answers, a list of text and answer_start"),
    "strings": ({"answers": ["the box"]}, "question red ball: expected answers, a list of text and answer_start"),
    "columns of two lengths": (
        {"answers": {"text": ["the box"], "answer_start": []}},
        "question red ball: expected answers, a list of text and answer_start",
    ),
    "a place that is no number": (
        {"answers": [{"text": "the box", "answer_start": "23"}]},
        "question red ball: expected answers, a list of text and answer_start",
    ),
    "no data": ('{"data": []}', "expected at least one question"),
    "too few": ({}, "Expected questions to train, validate and test on. Received: 1"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_bad_files_by_file_and_question(tmp_path, capsys, case):
    content, message = BAD_FILES[case]
    if isinstance(content, dict):
        content = json.dumps({"data": [article("ball", "box", "red", **content)]})
    (tmp_path / "t.json").write_text(content)
    assert message in refused(capsys, "--data", tmp_path / "t.json", "--output-dir", tmp_path / "out")


@pytest.mark.plain
def test_refuses_an_empty_context_and_a_missing_file(tmp_path, capsys):
    broken = {"title": "a", "paragraphs": [{**GOOD["paragraphs"][0], "context": ""}]}
    path = write(tmp_path / "t.json", [broken])
    assert "expected context to be a text. Received: ''" in refused(capsys, "--data", path)
    assert "none.json: cannot be read (No such file" in refused(capsys, "--data", tmp_path / "none.json")


@pytest.mark.plain
def test_refuses_before_the_training_what_would_fail_after_it(squad, tmp_path, capsys):
    flags = [*FAST, "--output-dir", tmp_path / "out"]
    asked = ["--mode", "generative", "--max-answer-length", 60]
    assert "expected room for a question" in refused(capsys, "--data", squad, *flags, *asked)
    short = [{"context": f"{c} {thing}", "qas": [{"question": "?", "answers": [{"text": c, "answer_start": 0}]}]}
             for thing in THINGS for c in COLOURS]  # fmt: skip
    path = write(tmp_path / "t.json", [{"paragraphs": short}])
    assert "--cloze: expected contexts with sentences" in refused(capsys, "--data", path, *flags, "--cloze", 2)


BAD_FLAGS = {
    "--mode": (["both"], "invalid choice"),
    "--stride": (["-1"], "at least 0"),
    "--max-answer-length": (["0"], "at least 1"),
    "--sequence-length": (["7"], "`sequence_length` must be at least 8"),
    "--preset": (["nothing.keras"], "cannot be loaded"),
    "--pretrain-epochs": (["1", "--mode", "generative"], "for an extractive reader"),
    "--trainable": (["head"], "--trainable head needs --preset"),
}


@pytest.mark.plain
@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_refuses_bad_flags(squad, tmp_path, capsys, flag):
    values, message = BAD_FLAGS[flag]
    assert message in refused(capsys, "--data", squad, "--output-dir", tmp_path / "out", flag, *values)
