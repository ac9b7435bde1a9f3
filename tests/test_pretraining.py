"""Pretraining on text of any length: the recipe, its files of tokens, exact resumption, and what it refuses."""

import contextlib
import functools
import importlib
import io
import json
import math
import os
import resource
import signal
import tracemalloc

import keras
import numpy as np
import pytest

import keras_llama
from tasks import common, corpus, delivery, pretrainers, pretraining, records

WORDS = ["a good film", "the ball is round\nand red", "we saw the film", "很好的电影", "a red ball and a dog"]
STORIES = [f"{WORDS[i % 5]} {WORDS[i % 3]} {i}" for i in range(120)]
FAST = [
    "--size",
    "tiny",
    "--vocabulary-size",
    "310",
    "--sequence-length",
    "32",
    "--batch-size",
    "4",
    "--dropout",
    "0.1",
]
FAST += ["--optimizer", "adamw", "--learning-rate", "0.003", "--peak-flops", "1e9"]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.txt"
    path.write_text(f"\n{corpus.MARK}\n".join(STORIES), encoding="utf-8")
    return path


def pretrained(*flags):
    pretraining.main([str(flag) for flag in (*flags, *FAST)])


def report_of(output):
    return json.loads((output / "metrics.json").read_text())


def source(*train, validation=(), share=0.1, limit=None, template=records.TEMPLATE):
    return corpus.Source(list(train), list(validation), share, template, limit)


@pytest.fixture(scope="module")
def run(stories, tmp_path_factory):
    """A short training, what it printed and what it reports."""
    output, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    flags = ["--prompt", "a good", "--max-new-tokens", "4", "--tensorboard", "--steps", "6", "--save-every", "3"]
    with contextlib.redirect_stdout(printed):
        pretrained("--data", stories, "--output-dir", output, *flags)
    return output, printed.getvalue(), report_of(output)


@pytest.mark.plain
def test_trains_measures_shows_and_saves(run, stories):
    output, printed, report = run
    assert report["task"] == "pretraining"
    assert len(report["loss"]) == 2
    for shown in ("tokens/s", "mfu", "val_perplexity", "val_bits_per_byte", "Memory of training, estimated"):
        assert shown in printed
    assert report["mfu"] == pytest.approx(
        report["tokens_per_second"] * pretrainers.flops_of_token(reopened(output), 32) / 1e9, rel=1e-3
    )
    assert report["samples"][0] in printed
    assert report["samples"][0].startswith("a good")
    assert (output / "training.png").exists()
    assert list((output / "logs").iterdir())
    assert report["data"]["train"]["texts"] + report["data"]["validation"]["texts"] == len(STORIES)
    held = [text for side, text, _ in source(stories).read() if side]
    assert report["data"]["validation"]["bytes"] == sum(len(text.encode()) for text in held)


def reopened(output):
    return keras_llama.LlamaCausalLM.from_preset(output / "preset")


@pytest.mark.plain
def test_bits_per_byte_are_those_of_the_texts_held_out(run, stories):
    """Text by text, by `score`, which knows nothing of rows."""
    output, _, report = run
    lm = reopened(output)
    held = [text for side, text, _ in source(stories).read() if side]
    rows = lm.preprocessor.tokenizer.encode(held, add_bos=True, add_eos=True)
    nats = -sum(sum(answer["log_probs"]) for answer in lm.score(rows))
    size = sum(len(text.encode()) for text in held)
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert report["nats_per_character"] == pytest.approx(nats / sum(map(len, held)), rel=1e-4)
    assert report["perplexity"] == pytest.approx(math.exp(nats / sum(len(row) - 1 for row in rows)), rel=1e-4)


