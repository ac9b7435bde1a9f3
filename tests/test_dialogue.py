"""Prompts and responses, and messages: only what the assistant says is trained."""

from collections import Counter

import numpy as np
import pytest
import reference
from keras import ops

import keras_llama
from keras_llama.losses import TokenCrossentropy
from keras_llama.opening import open_tokenizer

MESSAGES = [
    {"role": "system", "content": "a good film"},
    {"role": "user", "content": "what is a film"},
    {"role": "assistant", "content": "a film"},
    {"role": "user", "content": "good"},
    {"role": "assistant", "content": "很好"},
]


def trained_text(lm, row):
    """The trained parts of a row, `|` between two that do not touch."""
    tokenizer = lm.preprocessor.tokenizer
    parts, before = [], False
    columns = lm.encode([row])
    for token, flag in zip(columns["token_ids"][0], columns["trained"][0], strict=True):
        if flag:
            parts = parts if before else [*parts, []]
            parts[-1].append(int(token))
        before = bool(flag)
    return tokenizer.decode(parts, skip_special_tokens=False)


@pytest.mark.plain
def test_every_turn_of_the_assistant_is_trained_through_its_end(chat_lm):
    assert trained_text(chat_lm, {"messages": MESSAGES}) == ["a film<|end|>", "很好<|end|>"]
    assert trained_text(chat_lm, MESSAGES[:3]) == ["a film<|end|>"]


@pytest.mark.parametrize("before", ["", "<|start|>system\na good film<|end|>\n"])
def test_a_conversation_may_open_with_the_assistant(chat_tokenizer, chat_lm, before):
    """What the template writes before its words is not trained, a system text of its own included."""
    template = f"{{% if messages[0].role != 'system' %}}{before}{{% endif %}}{chat_tokenizer.chat_template}"
    files = {**chat_tokenizer.files, "chat_template.jinja": template.encode()}
    chat_lm.preprocessor.tokenizer = open_tokenizer(files)
    opening = {"role": "assistant", "content": "what is a film"}
    assert trained_text(chat_lm, [opening]) == ["what is a film<|end|>"]
    assert trained_text(chat_lm, [opening, *MESSAGES[3:]]) == ["what is a film<|end|>", "很好<|end|>"]


@pytest.mark.plain
def test_a_response_is_trained_with_its_end(chat_lm):
    row = {"prompt": "what is a film", "response": " a good film"}
    assert trained_text(chat_lm, row) == [" a good film<|none|>"]


@pytest.mark.plain
def test_the_ids_are_those_of_the_whole_text(chat_lm):
    tokenizer = chat_lm.preprocessor.tokenizer
    ids = chat_lm.encode([{"prompt": "what is a fi", "response": "lm"}])["token_ids"][0]
    assert ids.tolist() == [*tokenizer.encode(["what is a film"])[0], tokenizer.eos_id]
    # " film" straddles the end of the prompt: it counts as the response.
    assert trained_text(chat_lm, {"prompt": "what is a fi", "response": "lm"})[0].endswith("film<|none|>")


@pytest.mark.plain
def test_preview_shows_what_is_trained(chat_lm):
    row = chat_lm.preview_batch([{"prompt": "a", "response": " film"}])[0]
    assert [flag for _, flag in row] == [False] + [True] * (len(row) - 1)
    plain = chat_lm.preview_batch(["a film"])[0]
    assert [flag for _, flag in plain] == [False] + [True] * (len(plain) - 1)


def test_no_gradient_comes_from_the_prompt(chat_lm):
    """The loss is the mean over the response: other targets at the prompt's places change nothing."""
    columns = chat_lm.encode([{"prompt": "what is a film", "response": " a good film"}])
    trained = columns["trained"][0]
    inputs, targets, weights = chat_lm.finish_batch(chat_lm.preprocessor.pad(columns))
    assert weights.sum() == trained.sum()
    assert "trained" not in inputs
    other = np.where(weights > 0, targets, 7)
    value, found = reference.gradients(chat_lm, inputs, lambda logits: TokenCrossentropy()(targets, logits, weights))
    again, same = reference.gradients(chat_lm, inputs, lambda logits: TokenCrossentropy()(other, logits, weights))
    assert value == again
    assert all(np.array_equal(found[path], same[path]) for path in found)
    entropy = -np.log(ops.convert_to_numpy(ops.softmax(chat_lm(inputs), axis=-1)))[0]
    places = np.flatnonzero(trained) - 1
    wanted = np.mean([entropy[place, columns["token_ids"][0][place + 1]] for place in places])
    assert abs(value - wanted) < 1e-4


