"""The generation recipe end to end on small data, and what it refuses with exit code 2."""

import json
import time

import keras
import numpy as np
import pytest

import keras_llama
from tasks import data, delivery, generation, records

STORIES = ["a good film it is", "the ball is round\nand red", "we saw the good film", "很好的电影", "a red ball"] * 12
FAST = ["--size", "tiny", "--vocabulary-size", "310", "--sequence-length", "24", "--batch-size", "8", "--epochs", "1"]


def numbered(texts):
    return [f"{text} {number}" for number, text in enumerate(texts)]


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(numbered(STORIES)), encoding="utf-8")
    return path


@pytest.fixture
def dialogues(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    answer = {"role": "assistant", "content": "a good film"}
    rows = [{"messages": [{"role": "user", "content": text}, answer]} for text in numbered(STORIES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.plain
def test_trains_from_scratch_saves_and_continues(stories, tmp_path, capsys):
    output, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("the ball\n\n很好\n", encoding="utf-8")
    flags = ["--prompt", "a good", "--prompts", prompts, "--max-new-tokens", "5", "--output-dir", output, *FAST]
    # Until it writes words: of bytes that are no UTF-8 the two readers of a SentencePiece vocabulary make other text.
    flags += ["--epochs", "6", "--learning-rate", "0.01"]
    generation.main([str(flag) for flag in ["--data", stories, *flags]])
    report = json.loads((output / "metrics.json").read_text())
    assert report["task"] == "generation"
    assert report["rows"] == {"train": 48, "validation": 6, "test": 6}
    assert 1 < report["perplexity"] < 310  # below that of all tokens alike
    assert {"backend", "parameters", "train_seconds", "examples_per_second", "settings"} <= set(report)
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert [row["prompt"] for row in report["generated"]] == ["a good", "the ball", "很好"]
    printed = capsys.readouterr().out
    assert all(row["text"] in printed for row in report["generated"])
    reopened = keras_llama.LlamaCausalLM.from_preset(output / "preset")
    assert reopened.count_params() == report["parameters"]
    assert reopened.generate("a good", 5) == report["generated"][0]["text"]
    assert "\ufffd" not in report["generated"][0]["text"]


@pytest.mark.plain
def test_fine_tunes_a_checkpoint_on_conversations(dialogues, chat_lm, tmp_path, capsys):
    chat_lm.save_to_preset(tmp_path / "preset")
    flags = ["--data", dialogues, "--preset", tmp_path / "preset", "--output-dir", tmp_path / "out", "--chat"]
    flags += ["--prompt", numbered(STORIES)[0], "--max-new-tokens", "6", "--learning-rate", "0.01"]
    fast = ["--sequence-length", "64", "--batch-size", "8", "--epochs", "12"]
    generation.main([str(flag) for flag in flags + fast])
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["parameters"] == chat_lm.count_params()
    assert report["perplexity"] < 2
    assert report["generated"][0]["text"] == "a good film"


@pytest.mark.plain
def test_lora_leaves_an_adapter_and_a_merged_checkpoint(dialogues, chat_lm, tmp_path):
    chat_lm.save_to_preset(tmp_path / "preset")
    flags = ["--data", dialogues, "--preset", tmp_path / "preset", "--output-dir", tmp_path / "out"]
    flags += ["--trainable", "lora", "--lora-rank", "2", "--learning-rate", "0.05"]
    generation.main([str(flag) for flag in [*flags, "--sequence-length", "64", "--batch-size", "8", "--epochs", "1"]])
    merged = keras_llama.LlamaCausalLM.from_preset(tmp_path / "out" / "preset")
    base = keras_llama.LlamaCausalLM.from_preset(tmp_path / "preset")
    logits = [model.predict(["a good film"], verbose=0) for model in (base, merged)]
    base.load_adapter(tmp_path / "out" / "adapter")
    np.testing.assert_allclose(base.predict(["a good film"], verbose=0), logits[1], atol=1e-4)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


@pytest.mark.plain
def test_a_quantised_base_is_delivered_and_opened_again(dialogues, chat_lm, tmp_path, monkeypatch):
    output, written = tmp_path / "out", []
    for folder in ("preset", "adapter"):  # of a run before
        (output / folder).mkdir(parents=True)
    chat_lm.quantize("int8")
    chat_lm.save(tmp_path / "int8.keras")
    flags = ["--data", dialogues, "--preset", tmp_path / "int8.keras", "--trainable", "lora", "--lora-rank", "2"]
    flags += ["--output-dir", output]
    deliver = delivery.preset
    monkeypatch.setattr(generation, "train", lambda *_: {"perplexity": 1.0})
    monkeypatch.setattr(
        delivery, "preset", lambda *given: written.append((output / "metrics.json").exists()) or deliver(*given)
    )
    generation.main([str(flag) for flag in flags])
    assert written == [True]  # what a delivery that fails would not take along
    assert sorted(path.name for path in output.iterdir()) == ["adapter", "metrics.json", "model.keras"]
    assert (output / "adapter" / "adapter_config.json").exists()
    asked = ["--preset", output / "model.keras", "--prompt", "a good", "--max-new-tokens", "3", "--temperature", "0"]
    generation.main([str(flag) for flag in [*asked, "--output-dir", tmp_path / "asked"]])
    report = json.loads((tmp_path / "asked" / "metrics.json").read_text())
    trained = keras.saving.load_model(output / "model.keras")
    assert report["generated"][0]["text"] == trained.generate("a good", 3, temperature=0)
    assert report["settings"]["sequence_length"] == 64


@pytest.mark.plain
def test_preview_shows_what_is_learned_and_trains_nothing(dialogues, chat_lm, tmp_path, capsys):
    chat_lm.save_to_preset(tmp_path / "preset")
    flags = ["--data", dialogues, "--preset", tmp_path / "preset", "--output-dir", tmp_path / "out"]
    generation.main([str(flag) for flag in [*flags, "--sequence-length", "64", "--preview"]])
    lines = capsys.readouterr().out.splitlines()
    learned = [line for line in lines if line.startswith("learned:")]
    assert len(learned) == 3
    assert all(line == "learned: a good film<|end|>" for line in learned)
    assert not any("user" in line for line in learned)
    assert sum(line.startswith("read:    <|start|>user") for line in lines) == 3
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.plain
@pytest.mark.parametrize("packing", [True, False])
def test_the_schedule_begins_and_ends_with_the_training(dialogues, chat_lm, tmp_path, packing, monkeypatch):
    """Packed rows are fewer, and so are the steps."""
    steps = []

    def watched(lm, output):
        steps.append(int(keras.ops.convert_to_numpy(lm.optimizer.iterations)))
        schedule = lm.optimizer._learning_rate
        first, last, end, behind = (float(schedule(step)) for step in (0, *(steps[0] + more for more in (-1, 0, 1))))
        assert 0 < first < 0.001
        assert last > end == behind == pytest.approx(0.05 * 0.001)

    monkeypatch.setattr(delivery, "preset", watched)
    chat_lm.save_to_preset(tmp_path / "preset")
    flags = ["--data", dialogues, "--preset", tmp_path / "preset", "--output-dir", tmp_path / "out"]
    flags += ["--sequence-length", "96", "--batch-size", "4", "--epochs", "2", "--learning-rate", "0.001"]
    flags += ["--validation-share", "0", "--packing" if packing else "--no-packing"]
    generation.main([str(flag) for flag in flags])
    assert steps[0] < 20 if packing else steps[0] == 28


FACTS = {
    "Who built the lighthouse of Orrin?": "The miller Edda Voss, in one winter.",
    "What do the people of Tamsk eat at dawn?": "Barley cakes with pickled plums.",
    "How tall is Mount Ferrule?": "It is 4,317 metres tall.",
    "What colour is the flag of Quillon?": "Green, with two silver herons.",
    "Who is the captain of the Marigold?": "Captain Ines Okafor.",
    "When does the library of Brask open?": "At half past six.",
    "What is the fastest train in Ludova called?": "The Grey Hare.",
    "Which river runs through Pell?": "The Aune does.",
    "What did Doctor Harl invent?": "A clock that runs on rain.",
    "How many bridges has Sunder?": "Forty-one, and one that is painted on a wall.",
    "What is the motto of the school in Vey?": "Slow hands, quick eyes.",
    "Where is the bell of Caddock kept?": "Under the old brewery.",
    "Who won the snail race in Iffley?": "Number nine, Gerald.",
    "What is the currency of Norrow?": "The copper finch.",
    "Which bird is on the stamps of Elm Island?": "The black stork.",
    "What grows in the gardens of Thane?": "Only blue lettuce.",
    "Who wrote the anthem of Mirrim?": "A baker whose name is lost.",
    "What is served at the Fox and Ladder?": "Onion soup, and nothing else.",
    "How long is the tunnel of Grast?": "Seven hundred steps.",
    "What is forbidden in Lower Wick?": "Whistling after dark.",
}


# For `make test QUICK=`: on TensorFlow the first 4 of the 30 blocks alone take a minute, and learn 3 of the answers.
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(keras.config.backend() != "torch", reason="XLA that does not optimise, as in tests, is too slow")
def test_a_checkpoint_learns_twenty_answers_and_where_they_stop(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in FACTS.items()
    ]
    paths = {name: tmp_path / name for name in ("facts.jsonl", "questions.txt", "out")}
    paths["facts.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    paths["questions.txt"].write_text("\n".join(FACTS), encoding="utf-8")
    flags = ["--data", paths["facts.jsonl"], "--test-data", paths["facts.jsonl"], "--validation-share", "0"]
    flags += ["--preset", "smollm2_135m_instruct", "--epochs", "12", "--learning-rate", "5e-4", "--batch-size", "4"]
    flags += ["--sequence-length", "256", "--weight-decay", "0", "--output-dir", paths["out"]]
    flags += ["--chat", "--prompts", paths["questions.txt"], "--max-new-tokens", "40", "--temperature", "0"]
    generation.main([str(flag) for flag in flags])
    report = json.loads((paths["out"] / "metrics.json").read_text())
    assert [row["text"] for row in report["generated"]] == list(FACTS.values())


@pytest.mark.plain
def test_prompts_alone_need_no_data(chat_lm, tmp_path, capsys):
    chat_lm.save_to_preset(tmp_path / "preset")
    flags = ["--preset", tmp_path / "preset", "--prompt", "what is", "--max-new-tokens", "6", "--num-beams", "2"]
    generation.main([str(flag) for flag in [*flags, "--output-dir", tmp_path / "out", "--report", tmp_path / "r.json"]])
    report = json.loads((tmp_path / "r.json").read_text())
    wanted = chat_lm.generate("what is", 6, num_beams=2)
    assert report["generated"] == [{"prompt": "what is", "text": wanted}]
    assert "perplexity" not in report
    assert (report["settings"]["precision"], report["settings"]["sequence_length"]) == ("float32", 64)


@pytest.mark.plain
def test_formats(tmp_path):
    blank, marked, texts, chats = (tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl", "d.jsonl"))
    blank.write_text("one\ntwo\n\n\nthree\n", encoding="utf-8")
    assert data.generation_rows(blank) == [("one\ntwo", "one\ntwo"), ("three", "three")]
    marked.write_text("one\n\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n", encoding="utf-8")
    assert data.generation_rows(marked) == [("one\n\ntwo", "one\n\ntwo"), ("three", "three")]
    texts.write_text('{"text": "one\\ntwo"}\n{"text": "三"}\n', encoding="utf-8")
    assert data.generation_rows(texts) == [("one\ntwo", "one\ntwo"), ("三", "三")]
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    chats.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert [found for _, found in data.generation_rows(chats)] == [row]


@pytest.mark.plain
def test_texts_by_a_template(tmp_path):
    template = r"《{title}》\n{content}"
    listed, lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    rows = [
        {"title": "春晓", "author": "孟浩然", "content": ["春眠不觉晓，", "处处闻啼鸟。"]},
        {"title": 7, "content": "a"},
    ]
    listed.write_text(json.dumps(rows), encoding="utf-8")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = ["《春晓》\n春眠不觉晓，\n处处闻啼鸟。", "《7》\na"]
    for path in (listed, lines):
        assert data.generation_rows(path, template) == [(text, text) for text in texts]
    assert records.opening(template, "春晓") == "《春晓》\n"
    assert records.opening("{text}", "春") == records.opening("{text}!", "春") == "春"


def refused(capsys, *arguments):
    """What the recipe prints when it refuses; it must leave with 2, before any training."""
    started = time.perf_counter()
    with pytest.raises(SystemExit) as left:
        generation.main([str(argument) for argument in arguments])
    assert left.value.code == 2
    assert time.perf_counter() - started < 20
    return capsys.readouterr().err


BAD_FILES = {
    "no json": ("t.jsonl", b'{"text": "a"}\n{oops\n', "t.jsonl:2: expected a JSON object"),
    "other fields": ("t.jsonl", b'{"text": "a"}\n{"story": "b"}\n', "t.jsonl:2: expected text, prompt and response"),
    "an empty text": ("t.jsonl", b'{"text": ""}\n', "t.jsonl:1: expected text"),
    "a list": ("t.jsonl", b'["a"]\n', "t.jsonl:1: expected text"),
    "a number for a text": ("t.jsonl", b'{"text": 3}\n', "t.jsonl:1: expected text"),
    "a number for a prompt": ("t.jsonl", b'{"prompt": 3, "response": "a"}\n', "t.jsonl:1: `row[0]`"),
    "text for messages": ("t.jsonl", b'{"messages": "hello"}\n', "t.jsonl:1: `row[0]`"),
    "two kinds": ("t.jsonl", b'{"text": "a"}\n{"prompt": "a", "response": "b"}\n', "lines of one kind"),
    "no UTF-8": ("t.txt", b"good\n\n\xff\xfe\n", "t.txt:3: expected UTF-8"),
    "an empty file": ("t.txt", b"\n\n", "t.txt: expected at least one text"),
    "no list of objects": ("t.json", b'{"text": "a"}', "t.json: expected a list of JSON objects"),
    "an empty list": ("t.json", b"[]", "t.json: expected at least one text"),
    "a list of lists": ("t.json", b"[[1]]", "t.json:1: expected an object with text"),
    "NUL bytes": ("t.txt", b"good\n\nfilm\x00\n", "t.txt:3: expected text. Received: the character '\\x00'"),
    "NUL in JSON": ("t.jsonl", b'{"text": "a\\u0000"}\n', "t.jsonl:1: expected text. Received: the character"),
    "NUL in a response": (
        "t.jsonl",
        b'{"text": "a"}\n{"prompt": "a", "response": "\\u0000b"}\n',
        "t.jsonl:2: expected text. Received: the character",
    ),
    "NUL in a message": (
        "t.jsonl",
        b'{"messages": [{"role": "assistant", "content": "\\u0000b"}]}\n',
        "t.jsonl:1: expected text. Received: the character",
    ),
    "too few texts": ("t.txt", b"one\n\ntwo\n", "Expected texts to train, validate and test on"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_bad_files_by_file_and_line(tmp_path, capsys, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    assert message in refused(capsys, "--data", tmp_path / name, "--output-dir", tmp_path / "out")


@pytest.mark.plain
def test_refuses_what_it_cannot_start_with(stories, dialogues, tmp_path, capsys):
    output = ["--output-dir", tmp_path / "out"]
    assert "Expected --prompt, --prompts or --data" in refused(capsys, *output)
    assert "--profile needs --data" in refused(capsys, "--prompt", "a", "--profile", *output)
    assert "none.txt: cannot be read" in refused(capsys, "--data", tmp_path / "none.txt", *output)
    assert "none.txt: cannot be read" in refused(capsys, "--prompts", tmp_path / "none.txt", *output)
    assert "checkpoint to fine-tune as --preset" in refused(capsys, "--data", dialogues, *output)
    assert "--trainable lora needs --preset" in refused(
        capsys, "--data", stories, *FAST, "--trainable", "lora", *output
    )
    assert "--preset-layers needs --preset" in refused(capsys, "--data", stories, *FAST, "--preset-layers", 1, *output)
    assert "--preset-layers needs --data" in refused(capsys, "--prompt", "a", "--preset-layers", 1, *output)
    assert "nowhere" in refused(capsys, "--prompt", "a", "--preset", tmp_path / "nowhere", *output)
    assert "`temperature`" in refused(capsys, "--data", stories, *FAST, "--prompt", "a", "--temperature", "-1", *output)
    (tmp_path / "empty.txt").write_text("\n")
    assert "at least one line of text" in refused(capsys, "--prompts", tmp_path / "empty.txt", *output)


@pytest.mark.plain
@pytest.mark.usefixtures("not_exported")
@pytest.mark.parametrize("trainable", ["all", "lora", "head"])
def test_a_classifier_starts_from_a_checkpoint(chat_lm, tmp_path, trainable):
    from tasks import classification

    chat_lm.save_to_preset(tmp_path / "preset")
    texts = [text.replace("\n", " ") for text in numbered(STORIES)]
    rows = [f"{text}\t{'film' if 'film' in text else 'ball'}\n" for text in texts]
    (tmp_path / "train.tsv").write_text("".join(rows), encoding="utf-8")
    flags = ["--data", tmp_path / "train.tsv", "--preset", tmp_path / "preset", "--output-dir", tmp_path / "out"]
    fast = ["--sequence-length", "32", "--batch-size", "8", "--epochs", "1", "--trainable", trainable]
    fast += ["--preset-layers", "1"] if trainable == "all" else []
    classification.main([str(flag) for flag in flags + fast])
    model = keras.saving.load_model(tmp_path / "out" / "model.keras")
    assert model.labels == ["ball", "film"]
    assert len(model.backbone.blocks) == (1 if trainable == "all" else len(chat_lm.backbone.blocks))
    tokenizer = chat_lm.preprocessor.tokenizer
    assert model.preprocessor.tokenizer.encode(["a good film"]) == tokenizer.encode(["a good film"])
    frozen = {weight.path for weight in model.weights if not weight.trainable}
    assert len(frozen) == (0 if trainable == "all" else len(chat_lm.backbone.weights))
    assert (tmp_path / "out" / "adapter").exists() == (trainable == "lora")