@pytest.mark.plain
def test_transformers_reads_the_result(run):
    import torch
    import transformers

    output, *_ = run
    lm = reopened(output)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output / "preset").eval()
    ids = lm.preprocessor.tokenizer.encode(STORIES[:1], add_bos=True)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(lm.predict(np.array(ids), verbose=0), expected, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(output / "preset")(STORIES[0])["input_ids"] == ids[0]


@pytest.mark.plain
@pytest.mark.usefixtures("not_exported")
def test_every_recipe_starts_from_the_preset(run, stories, tmp_path):
    from tasks import classification, generation

    output, *_ = run
    preset = ["--preset", output / "preset", "--batch-size", "16", "--epochs", "1"]  # whose context is 32
    rows = tmp_path / "rows.tsv"
    texts = [story.replace("\n", " ") for story in STORIES[:40]]
    rows.write_text("".join(f"{text}\t{'film' in text}\n" for text in texts), encoding="utf-8")
    for recipe, data, more in (
        (classification, rows, ["--trainable", "head"]),
        (generation, stories, ["--limit", "10", "--prompt", "a good", "--max-new-tokens", "2"]),
        (pretraining, stories, ["--steps", "2", "--optimizer", "adamw"]),
    ):
        name = recipe.__name__.split(".")[1]
        flags = ["--data", data, "--output-dir", tmp_path / name, *preset, *more]
        recipe.main([str(flag) for flag in flags])
        assert report_of(tmp_path / name)["task"] == name


KILLED = """
import os, signal, sys
from tasks import pretrainers, pretraining
measured, step = pretrainers.Measures.on_train_batch_end, 0
def counted(self, batch, logs=None):
    global step
    step += 1
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    measured(self, batch, logs)
pretrainers.Measures.on_train_batch_end = counted
pretraining.main(sys.argv[2:])
"""


@pytest.fixture
def made(monkeypatch):
    """The steps that trainings make from now on."""
    made, ended = [], pretrainers.Measures.on_train_batch_end

    def counted(self, batch, logs=None):
        made.append(batch)
        ended(self, batch, logs)

    monkeypatch.setattr(pretrainers.Measures, "on_train_batch_end", counted)
    return made


@pytest.mark.plain
def test_a_killed_training_ends_with_the_same_loss(stories, tmp_path, run_python, made):
    flags = ["--data", stories, "--steps", "8", "--save-every", "2"]
    flags += ["--jit", "off"] if keras.config.backend() == "tensorflow" else []  # XLA would compile three updates
    step = int(np.random.default_rng().integers(3, 8))  # another in each run
    print(f"killed at step {step}")
    killed, unbroken = (
        [*flags, "--resume", tmp_path / name / "state", "--output-dir", tmp_path / name]
        for name in ("killed", "unbroken")
    )
    done = run_python(KILLED, step, *killed, *FAST, check=False)
    assert done.returncode == -signal.SIGKILL
    pretrained(*killed)
    assert len(made) == 8 - (step - 1) // 2 * 2
    made.clear()
    pretrained(*unbroken)
    assert len(made) == 8
    one, other = report_of(tmp_path / "killed"), report_of(tmp_path / "unbroken")
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-5)
    assert len(set(one["loss"])) == 4


@pytest.mark.plain
def test_steps_are_exact_and_more_of_them_go_on_from_the_last_whole_part(stories, tmp_path, monkeypatch, made):
    validated, fit = [], common.fit

    def watched(*arguments, **options):
        validated.append(len(options["validation_data"].spans))
        return fit(*arguments, **options)

    monkeypatch.setattr(common, "fit", watched)
    output = tmp_path / "out"
    flags = ["--data", stories, "--output-dir", output, "--resume", tmp_path / "state", "--save-every", "3"]
    pretrained(*flags, "--steps", "7")
    assert made == [0, 1, 2, 0, 1, 2, 0]
    seven = report_of(output)
    made.clear()
    pretrained(*flags, "--steps", "11")
    assert made == [0, 1, 2, 0, 1]
    eleven = report_of(output)
    assert (len(seven["loss"]), len(eleven["loss"])) == (3, 4)
    assert eleven["loss"][:2] == seven["loss"][:2]
    made.clear()
    pretrained(*flags, "--steps", "11")
    assert made == [0, 1]
    assert report_of(output)["bits_per_byte"] == pytest.approx(eleven["bits_per_byte"], rel=1e-5)
    (side,) = (side for side in corpus.opened(next(output.glob("tokens-*")))[1:])
    assert {*validated} == {4}
    assert len(pretrainers.ValidationRows(side, 32, 4).spans) > 4