@pytest.mark.parametrize("form", [*(pytest.param(x, marks=pytest.mark.plain) for x in ("dicts", "columns")), "lists"])
def test_fit_takes_dialogues_in_each_form(chat_lm, form):
    pairs = [{"prompt": "what is a film", "response": " good"}, {"prompt": "a", "response": " film"}] * 4
    data = {
        "dicts": pairs,
        "columns": {key: [row[key] for row in pairs] for key in ("prompt", "response")},
        "lists": [MESSAGES, MESSAGES[:3]] * 4,
    }[form]
    chat_lm.compile()
    history = chat_lm.fit(data, batch_size=4, epochs=2, validation_split=0.25, verbose=0).history
    assert history["loss"][1] < history["loss"][0]
    assert {"perplexity", "val_perplexity"} <= set(history)


@pytest.mark.plain
def test_overfitted_on_pairs_it_answers_and_stops(chat_tokenizer):
    """Padding is a mask, not an id: the end is trained although it equals the id that fills a batch."""
    words = ["good", "film", "user", "system", "what"]
    pairs = [{"prompt": f"{a} {b}", "response": f" {b} {a}"} for a in words for b in words if a < b]
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=chat_tokenizer.vocabulary_size, **keras_llama.size("tiny"), tie_word_embeddings=True
    )
    assert chat_tokenizer.pad_id == chat_tokenizer.eos_id
    preprocessor = keras_llama.TextPreprocessor(chat_tokenizer, sequence_length=32, add_bos=False)
    lm = keras_llama.LlamaCausalLM(backbone, preprocessor)
    lm.compile()
    lm.optimizer.learning_rate = 3e-3
    lm.fit(pairs, batch_size=10, epochs=100, verbose=0)
    found = lm.generate([row["prompt"] for row in pairs], 12, strip_prompt=True)
    assert found == [row["response"] for row in pairs]


@pytest.mark.plain
def test_long_rows_are_cut_with_a_warning(chat_lm):
    chat_lm.preprocessor.sequence_length = 8
    with pytest.warns(UserWarning, match="1 of 1 texts are longer"):
        columns = chat_lm.encode([{"prompt": "what is", "response": " a good film" * 9}])
    assert [len(rows[0]) for rows in columns.values()] == [8, 8]


@pytest.mark.plain
def test_a_row_that_is_cut_before_its_response_is_named(chat_lm):
    chat_lm.preprocessor.sequence_length = 8
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "what is a film " * 9, "response": "b"}]
    with pytest.raises(ValueError, match="Row 1 must have a token of a response among its first 8"):
        chat_lm.encode(rows, cut=Counter())


@pytest.mark.plain
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([{"prompt": "a"}], r"`x\[0\]` must be one of"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}], r"`x\[1\]` must have a response"),
        ([{"prompt": 3, "response": "b"}], r"`x\[0\]` must have a prompt"),
        ([{"messages": []}], "not empty"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "message of the assistant"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "Roles are"),
        ([{"messages": [{"role": "user"}]}], "message 0"),
        ([[{"role": "assistant", "content": None}]], "message 0"),
        ({"prompt": ["a", "b"], "response": ["a"]}, "columns of one length"),
        (["a", {"prompt": "a", "response": "b"}], None),
    ],
)
def test_bad_rows_are_named(chat_lm, x, message):
    with pytest.raises(ValueError, match=message):
        chat_lm.encode(x)


@pytest.mark.plain
def test_a_template_that_rewrites_earlier_turns_is_refused(chat_tokenizer, chat_lm):
    turn = "{% if loop.last or m.role != 'assistant' %}<|start|>{{ m.content }}<|end|>{% endif %}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    files = {**chat_tokenizer.files, "chat_template.jinja": template.encode()}
    chat_lm.preprocessor.tokenizer = open_tokenizer(files)
    with pytest.raises(ValueError, match="whatever follows"):
        chat_lm.encode([MESSAGES])
