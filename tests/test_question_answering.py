"""LlamaQuestionAnswering: spans found and checked, windows over long contexts, answers of the context only, scores."""

import itertools
import json
import warnings

import keras
import numpy as np
import pytest

import keras_llama
from keras_llama import answer_scores
from keras_llama.questions import best_span, questions, span_targets, windows

CAT = "The cat sat on the mat. A dog slept under the old tree."
RIVER = "长江发源于青藏高原，在上海附近注入东海。"
ROWS = [
    {"question": "Who sat?", "context": CAT, "answers": ["The cat"]},
    {"question": "Who slept?", "context": CAT, "answers": [{"text": "A dog", "answer_start": 24}]},
    {"question": "Where did it sleep?", "context": CAT, "answers": {"text": ["the old tree"], "answer_start": [42]}},
    {"question": "长江发源于哪里？", "context": RIVER, "answer": "青藏高原", "id": "Q4"},
    {"question": "长江注入哪里？", "context": RIVER, "answers": "东海"},
]
WANTED = ["The cat", "A dog", "the old tree", "青藏高原", "东海"]


@pytest.fixture(scope="module")
def texts():
    return keras_llama.SpelledTokenizer.train(
        [row[name] for row in ROWS for name in ("question", "context")] * 4, vocabulary_size=400
    )


@pytest.fixture
def make(texts):
    def make(length=96, causal=False, tokenizer=texts, **options):
        size = {"num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 32}
        backbone = keras_llama.LlamaBackbone(
            vocabulary_size=tokenizer.vocabulary_size, **size, intermediate_dim=48, causal=causal
        )
        preprocessor = keras_llama.TextPreprocessor(tokenizer, length)
        return keras_llama.LlamaQuestionAnswering(backbone, preprocessor, **options)

    return make


def compiled(model):
    model.compile(keras.optimizers.Adam(1e-2))
    return model


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.plain)])
def test_learns_answers_from_strings_and_records(make, causal):
    model = compiled(make(causal=causal))
    history = model.fit(ROWS * 4, epochs=30, batch_size=10, validation_data=(ROWS,), verbose=0).history
    assert history["val_accuracy"][-1] == 1
    found = model.answer([row["question"] for row in ROWS], [row["context"] for row in ROWS])
    assert [answer["text"] for answer in found] == WANTED
    for answer, row in zip(found, ROWS, strict=True):
        assert row["context"][answer["start"] : answer["end"]] == answer["text"]
        assert 0.3 < answer["score"] <= 1
    scores = model.evaluate(ROWS, return_dict=True, verbose=0)
    assert (scores["exact_match"], scores["f1"]) == (100, 100)
    assert model.evaluate(ROWS, verbose=0) == pytest.approx(list(scores.values()), abs=1e-5)
    assert model.answer("Who sat?", CAT)["text"] == "The cat"
    assert [answer["text"] for answer in model.answer(["Who sat?", "Who slept?"], CAT)] == WANTED[:2]