def refused(capsys, *arguments):
    """What the recipe prints when it refuses with code 2."""
    with pytest.raises(SystemExit) as left:
        pretrained(*arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


def everything_in(*folders):
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.plain
def test_a_state_of_another_model_or_of_other_data_is_refused(stories, tmp_path, capsys):
    output, state = tmp_path / "out", tmp_path / "state"
    flags = ["--output-dir", output, "--resume", state, "--steps", "2", "--save-every", "2"]
    pretrained("--data", stories, *flags)
    before = everything_in(output, state)
    others = tmp_path / "others.txt"
    others.write_text(stories.read_text(encoding="utf-8").replace("film", "book"), encoding="utf-8")
    # The last of two flags counts.
    with pytest.raises(SystemExit):
        pretraining.main([*map(str, ["--data", stories, *flags, *FAST]), "--size", "0.5m"])
    assert "must be of this model" in capsys.readouterr().err
    assert "must be of this model and of these data" in refused(capsys, "--data", others, *flags)
    assert "of these data" in refused(capsys, "--data", stories, *flags, "--seed", "3")
    after = everything_in(output, state)
    assert before.items() <= after.items()
    assert all("tokens-" in str(path) for path in after.keys() - before.keys())


BAD_FILES = {
    "empty": ("t.txt", b"", "t.txt: expected text. Received: an empty file"),
    "blank": ("t.txt", b"\n \n\n", "expected text to train on. Received: blank lines"),
    "NUL bytes": ("t.txt", b"good\nfilm\x00\n", "t.txt:2: expected text. Received: the character '\\x00'"),
    "binary": ("t.txt", b"\x89PNG\r\n\x1a\n\x00\x00", "t.txt:1: expected UTF-8"),
    "half a character": ("t.txt", "很".encode()[:2], "t.txt:1: expected UTF-8"),
    "one text": ("t.txt", b"a good film", "to train on"),
    "two texts": ("t.txt", b"one\n<|endoftext|>\nthree", "2 texts to train on and 0 to validate"),
    "no JSON": ("t.jsonl", b'{"text": "a"}\n{oops\n', "t.jsonl:2: expected a JSON object"),
    "half a pair": ("t.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "t.jsonl:2: expected text. Received: the char"),
    "another field": ("t.jsonl", b'{"story": "a"}\n', "t.jsonl:1: expected an object with text. Received: ['story']"),
    "a number": ("t.jsonl", b"3\n", "t.jsonl:1: expected an object with text. Received: 3"),
    "an empty text": ("t.jsonl", b'{"text": " "}\n', "t.jsonl:1: expected a text"),
    "NUL in JSON": ("t.json", b'[{"text": "a\\u0000"}]', "t.json:1: expected text"),
    "no list": ("t.json", b'{"text": "a"}', "t.json: expected a list of JSON objects. Received: a dict"),
    "cut JSON": ("t.json", b'[{"text": "a"}', "t.json: expected a list of JSON objects"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_bad_files_and_leaves_nothing(tmp_path, capsys, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    assert message in refused(capsys, "--data", tmp_path / name, "--output-dir", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.plain
def test_refuses_what_it_cannot_start_with(stories, tmp_path, capsys):
    output = ["--output-dir", tmp_path / "out"]
    assert "Expected --data" in refused(capsys, *output)
    assert "none.txt: cannot be read" in refused(capsys, "--data", tmp_path / "none.txt", *output)
    (tmp_path / "folder").mkdir()
    assert "expected a folder with files" in refused(capsys, "--data", tmp_path / "folder", *output)
    data = ["--data", stories, *output]
    (tmp_path / "file").write_text("")
    assert "file: cannot be made a directory" in refused(capsys, *data, "--resume", tmp_path / "file")
    error = refused(capsys, *data, "--preset", "a", "--tokenizer", "b")
    assert "Leave out --size, --vocabulary-size, --tokenizer, --dropout: --preset a has its own" in error
    assert "nowhere" in refused(capsys, *data, "--tokenizer", tmp_path / "nowhere")
    huge = [*map(str, [*data, *FAST]), "--batch-size", "10000000"]
    with pytest.raises(SystemExit):
        pretraining.main(huge)
    assert "--force trains anyway" in capsys.readouterr().err
    for template in ("{", "none", "{0}", "{a.b}", "{a!r}", "{a:{b}}"):
        (tmp_path / "rows.jsonl").write_text('{"a": "b"}\n')
        error = refused(capsys, "--data", tmp_path / "rows.jsonl", "--template", template, *output)
        assert "expected names of fields in braces" in error, template


@pytest.mark.plain
def test_the_report_is_written_before_anything_is_delivered(stories, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("The disk is gone")

    monkeypatch.setattr(pretraining, "train", lambda *_: ({"loss": [1.0], "tokens/s": [1.0], "mfu": [0.5]}, [], None))
    monkeypatch.setattr(delivery, "preset", fail)
    with pytest.raises(RuntimeError, match="The disk is gone"):
        pretrained("--data", stories, "--output-dir", tmp_path)
    assert report_of(tmp_path)["task"] == "pretraining"


@pytest.mark.plain
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "--prompt '': `prompts[0]` must not be empty"),
        (["--prompt", "a good " * 40], "must be shorter than the context of 32 tokens"),
        (["--prompt", "a", "--max-new-tokens", "32"], "must fit into the context of 32 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_training(stories, tmp_path, capsys, flags, message):
    assert message in refused(capsys, "--data", stories, "--output-dir", tmp_path / "out", *flags)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.plain
def test_a_full_disk_is_told_in_a_line(stories, tmp_path, capsys):
    """Files may grow to less than the tokens take."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        message = refused(capsys, "--data", stories, "--output-dir", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def make_preset(tmp_path_factory):
    """A language model of some context, as the recipe saves it."""

    def made(context):
        tokenizer = keras_llama.SentencePieceTokenizer.train(STORIES, 310)
        size = {**keras_llama.size("tiny"), "context_length": context}
        backbone = keras_llama.LlamaBackbone(vocabulary_size=tokenizer.vocabulary_size, **size)
        lm = keras_llama.LlamaCausalLM(backbone, keras_llama.TextPreprocessor(tokenizer, context, add_eos=True))
        folder = tmp_path_factory.mktemp("preset")
        lm.save_to_preset(folder)
        return folder

    return functools.cache(made)


STARTS = {  # context of the preset, flags
    "classification": (256, ["--data", "{rows}"]),
    "generation": (256, ["--data", "{stories}"]),
    "translation": (256, ["--data", "{rows}"]),
    "translation by a decoder": (100, ["--data", "{rows}", "--architecture", "decoder"]),
    "question_answering": (256, ["--limit", "8"]),
    "captioning": (256, ["--limit", "8", "--variants", "1"]),
    "pretraining": (100, ["--data", "{stories}"]),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", STARTS)
def test_every_recipe_starts_at_its_defaults(case, make_preset, stories, tmp_path, monkeypatch, capsys):
    context, flags = STARTS[case]
    recipe, started = importlib.import_module(f"tasks.{case.split()[0]}"), []
    monkeypatch.setattr(recipe, "run", lambda args, *made: started.extend(keras.tree.flatten(made)))
    rows = tmp_path / "rows.tsv"
    rows.write_text("".join(f"a good film {i}\tlabel {i % 2}\n" for i in range(60)), encoding="utf-8")
    flags = ["--preset", str(make_preset(context)), "--output-dir", str(tmp_path / "out"), *flags]
    flags = [flag.format(rows=rows, stories=stories) for flag in flags]
    recipe.main(flags)
    (model,) = (part for part in started if isinstance(part, keras.Model))
    assert model.preprocessor.sequence_length <= context
    with pytest.raises(SystemExit) as left:
        recipe.main([*flags, "--sequence-length", str(context + 1)])
    assert left.value.code == 2
    assert f"must be at most the model's context of {context} tokens" in capsys.readouterr().err


@pytest.mark.plain
def test_texts_come_in_parts(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(f"\ufeff\none\r\ntwo\n{corpus.MARK}\n\n{corpus.MARK}\n  three\n\n".encode())
    assert list(corpus.parts(path)) == [("one\ntwo", True), ("  three", True)]
    long = "很" * 2 * corpus.PART + "\n" + "line\n" * corpus.PART
    path.write_text(long.strip(), encoding="utf-8")
    found = list(corpus.parts(path))
    assert [begins for _, begins in found] == [True] + [False] * (len(found) - 1)
    assert max(len(text) for text, _ in found) <= 2 * corpus.PART
    assert "".join(text for text, _ in found) == long.strip()
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"title": "a", "content": ["b", "c"]}, {"title": 3, "content": "d"}]))
    assert list(corpus.parts(rows, r"{title}\n{content}")) == [("a\nb\nc", True), ("3\nd", True)]
    assert corpus.files([tmp_path]) == [rows, path]


@pytest.mark.plain
def test_equal_texts_are_on_one_side_and_a_text_goes_on_where_none_of_it_is_held_out(tmp_path, chat_tokenizer):
    path = tmp_path / "book.txt"
    lines = [f"line {i} of a long book\n" for i in range(9000)]
    path.write_text("".join(lines) + f"{corpus.MARK}\n" + "".join(lines))
    read = list(source(path).read())
    half = len(read) // 2
    assert [row[:2] for row in read[:half]] == [row[:2] for row in read[half:]]
    sides = [side for side, *_ in read]
    assert 0 < sum(sides) < half
    preprocessor = keras_llama.TextPreprocessor(chat_tokenizer, 16, add_bos=False, add_eos=True)
    corpus.write(source(path), preprocessor, tmp_path / "tokens")
    train, validation = corpus.opened(tmp_path / "tokens")
    runs = [
        sum(1 for i, s in enumerate(sides) if s == side and (i in (0, half) or sides[i - 1] != s)) for side in (0, 1)
    ]
    assert [len(train.starts), len(validation.starts)] == runs
    end = chat_tokenizer.eos_id
    assert int((train.tokens == end).sum() + (validation.tokens == end).sum()) == 2
    words = [chat_tokenizer.decode([side.tokens.tolist()])[0] for side in (train, validation)]
    assert words == ["".join(text for side, text, _ in read if side == wanted) for wanted in (0, 1)]


@pytest.mark.plain
def test_a_vocabulary_is_learned_from_a_part_of_much_text(stories, monkeypatch):
    known = [text for side, text, _ in source(stories).read() if not side]
    assert source(stories).learned_from() == known
    most = sum(map(len, known)) // 4
    monkeypatch.setattr(corpus, "LEARNED_FROM", most)
    some = source(stories).learned_from()
    assert most - max(map(len, known)) < sum(map(len, some)) <= most
    assert some == [text for text in known if text in {*some}]
    assert known.index(some[0]) < len(known) / 4 < len(known) * 3 / 4 < known.index(some[-1])
    assert source(stories).learned_from() == some
    few = source(stories, limit=len(STORIES) // 8)
    assert few.learned_from() == [text for side, text, _ in few.read() if not side]


@pytest.mark.plain
def test_memory_does_not_grow_with_the_file(tmp_path, chat_tokenizer):
    path = tmp_path / "big.txt"
    with path.open("w") as file:
        for i in range(20):
            file.write(f"story {i}: " + "the ball is round and red\n" * 8000)  # 4 MB in texts of 200 kB
            file.write(f"{corpus.MARK}\n")
    preprocessor = keras_llama.TextPreprocessor(chat_tokenizer, 256, add_bos=False, add_eos=True)
    preprocessor.tokenizer.encode(["a"])
    tracemalloc.start()
    corpus.write(source(path), preprocessor, tmp_path / "tokens")
    train, validation = corpus.opened(tmp_path / "tokens")
    rows = pretrainers.TrainingRows(train, 256, 4, 50, seed=0)
    for index in range(50):
        rows[index]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert train.counts["bytes"] + validation.counts["bytes"] > 4e6
    assert len(train.tokens) * 4 > 4e6  # what lists of these numbers would take at least
    assert peak < 1.5e6


def side_of(*texts):
    """A side of a corpus that is held in memory."""
    starts = np.cumsum([0, *map(len, texts)])[:-1]
    tokens = np.concatenate([np.asarray(text, "uint16") for text in texts])
    return corpus.Side(tokens, starts, {"digest": "d", "bytes": 7, "characters": 7, "tokens": len(tokens)})


def targets_of(rows):
    """(token, its successor) of every pair that is trained."""
    ids, mask = rows["token_ids"], rows["padding_mask"]
    same = (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] > 0)
    return sorted(zip(ids[:, :-1][same].tolist(), ids[:, 1:][same].tolist(), strict=True))


TEXTS = [range(10, 15), range(20, 41), range(50, 52), range(60, 69), range(70, 79)]


@pytest.mark.plain
def test_validation_predicts_each_token_once_and_cuts_no_text_that_fits():
    rows = pretrainers.ValidationRows(side_of(*TEXTS), 10, 2)
    batches = [rows[i] for i in range(len(rows))]
    found = [pair for batch in batches for pair in targets_of(batch)]
    assert sorted(found) == sorted((a, a + 1) for text in TEXTS for a in list(text)[:-1])
    assert [int(first) for batch in batches for first in batch["token_ids"][:, 0]] == [10, 20, 29, 38, 60, 70]
    assert rows.bits_per_byte == pytest.approx(len(found) / 7 / math.log(2))


@pytest.mark.plain
def test_some_of_the_validation_rows_are_at_even_distances():
    rows = pretrainers.ValidationRows(side_of(*TEXTS), 10, 2, 3)
    assert (len(rows), rows.spans[:, 0].tolist()) == (2, [0, 14, 37])
    every = pretrainers.ValidationRows(side_of(*TEXTS), 10, 2)
    assert np.array_equal(pretrainers.ValidationRows(side_of(*TEXTS), 10, 2, 99).spans, every.spans)


@pytest.mark.plain
def test_the_order_of_a_pass_takes_eight_bytes_a_row():
    tokens = np.broadcast_to(np.uint16(7), 3_000_001)
    rows = pretrainers.TrainingRows(corpus.Side(tokens, np.zeros(1, int), {}), 4, 1, 1, seed=0)
    tracemalloc.start()
    for turn in range(3):
        rows.start(turn * rows.per_pass)
        rows[0]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 8 <= held / rows.per_pass < 9


@pytest.mark.plain
def test_the_text_of_a_token_that_nothing_predicts_is_not_counted(tmp_path, chat_tokenizer, tokenizer):
    path = tmp_path / "t.txt"
    path.write_text(f"\n{corpus.MARK}\n".join(f"a good film {i}" for i in range(60)), encoding="utf-8")
    for name, found in (("without", chat_tokenizer), ("with", tokenizer)):
        preprocessor = keras_llama.TextPreprocessor(found, 16, add_bos=found.bos_id >= 0, add_eos=True)
        corpus.write(source(path), preprocessor, tmp_path / name)
        for number, side in enumerate(corpus.opened(tmp_path / name)):
            texts = [text for held, text, _ in source(path).read() if held == number]
            if name == "without":
                texts = found.decode([ids[1:] for ids in found.encode(texts)])
            assert side.counts["characters"] == side.counts["bytes"] == sum(map(len, texts))


@pytest.mark.plain
def test_a_pass_trains_every_pair_and_each_batch_is_known_by_its_number():
    side = side_of(*TEXTS[:2], range(60, 70))  # 36 tokens: 4 rows of 10
    rows = pretrainers.TrainingRows(side, 10, 4, 1, seed=5)
    passes = []
    for epoch in range(3):
        rows.start(epoch)
        passes.append(rows[0])
        assert targets_of(passes[-1]) == sorted((a, a + 1) for text in (*TEXTS[:2], range(60, 70)) for a in text[:-1])
    assert not np.array_equal(passes[0]["token_ids"], passes[1]["token_ids"])
    longer = pretrainers.TrainingRows(side, 10, 4, 3, seed=5)
    for index in range(3):
        assert all(np.array_equal(longer[index][name], passes[index][name]) for name in passes[0])
    other = pretrainers.TrainingRows(side, 10, 4, 3, seed=6)
    assert not np.array_equal(other[0]["token_ids"], passes[0]["token_ids"])


@pytest.mark.plain
def test_text_shorter_than_a_row_goes_round():
    rows = pretrainers.TrainingRows(side_of(range(10, 13)), 8, 2, 1, seed=0)[0]
    assert rows["token_ids"].shape == (2, 8)
    assert set(targets_of(rows)) == {(10, 11), (11, 12)}
    for ids, mask in zip(rows["token_ids"], rows["padding_mask"], strict=True):
        assert mask.tolist() == (1 + np.cumsum(np.where(np.arange(8) > 0, ids == 10, 0))).tolist()


@pytest.mark.plain
@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_token(tied):
    shape = {"num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 48}
    lm = keras_llama.LlamaCausalLM(keras_llama.LlamaBackbone(vocabulary_size=60, tie_word_embeddings=tied, **shape))
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + 32 + 60 * 32
    assert pretrainers.flops_of_token(lm, 100) == 6 * weights + 12 * 2 * 4 * 8 * 100


@pytest.mark.plain
def test_a_product_of_matrices_is_measured():
    assert 1e8 < pretrainers.measured_flops("float32", 256) < 1e15


@pytest.mark.plain
def test_tokenizers_are_given_learned_and_kept(stories, tmp_path, chat_tokenizer):
    given = tmp_path / "tokenizer.json"
    given.write_bytes(chat_tokenizer.files["tokenizer.json"])
    args = pretraining.parser().parse_args(["--tokenizer", str(given)])
    opened = pretrainers.tokenizer(args, pretrainers.given(args), None, tmp_path / "none")
    assert opened.encode(["a film"]) == chat_tokenizer.encode(["a film"])
    args = pretraining.parser().parse_args(["--vocabulary-size", "320", "--split-ideographs"])
    assert pretrainers.given(args) == {}
    learned = pretrainers.tokenizer(args, {}, source(stories), tmp_path / "none")
    assert learned.vocabulary_size <= 320
    preprocessor = keras_llama.TextPreprocessor(learned, 16, add_eos=True)
    corpus.write(source(stories), preprocessor, tmp_path / "tokens")
    kept = pretrainers.tokenizer(args, {}, None, tmp_path / "tokens")
    assert kept.files == learned.files
    train, _ = corpus.opened(tmp_path / "tokens")
    ends = [*train.starts[1:], len(train.tokens)]
    found = learned.decode([train.tokens[a:b].tolist() for a, b in zip(train.starts, ends, strict=True)])
    assert found == [text for side, text, _ in source(stories).read() if not side]


@pytest.mark.plain
def test_tokens_written_are_used_again_and_changed_files_are_read_again(stories, tmp_path, monkeypatch):
    args = pretraining.parser().parse_args(["--data", str(stories), "--output-dir", str(tmp_path), *FAST])
    written, write = [], corpus.write
    monkeypatch.setattr(corpus, "write", lambda *given: (written.append(given), write(*given)))
    first, again = (pretraining.prepare(args)[2] for _ in range(2))
    os.utime(stories, ns=(0, 0))
    changed = pretraining.prepare(args)[2]
    assert first == again != changed
    assert len(written) == 2
    assert sorted(tmp_path.iterdir()) == sorted([first, changed])


@pytest.mark.plain
def test_a_tokenizer_that_has_changed_makes_other_tokens(stories, tmp_path):
    path, folders = tmp_path / "tokenizer.model", []
    flags = ["--data", str(stories), "--tokenizer", str(path), "--output-dir", str(tmp_path / "out"), *FAST]
    for size in (300, 310, 300):
        files = keras_llama.SentencePieceTokenizer.train(STORIES, size).files
        path.write_bytes(files[path.name])
        lm, _, folder = pretraining.prepare(pretraining.parser().parse_args(flags))
        assert lm.preprocessor.tokenizer.files == corpus.vocabulary(folder) == {path.name: files[path.name]}
        folders.append(folder)
    assert folders[0] == folders[2] != folders[1]


@pytest.mark.plain
def test_test_data_are_all_that_is_validated_on(stories, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text('{"text": "a good dog"}\n{"text": "a red film"}\n')
    flags = ["--data", str(stories), "--test-data", str(held), "--output-dir", str(tmp_path), *FAST]
    _, (train, validation), _ = pretraining.prepare(pretraining.parser().parse_args(flags))
    assert (train.counts["texts"], validation.counts["texts"]) == (len(STORIES), 2)
    assert validation.counts["characters"] == 20


@pytest.mark.plain
def test_a_poem_by_its_title(tmp_path):
    """Two poems learned by heart: each is told by its title."""
    from tasks import generation

    poems = {"春晓": "春眠不觉晓，处处闻啼鸟。", "静夜思": "床前明月光，疑是地上霜。"}
    path, output = tmp_path / "poems.json", tmp_path / "out"
    rows = [{"title": title, "content": content} for title, content in poems.items()]
    path.write_text(json.dumps(rows * 20, ensure_ascii=False), encoding="utf-8")
    template = ["--template", r"{title}\n{content}"]
    flags = ["--data", path, "--validation-share", "0", "--split-ideographs", "--prompt", "春晓", "--steps", "40"]
    pretrained(*flags, *template, "--output-dir", output, "--max-new-tokens", "20")
    report = report_of(output)
    assert "perplexity" not in report
    flags = ["--preset", output / "preset", "--prompt", "春晓", "--prompt", "静夜思", "--temperature", "0", *template]
    generation.main([str(flag) for flag in [*flags, "--output-dir", tmp_path / "poems", "--max-new-tokens", "20"]])
    found = [row["text"] for row in report_of(tmp_path / "poems")["generated"]]
    assert found == [f"{title}\n{content}" for title, content in poems.items()]


@pytest.mark.plain
def test_a_source_may_tell_its_batches_by_epoch(make_backbone, tmp_path):
    """`fit` on a `PyDataset` with `start` and `digest`: other batches in each epoch, and the same after a break."""

    class Source(keras.utils.PyDataset):
        def __init__(self, name="one"):
            super().__init__()
            self.name, self.epoch, self.started = name, 0, []

        def start(self, epoch):
            self.epoch = epoch
            self.started.append(epoch)

        def digest(self):
            return self.name

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return (np.random.default_rng([self.epoch, index]).integers(1, 60, (2, 6)),)

    def made():
        keras.utils.set_random_seed(3)
        lm = keras_llama.LlamaCausalLM(make_backbone())
        lm.compile(run_eagerly=True, jit_compile=False)  # its order is asked for, not its speed
        return lm

    whole = Source()
    expected = made().fit(whole, epochs=3, verbose=0, shuffle=False).history["loss"]
    assert whole.started[:3] == [0, 1, 2]
    made().fit(Source(), epochs=2, verbose=0, shuffle=False, resume=tmp_path)
    found = made().fit(Source(), epochs=3, verbose=0, shuffle=False, resume=tmp_path).history["loss"]
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="of these data"):
        made().fit(Source("other"), epochs=4, verbose=0, shuffle=False, resume=tmp_path)