@pytest.mark.plain
def test_columns_targets_apart_and_streams_train_alike(make):
    class Stream(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return (ROWS[i : i + 1],)

    losses = []
    columns = {name: [row[name] for row in ROWS] for name in ("question", "context")}
    for x, y in ((ROWS, None), (columns, WANTED), ({**columns, "answers": WANTED}, None)):
        keras.utils.set_random_seed(0)
        losses.append(compiled(make()).fit(x, y, epochs=2, batch_size=2, verbose=0).history["loss"])
    assert losses[0] == losses[1] == losses[2]
    model = compiled(make())
    model.fit(Stream(), epochs=1, validation_data=Stream(), verbose=0)
    assert set(model.evaluate(Stream(), return_dict=True, verbose=0)) == {"loss", "accuracy"}


@pytest.mark.plain
def test_token_ids_with_places_as_targets(make_backbone, rng):
    """The answer is the tokens 7 to 8, wherever they stand; padding is no answer."""
    model = keras_llama.LlamaQuestionAnswering(make_backbone(causal=False))
    ids, places = rng.integers(10, 60, (32, 12)).astype("int32"), rng.integers(0, 8, 32)
    mask = np.ones_like(ids)
    mask[::2, 10:] = 0
    for row, place in zip(ids, places, strict=True):
        row[place : place + 2] = 7, 8
    y = np.stack([places, places + 1], axis=1)
    model.compile(keras.optimizers.Adam(3e-3))
    x = {"token_ids": ids, "padding_mask": mask}
    model.fit(x, y, epochs=12, batch_size=8, verbose=0)
    assert model.evaluate(x, y, return_dict=True, verbose=0)["accuracy"] == 1
    assert model.predict(x, verbose=0).shape == (32, 12, 2)
    for wrong, message in (
        (y[:, 0], r"int array \(32, 2\)"),
        (y + 20, "places of real tokens"),
        (y[:, ::-1], r"`y\[0\]` must have its first token before its last"),
        (None, "`y` must hold"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(x, wrong, verbose=0)
    with pytest.raises(ValueError, match="need a preprocessor"):
        model.answer("Who?", "She.")


@pytest.mark.plain
def test_targets_are_the_answers_tokens(texts):
    preprocessor = keras_llama.TextPreprocessor(texts, 96)
    rows = questions(ROWS)
    for window in windows(rows, preprocessor, 8):
        row = rows[window.row]
        starts, ends = span_targets(window, row.spans)
        assert texts.decode([window.token_ids[: window.first].tolist()]) == [row.question]
        assert not starts[: window.first].any()  # the question answers nothing
        assert starts[-1] == ends[-1] == 1  # nor is there no answer
        first, last = (np.flatnonzero(side == 2) - window.first for side in (starts, ends))
        place = slice(window.offsets[first[0], 0], window.offsets[last[0], 1])
        assert row.context[place].strip() == row.answers[0]


@pytest.mark.plain
def test_where_an_answer_stands():
    twice = "red, blue, red"
    assert questions([{"question": "?", "context": twice, "answers": "red"}])[0].spans == ((0, 3), (11, 14))
    record = {"text": "red", "answer_start": 11}
    assert questions([{"question": "?", "context": twice, "answers": [record, "blue"]}])[0].spans == ((11, 14), (5, 9))
    wrong = [{"text": "red", "answer_start": 9}, {"text": "red", "answer_start": -4}]
    with pytest.warns(UserWarning, match="2 of 2 answers do not stand where"):
        (row,) = questions([{"question": "?", "context": twice, "answers": wrong}])
    assert row.spans == ((11, 14), (0, 3))
    assert row.answers == ("red",)
    columns = {"text": np.array(["red", " blue,"], object), "answer_start": np.array([11, 4], "int32")}  # as of pandas
    (row,) = questions([{"question": "?", "context": twice, "answers": columns}])
    assert row.spans == ((11, 14), (5, 10))  # without the blank


BAD_ROWS = {
    "an answer that is not in its context": (
        {"answers": ["a lion"]},
        r"`answers\[1\]` must stand in its context.*lion",
    ),
    "an empty question": ({"question": ""}, r"`question\[1\]` must not be empty"),
    "a blank question": ({"question": " \n"}, r"`question\[1\]` must not be blank"),
    "an empty context": ({"context": ""}, r"`context\[1\]` must not be empty"),
    "a blank context": ({"context": "\u3000 "}, r"`context\[1\]` must not be blank"),
    "no context": ({"context": None}, r"`context\[1\]` must be a string"),
    "no answer": ({"answers": []}, r"`x\[1\]` must have an answer.*no_answer_threshold"),
    "a number": ({"answers": [3]}, r"`answers\[1\]` must hold strings"),
    "no place": ({"answers": [{"text": "A dog", "answer_start": "24"}]}, "integers as answer_start"),
    "a number alone": ({"answers": 1949}, r"`answers\[1\]` must be a string, a dict.*Received: answers=1949"),
    "NaN": ({"answers": float("nan")}, r"`answers\[1\]` must be a string, a dict.*Received: answers=nan"),
    "no text": ({"answers": {"text": None}}, r"`answers\[1\]` must hold strings"),
    "columns of two lengths": (
        {"answers": {"text": ["A dog", "The cat"], "answer_start": [24]}},
        r"`answers\[1\]` must be .*columns of one length",
    ),
    "a column and a number": (
        {"answers": {"text": ["A dog"], "answer_start": 24}},
        r"`answers\[1\]` must be .*columns of one length",
    ),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_ROWS)
def test_refuses_bad_rows_by_their_number(make, case):
    changes, message = BAD_ROWS[case]
    model = compiled(make())
    with pytest.raises(ValueError, match=message):
        model.fit([ROWS[0], {**ROWS[1], **changes}], verbose=0)


@pytest.mark.plain
def test_refuses_what_is_no_question(make):
    model = compiled(make())
    for x, message in (
        ([], "must be a list of"),
        (["Who sat?"], "must be a list of"),
        ({"question": ["Who?"]}, "must be a list of"),
        ({"question": ["Who?"], "context": [CAT, CAT]}, "a context and answers for each question"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(x, verbose=0)
    for question, context, message in (("", CAT, "question"), ("Who?", "", "context"), (["Who?"], [], "context")):
        with pytest.raises(ValueError, match=f"`{message}"):
            model.answer(question, context)
    with pytest.raises(ValueError, match="`sample_weight` must be None"):
        model.fit(ROWS, sample_weight=np.ones(5), verbose=0)
    with pytest.raises(ValueError, match="`sample_weight` must be None"):
        model.fit_head(ROWS, sample_weight=np.ones(5), verbose=0)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": -1}, "`stride` must be an integer of at least 0"),
        ({"max_answer_length": 0}, "`max_answer_length` must be an integer of at least 1"),
        ({"no_answer_threshold": "often"}, "`no_answer_threshold` must be a number or None"),
        ({"length": 7}, "`sequence_length` must be at least 8"),
    ],
)
def test_refuses_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.plain
@pytest.mark.parametrize("stride", [0, 3, 1000])
@pytest.mark.parametrize("length", [8, 20, 33])
def test_windows_hold_every_token_and_overlap(texts, length, stride):
    row = questions([{"question": "Who sat?" * 3, "context": CAT * 3}])[0]
    preprocessor = keras_llama.TextPreprocessor(texts, length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = windows([row], preprocessor, stride)
    parts = [window.offsets[:, 0].tolist() for window in found]
    room = max(map(len, parts))
    assert max(len(window.token_ids) for window in found) <= length
    assert all(len(part) == room for part in parts)
    ((_, offsets),) = texts.encode_with_offsets([row.context])
    assert sorted({start for part in parts for start in part}) == sorted({start for start, _ in offsets})
    for one, other in itertools.pairwise(parts):
        shared = one.index(other[0]) if stride or other[0] in one else room
        assert one[shared:] == other[: len(one) - shared]
        assert len(one) - shared >= min(stride, room // 2)


@pytest.mark.plain
def test_a_window_that_cuts_the_answer_teaches_nothing(texts):
    preprocessor = keras_llama.TextPreprocessor(texts, 13)
    (row,) = questions([{"question": "Where?", "context": CAT, "answers": "under the old tree"}])
    targets = [span_targets(window, row.spans) for window in windows([row], preprocessor, 8)]
    none = [target is not None and bool((target[:, -1] == 2).all()) for target in targets]
    held = [target is not None and not ends for target, ends in zip(targets, none, strict=True)]
    assert any(none)  # of some windows the last token is the answer
    assert any(held)
    assert any(target is None for target in targets)


@pytest.mark.plain
def test_an_answer_longer_than_a_window_is_told(make):
    model = compiled(make(length=12))
    long = {"question": "What?", "context": CAT, "answers": [CAT]}
    with pytest.raises(ValueError, match="must fit into a window"):
        model.fit([long], verbose=0)
    with warnings.catch_warnings(record=True) as caught:  # other libraries warn of themselves
        warnings.simplefilter("always")
        model.fit([long, ROWS[0]], verbose=0)
        model.answer("Who sat? " * 20, CAT)
    told = [str(warning.message) for warning in caught]
    assert any("1 of 2 questions are left out" in message for message in told)
    assert any("1 of 1 questions were cut to 4 tokens" in message for message in told)


@pytest.mark.plain
def test_a_batch_of_a_stream_without_an_answer_teaches_nothing(make):
    class Stream(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return ([{"question": "What?", "context": CAT, "answers": [CAT]}],)

    model = make(length=12)
    model.compile(keras.optimizers.SGD(1.0))
    before = keras.ops.convert_to_numpy(model.get_layer("qa_outputs").kernel)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(Stream(), verbose=0).history
    assert any("1 of 1 questions are left out" in str(warning.message) for warning in caught)
    assert history["loss"] == [pytest.approx(0, abs=1e-6)]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model.get_layer("qa_outputs").kernel), before, atol=1e-6)


@pytest.fixture
def pointing(make):
    """A reader whose logits are highest at one character, wherever it stands."""

    def pointing(target, **options):
        model = make(**options)
        for variable in model.backbone.weights:
            if "block" in variable.path and "norm" not in variable.path:
                variable.assign(np.zeros(variable.shape))  # hidden states are the embeddings, normalised
        (token,) = model.preprocessor.tokenizer.encode([f"x{target}"])[0][-1:]
        vector = keras.ops.convert_to_numpy(model.backbone.token_embedding.embeddings)[token]
        model.get_layer("qa_outputs").kernel.assign(np.stack([vector, vector], axis=1))
        return model

    return pointing


def test_a_context_of_100000_characters_is_read_in_windows(pointing, monkeypatch):
    model = pointing("原", length=64)
    shapes = []
    call = type(model.backbone).call
    monkeypatch.setattr(type(model.backbone), "call", lambda self, x, **o: (shapes.append(x), call(self, x, **o))[1])
    context = (CAT * 1900)[:99_980] + "原" + "." * 19
    answer = model.answer("Who sat?", context)
    assert (answer["text"], answer["start"], answer["end"]) == ("原", 99_980, 99_981)
    assert shapes
    assert all(x["token_ids"].shape[1] in (None, 64) for x in shapes)


@pytest.mark.plain
def test_the_best_span_is_of_the_context(texts):
    (row,) = questions([{"question": "The cat sat", "context": " The cat  sat on the mat"}])
    (window,) = windows([row], keras_llama.TextPreprocessor(texts, 96), 8)
    logits = np.zeros((len(window.token_ids), 2))
    logits[: window.first] = 9  # question
    logits[window.first : -1][~window.possible] = 9  # blanks
    assert not window.possible.all()
    before, first, last, behind = window.first + np.flatnonzero(window.possible[:, 0])[[1, 2, 4, 5]]
    logits[behind, 0] = logits[before, 1] = 5  # an end before a start
    logits[first, 0] = logits[last, 1] = 4
    one = best_span(window, logits, 1)
    span = best_span(window, logits, 64)
    assert (span.start, span.end) == (window.offsets[first - window.first, 0], window.offsets[last - window.first, 1])
    assert one.score < span.score
    assert one.end <= span.end
    logits[-1] = 20
    assert best_span(window, logits, 64).none > -1e-3


@pytest.mark.plain
def test_an_answer_is_of_whole_characters(chat_tokenizer):
    """They are spelled in bytes, three each."""
    (row,) = questions([{"question": "?", "context": "\u3000长江 x", "answers": "江"}])
    (window,) = windows([row], keras_llama.TextPreprocessor(chat_tokenizer, 96), 8)
    sides = [window.offsets[window.possible[:, side], side].tolist() for side in (0, 1)]
    assert sides == [[1, 2, 4], [2, 3, 5]]
    starts, ends = span_targets(window, row.spans)
    assert np.flatnonzero(ends == 2) - np.flatnonzero(starts == 2) == 2
    logits = np.zeros((len(window.token_ids), 2))
    assert best_span(window, logits, 2).end == 5  # the others are longer


@pytest.mark.plain
def test_no_answer_where_its_probability_is_above_the_threshold(make):
    rows = [*ROWS, {"question": "长江发源于哪里？", "context": CAT, "answers": []}]
    rows.append({"question": "Who sat?", "context": RIVER, "answers": ""})
    model = make(no_answer_threshold=0)
    model.compile(keras.optimizers.Adam(5e-3))
    model.fit(rows * 4, epochs=40, batch_size=14, verbose=0)
    found = model.answer([row["question"] for row in rows], [row["context"] for row in rows])
    assert [answer["text"] for answer in found] == [*WANTED, "", ""]
    assert (found[-1]["start"], found[-1]["end"]) == (None, None)
    assert found[-1]["score"] > 0.5
    assert model.evaluate(rows, return_dict=True, verbose=0)["f1"] == 100
    model.no_answer_threshold = 1e9
    assert all(answer["text"] for answer in model.answer(["Who sat?"] * 2, [CAT, RIVER]))


@pytest.mark.plain
def test_saved_and_loaded_as_it_was(make, tmp_path):
    options = {"stride": 7, "max_answer_length": 9, "no_answer_threshold": 1.5, "dropout": 0.1}
    model = compiled(make(**options))
    model.fit(ROWS, verbose=0)
    asked = [row["question"] for row in ROWS], [row["context"] for row in ROWS]
    expected = model.answer(*asked)
    model.save(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    for again in (
        keras.saving.load_model(tmp_path / "model.keras"),
        keras_llama.LlamaQuestionAnswering.from_preset(tmp_path / "preset"),
    ):
        assert again.answer(*asked) == expected
        assert {name: getattr(again, name) for name in options} == options
    fields = json.loads((tmp_path / "preset" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForQuestionAnswering"]
    assert fields["model_type"] == "keras_llama"  # bidirectional: no other tool knows it
    keras.saving.load_model(tmp_path / "model.keras").fit(ROWS, verbose=0)  # compiled as before


LONG = [*ROWS, {"question": "Who slept?", "context": f"{CAT} It rained. {CAT}", "answers": "A dog"}]  # several windows


@pytest.mark.plain
def test_a_head_on_states_computed_once_is_training_with_a_frozen_base(make, monkeypatch):
    alone, whole = make(length=40, stride=8), make(length=40, stride=8)
    whole.set_weights(alone.get_weights())
    for model in (alone, whole):
        model.compile(keras.optimizers.SGD(1.0))  # Adam moves the bias, whose gradient is 0, by rounding
    whole.freeze_base()
    options = {"batch_size": 99, "epochs": 4, "validation_data": (ROWS,), "verbose": 0}
    expected = whole.fit(LONG, **options).history
    asked, call = [], keras_llama.LlamaBlock.call
    monkeypatch.setattr(keras_llama.LlamaBlock, "call", lambda *args, **kw: asked.append(1) or call(*args, **kw))
    found = alone.fit_head(LONG, **options).history
    assert len(asked) <= 4  # a batch to train and one to validate on, each of which may be traced twice
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)
    assert expected["loss"][-1] < 0.99 * expected["loss"][0]
    np.testing.assert_allclose(*(model.predict(ROWS, verbose=0) for model in (alone, whole)), atol=1e-4)
    assert [weight.path for weight in alone.trainable_weights] == ["qa_outputs/kernel", "qa_outputs/bias"]
    states = alone.features(LONG)
    assert states.shape == (7, 40, 32)
    np.testing.assert_allclose(alone.features(LONG, batch_size=3), states, atol=1e-5)  # of windows of other lengths
    head = whole.get_layer("qa_outputs")
    logits = states @ keras.ops.convert_to_numpy(head.kernel) + keras.ops.convert_to_numpy(head.bias)
    np.testing.assert_allclose(logits, whole.predict(LONG, verbose=0), atol=1e-4)
    assert alone.fit_head(LONG, batch_size=3, verbose=0).history["loss"][0] > 0


@pytest.mark.plain
def test_a_head_alone_on_half_precision(make):
    model = make()
    reader = keras_llama.LlamaQuestionAnswering(
        keras_llama.LlamaBackbone.from_config({**model.backbone.get_config(), "dtype": "bfloat16"}), model.preprocessor
    )
    loss = compiled(reader).fit_head(ROWS, epochs=20, verbose=0).history["loss"]
    assert loss[-1] < 0.9 * loss[0]
    assert reader.get_layer("qa_outputs").kernel.dtype == "float32"


@pytest.mark.plain
def test_a_head_alone_of_token_ids_and_beside_overlap(make):
    ids = np.array([[5, 6, 7, 8], [9, 8, 7, 5]])
    model = compiled(make())
    loss = model.fit_head(ids, np.array([[1, 2], [0, 3]]), epochs=20, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    model = compiled(make(question_overlap=True))
    before = keras.ops.convert_to_numpy(model.get_layer("question_overlap").kernel)
    model.fit_head(ROWS, verbose=0)
    assert np.abs(keras.ops.convert_to_numpy(model.get_layer("question_overlap").kernel) - before).max() > 1e-3
    assert len(model.trainable_weights) == 3


@pytest.mark.plain
def test_the_head_alone_and_adapters_are_trained(make):
    model = make()
    model.freeze_base()
    assert [weight.path for weight in model.trainable_weights] == ["qa_outputs/kernel", "qa_outputs/bias"]
    compiled(model).fit(ROWS, verbose=0)
    model.unfreeze_base()
    model.enable_lora(rank=2)
    before = keras.ops.convert_to_numpy(model.backbone.token_embedding.embeddings)
    compiled(model).fit(ROWS, verbose=0)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.backbone.token_embedding.embeddings), before)


@pytest.mark.plain
def test_memory_is_that_of_a_classifier(make, tokenizer):
    model = make()
    classifier = keras_llama.LlamaTextClassifier(model.backbone, num_classes=2)
    found, like = (keras_llama.estimate_memory(task, 8, 64).peak for task in (model, classifier))
    assert found == pytest.approx(like, rel=0.01)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Seine!", ["seine"], 100, 100),
        ("in the river Seine", ["the Seine", "river Seine"], 0, 80),
        ("red red", ["red"], 0, 200 / 3),
        ("", [], 100, 100),
        ("", "red", 0, 0),
        ("red", [""], 0, 0),
        ("1949年10月", ["1949年"], 0, 200 * 2 / 6),  # 1949 年 10 月 against 1949 年
        ("《狂人日记》", ["狂人日记"], 100, 100),
        ("上海北京", ["北京上海"], 0, 50),  # the longest run that both share, not all characters
        ("BBC电视台", ["bbc 电视台"], 0, 100),  # spaces count in the exact match alone
        ("5%的人", ["5的人"], 0, 200 * 2 / 7),  # of marks only those that its script lists are left out
        ("（10-20天）", ["1020天"], 100, 100),  # and they part no words
        ("约3.5米", ["3.5米"], 0, 80),
        ("1949年", [""], 0, 0),
    ],
)
def test_scores(answer, references, exact, f1):
    assert answer_scores([answer], [references]) == pytest.approx({"exact_match": exact, "f1": f1})


@pytest.mark.plain
def test_scores_are_means_and_need_a_reference_each():
    found = answer_scores(["red", "blue"], ["red", ["green"]])
    assert found == {"exact_match": 50, "f1": 50}
    with pytest.raises(ValueError, match="references for each answer"):
        answer_scores(["red"], [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "jit"),
    [
        ("texts", {}, True),
        ("texts", {"causal": True, "stride": 0}, False),
        ("chat_tokenizer", {"no_answer_threshold": -1.0}, False),
        ("chat_tokenizer", {"max_answer_length": 7}, False),
        ("chat_tokenizer", {"max_answer_length": 2}, False),  # less than a character that is spelled in bytes
    ],
)
def test_the_export_gives_the_same_answers(make, request, tmp_path, kind, options, jit):
    import tensorflow as tf

    model = make(length=40, tokenizer=request.getfixturevalue(kind), **{"max_answer_length": 5, **options})
    generator = np.random.default_rng(2)
    for variable in model.variables:
        variable.assign(variable + generator.normal(0, 0.3, variable.shape))
    asked = ["Who sat?", "长江发源于哪里？", "Where? " * 30, "x"], [CAT, "A cat.", CAT * 20, "\u3000x \n"]
    asked[0].extend(["哪里？"] * 5)
    asked[1].extend([RIVER, RIVER[5:], RIVER * 3, "\u3000东\u3000海\u3000", "海"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*questions were cut")
        expected = model.answer(*asked)
    model.export(tmp_path / "model", jit=jit)
    served = tf.saved_model.load(str(tmp_path / "model")).signatures["serving_default"]
    found = served(**{name: tf.constant(x) for name, x in zip(("questions", "contexts"), asked, strict=True)})
    assert [text.decode() for text in found["texts"].numpy()] == [answer["text"] for answer in expected]
    np.testing.assert_allclose(found["scores"], [answer["score"] for answer in expected], atol=1e-5)
    for nothing in ([], [""]):
        none = served(questions=tf.constant(nothing, tf.string), contexts=tf.constant(nothing, tf.string))
        assert none["texts"].shape == len(nothing)


def test_tokens_that_the_question_has_are_told(make):
    model = make(question_overlap=True)
    tokenizer = model.preprocessor.tokenizer
    question, context = tokenizer.encode(["Who sat on the mat?", "The cat sat on the mat."])
    end = model.question_overlap
    layer = next(layer for layer in model.layers if layer.name == "question_overlap")
    begin = [*model.preprocessor.begin]
    ids = np.array([[*begin, *question, end, *context, end]])
    found = keras.ops.convert_to_numpy(layer.matches(ids))[0]
    first = len(begin) + len(question) + 1
    assert found[: first - 1, 0].all()
    assert not found[first - 1 :, 0].any()
    assert not found[: first - 1, 1:].any()
    asked = set(question)
    runs = {tuple(question[i : i + 2]) for i in range(len(question) - 1)}
    for i, token in enumerate(context):
        assert found[first + i, 1] == (token in asked)
        pairs = [tuple(context[i - 1 : i + 1]) if i else None, tuple(context[i : i + 2])]
        assert found[first + i, 2] == any(pair in runs for pair in pairs)
    assert found[:, 3].any()


@pytest.mark.plain
def test_overlap_is_saved_and_learned(make, tmp_path):
    rows = [{"question": "Who sat on the mat?", "context": CAT, "answers": ["The cat"]}]
    model = make(question_overlap=True)
    model.compile(keras.optimizers.SGD(0.1))  # no decay: what changes has a gradient
    before = keras.ops.convert_to_numpy(model.get_layer("question_overlap").kernel)
    model.fit(rows * 4, epochs=2, verbose=0)
    changed = keras.ops.convert_to_numpy(model.get_layer("question_overlap").kernel) != before
    assert changed.any(axis=1).all()
    expected = model.answer("Who sat?", CAT)
    model.save(tmp_path / "reader.keras")
    assert keras.saving.load_model(tmp_path / "reader.keras").answer("Who sat?", CAT) == expected
    model.save_to_preset(tmp_path / "preset")
    assert keras_llama.LlamaQuestionAnswering.from_preset(tmp_path / "preset").answer("Who sat?", CAT) == expected


@pytest.mark.plain
def test_overlap_is_new_on_a_language_model(make, tmp_path, capsys):
    model = make(causal=True)
    keras_llama.LlamaCausalLM(model.backbone, model.preprocessor).save_to_preset(tmp_path)
    keras_llama.LlamaQuestionAnswering.from_preset(tmp_path)
    assert "question_overlap" not in capsys.readouterr().out
    reader = keras_llama.LlamaQuestionAnswering.from_preset(tmp_path, question_overlap=True)
    assert "has no qa_outputs.bias, qa_outputs.weight, question_overlap.weight: drawn" in capsys.readouterr().out
    assert keras.ops.convert_to_numpy(reader.get_layer("question_overlap").kernel).any()


@pytest.mark.plain
def test_overlap_is_trained_with_the_head(make, tmp_path):
    make(question_overlap=True).save_to_preset(tmp_path / "base")
    model, again = (
        keras_llama.LlamaQuestionAnswering.from_preset(tmp_path / "base", dtype="mixed_bfloat16") for _ in range(2)
    )
    head = ["question_overlap/kernel", "qa_outputs/kernel", "qa_outputs/bias"]
    model.freeze_base()
    assert sorted(weight.path for weight in model.trainable_weights) == sorted(head)
    model.unfreeze_base()
    model.enable_lora(rank=2)
    before = model.get_layer("question_overlap").kernel.numpy()
    compiled(model).fit(ROWS, verbose=0)
    assert np.abs(model.get_layer("question_overlap").kernel.numpy() - before).max() > 1e-3
    keras_llama.save_checkpoint(model, tmp_path / "adapter", format="peft")
    again.load_adapter(tmp_path / "adapter")
    found, expected = (task.predict(np.array([[5, 6, 2, 5, 6]]), verbose=0) for task in (again, model))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.plain
@pytest.mark.parametrize("overlap", [True, None, -1, 50, 2.0, "2"])
def test_overlap_without_a_separator_is_refused(overlap):
    backbone = keras_llama.LlamaBackbone(vocabulary_size=50, **keras_llama.size("tiny"))
    with pytest.raises(ValueError, match="or the id of the token") as error:
        keras_llama.LlamaQuestionAnswering(backbone, question_overlap=overlap)
    assert repr(overlap) in str(error.value)
