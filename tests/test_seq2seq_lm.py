"""The translator: training on strings, its loss, greedy and beam decoding, files, the SavedModel, what it refuses."""

import keras
import numpy as np
import pytest
import sacrebleu
from keras import ops

import keras_llama
from keras_llama.losses import TokenCrossentropy

SOURCES = ["good day", "bad day", "a good film", "what a day it is"] * 3
TARGETS = ["好日子", "坏日子", "好的电影", "多好的日子"] * 3
ON_TENSORFLOW = keras.config.backend() == "tensorflow"


@pytest.fixture(scope="module")
def tokenizer():
    return keras_llama.SentencePieceTokenizer.train(SOURCES + TARGETS, vocabulary_size=290)


def make(tokenizer, seed=0, sequence_length=40, **options):
    keras.utils.set_random_seed(seed)
    backbone = keras_llama.LlamaSeq2SeqBackbone(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=32,
        intermediate_dim=64,
        tie_word_embeddings=options.pop("tied", True),
    )
    return keras_llama.LlamaSeq2SeqLM(
        backbone, keras_llama.TextPreprocessor(tokenizer, sequence_length, add_eos=True), **options
    )


@pytest.fixture(scope="module")
def trained(tokenizer):
    model = make(tokenizer, label_smoothing=0.1)
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(SOURCES, TARGETS, epochs=100, batch_size=12, verbose=0)
    return model


@pytest.fixture(scope="module")
def random(tokenizer):
    """Weights large enough that beams part."""
    model = make(tokenizer)
    generator = np.random.default_rng(2)
    for variable in model.weights:
        variable.assign(generator.normal(0, 0.4, variable.shape) + ("norm" in variable.path))
    return model


def test_learns_pairs_of_strings_and_gives_them_back(trained):
    assert trained.generate(SOURCES[:4]) == TARGETS[:4]
    assert trained.generate(SOURCES[:4], num_beams=3) == TARGETS[:4]
    assert trained.generate(SOURCES[0]) == TARGETS[0]
    assert trained.generate(np.array(SOURCES[:2])) == TARGETS[:2]
    found = trained.evaluate(SOURCES, TARGETS, verbose=0, return_dict=True)
    assert found["accuracy"] == 1
    assert found["perplexity"] < 1.3 < found["loss"] + 1  # smoothing keeps the loss up, not the perplexity


def test_a_batch_gives_what_each_source_alone_gives(random):
    sources = ["good", "what a day it is", "bad film 好", "a"]
    for options in ({}, {"num_beams": 3}, {"temperature": 1.0, "top_k": 20}):
        whole = random.generate(sources, 8, seed=3, stop=None, **options)
        if "temperature" not in options:  # a row's random numbers are those of its number in the call
            assert [random.generate(source, 8, seed=3, stop=None, **options) for source in sources] == whole
        assert random.generate(sources, 8, seed=3, stop=None, batch_size=2, **options) == whole
    assert len(set(whole)) > 1


def best_by_search(model, source, width, steps, length_penalty, ends):
    """Beam search without a cache and without batches, from its definition, on one source."""
    ids = model.preprocessor.encode([source])[0].tolist()
    running, finished = [((model.start_id,), 0.0)], []
    for _ in range(steps):
        inputs = {"encoder_token_ids": [ids] * len(running), "decoder_token_ids": [list(b) for b, _ in running]}
        inputs = {name: np.array(value, "int32") for name, value in inputs.items()}
        masks = {name.replace("token_ids", "padding_mask"): np.ones_like(value) for name, value in inputs.items()}
        scores = ops.convert_to_numpy(ops.log_softmax(model({**inputs, **masks})[:, -1]))
        found = [
            ((*beam, token), total + float(row[token]))
            for (beam, total), row in zip(running, scores, strict=True)
            for token in range(len(row))
        ]
        found = sorted(found, key=lambda pair: -pair[1])[: 2 * width]
        finished += [(b, s) for b, s in found[:width] if b[-1] in ends]
        running = [(b, s) for b, s in found if b[-1] not in ends][:width]
    return max([*finished, *running], key=lambda pair: pair[1] / (len(pair[0]) - 1) ** length_penalty)[0][1:]


def test_beams_are_those_of_the_definition(random):
    ids = random.preprocessor.encode(["what a film"])[0]
    ends = list(range(0, 290, 5))  # so many that beams end at every length
    lengths = set()
    for penalty in (-1.0, 0.3, 1.0, 2.0):
        found = random.generate([ids.tolist()], 5, num_beams=3, length_penalty=penalty, stop_token_ids=ends)
        row = found["token_ids"][0][found["padding_mask"][0] > 0].tolist()
        assert row == list(best_by_search(random, "what a film", 3, 5, penalty, ends))
        lengths.add(len(row))
    assert len(lengths) > 1


def test_a_stream_joined_is_the_text(trained):
    assert "".join(trained.generate(SOURCES[3], stream=True)) == TARGETS[3]
    pieces = list(trained.generate(SOURCES[:2], stream=2))
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == TARGETS[:2]


def test_token_ids_in_and_out(trained):
    text = trained.preprocessor
    rows = [row.tolist() for row in text.encode(SOURCES[:2])]
    found = trained.generate(rows)
    written = [ids[mask > 0].tolist() for ids, mask in zip(*found.values(), strict=True)]
    assert text.tokenizer.decode(written) == TARGETS[:2]
    ids = keras_llama.LlamaSeq2SeqLM(trained.backbone, generation_config={"decoder_start_token_id": 1})
    assert np.array_equal(ids.generate(rows, 5, stop_token_ids=[2])["token_ids"], found["token_ids"][:, :5])


def pairs(*lengths, pad=0):
    """Token ids of pairs (source length, target length), padded by `pad` columns more than is needed."""
    rng = np.random.default_rng(0)
    arrays = {}
    for side, at in (("encoder", 0), ("decoder", 1)):
        widest = max(pair[at] for pair in lengths) + pad
        ids, mask = np.zeros((2, len(lengths), widest), "int32")
        for i, pair in enumerate(lengths):
            mask[i, : pair[at]] = 1
        ids[:] = rng.integers(5, 60, (len(lengths), 99))[:, :widest] * mask
        arrays |= {f"{side}_token_ids": ids, f"{side}_padding_mask": mask}
    return arrays


def test_the_loss_is_the_mean_over_real_target_tokens(tokenizer):
    model = make(tokenizer)
    model.compile(weighted_metrics=["accuracy"])
    tight = model.evaluate(pairs((3, 4), (5, 9)), batch_size=2, verbose=0, return_dict=True)
    wide = model.evaluate(pairs((3, 4), (5, 9), pad=7), batch_size=2, verbose=0, return_dict=True)
    assert wide == pytest.approx(tight, rel=1e-5)
    both = pairs((3, 4), (5, 9))
    rows = [model.evaluate({k: v[i : i + 1] for k, v in both.items()}, verbose=0, return_dict=True) for i in (0, 1)]
    assert tight["loss"] == pytest.approx((3 * rows[0]["loss"] + 8 * rows[1]["loss"]) / 11, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_cross_entropy_with_smoothed_targets(rng, smoothing):
    logits, ids = rng.normal(size=(2, 3, 7)).astype("float32"), rng.integers(0, 7, (2, 3))
    weights = np.array([[1, 1, 0], [1, 0, 0]], "float32")
    smooth = np.eye(7)[ids] * (1 - smoothing) + smoothing / 7
    entropy = -(smooth * ops.convert_to_numpy(ops.log_softmax(logits))).sum(-1)
    found = float(TokenCrossentropy(smoothing)(ids, logits, weights))
    assert found == pytest.approx((entropy * weights).sum() / weights.sum(), rel=1e-5)


@pytest.mark.plain
def test_streams_of_pairs_and_held_out_rows(tokenizer):
    class Pairs(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return SOURCES[4 * i : 4 * i + 4], TARGETS[4 * i : 4 * i + 4]

    model = make(tokenizer)
    model.compile(keras.optimizers.Adam(1e-2))
    history = model.fit(Pairs(), epochs=3, validation_data=(SOURCES[:4], TARGETS[:4]), verbose=0).history
    assert history["val_loss"][-1] < history["val_loss"][0]
    model.fit(SOURCES, TARGETS, validation_split=0.25, epochs=1, verbose=0)
    logits = model.predict({"source": SOURCES[:2], "target": TARGETS[:2]}, verbose=0)
    assert logits.shape[::2] == (2, tokenizer.vocabulary_size)


def test_alignment_is_a_distribution_over_the_source(trained):
    source, target, weights = trained.alignment(SOURCES[0], TARGETS[0])
    assert source[0] == "<s>"
    assert target[-1] == "</s>"
    assert weights.shape == (1, 2, len(target), len(source))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.plain)])
def test_files_bring_it_back(tokenizer, tmp_path, tied):
    model = make(tokenizer, tied=tied, label_smoothing=0.2)
    model.compile()
    model.fit(SOURCES, TARGETS, epochs=2, verbose=0)
    columns = {"source": SOURCES[:3], "target": TARGETS[:3]}
    rows = [row.tolist() for row in model.preprocessor.encode(SOURCES[:2])]
    expected = model.predict(columns, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    for again in (
        keras.saving.load_model(tmp_path / "model.keras"),
        keras_llama.LlamaSeq2SeqLM.from_preset(tmp_path / "preset"),
    ):
        assert np.array_equal(again.predict(columns, verbose=0), expected)
        assert again.label_smoothing == 0.2
        assert np.array_equal(again.generate(rows)["token_ids"], model.generate(rows)["token_ids"])
    backbone = keras_llama.LlamaSeq2SeqBackbone.from_preset(tmp_path / "preset")
    assert backbone.count_params() == model.backbone.count_params()
    for cls in (keras_llama.LlamaCausalLM, keras_llama.LlamaBackbone):
        with pytest.raises(ValueError, match="expected a checkpoint of a LlamaBackbone"):
            cls.from_preset(tmp_path / "preset")
    with pytest.raises(ValueError, match="know no encoder"):
        keras_llama.save_checkpoint(model, tmp_path / "other")


@pytest.mark.plain
@pytest.mark.parametrize("tied", [True, False])
def test_starts_from_a_language_model(chat_lm, make_backbone, tied):
    backbone = make_backbone(vocabulary_size=chat_lm.backbone.config.vocabulary_size, tie_word_embeddings=tied)
    lm = keras_llama.LlamaCausalLM(backbone, chat_lm.preprocessor)
    model = keras_llama.LlamaSeq2SeqLM.from_decoder(lm, sequence_length=24, dropout=0.1)
    assert model.preprocessor.sequence_length == 24
    assert model.start_id == chat_lm.preprocessor.tokenizer.eos_id  # this vocabulary has no begin of text
    if not tied:
        head = next(v for v in model.weights if v.path.startswith("lm_head"))
        theirs = next(v for v in lm.weights if v.path.startswith("lm_head"))
        assert np.array_equal(ops.convert_to_numpy(head.value), ops.convert_to_numpy(theirs.value))
    model.compile(keras.optimizers.Adam(1e-2))
    losses = model.fit(SOURCES, TARGETS, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="must be a LlamaCausalLM"):
        keras_llama.LlamaSeq2SeqLM.from_decoder(backbone)
    with pytest.raises(ValueError, match="must be a LlamaSeq2SeqBackbone"):
        keras_llama.LlamaSeq2SeqLM(backbone)


@pytest.mark.plain
@pytest.mark.parametrize("targets", ["cross_attention/", "all-linear"])
def test_an_adapter_beside_both_halves(tokenizer, tmp_path, targets):
    """Trained, saved, written and read again, merged: the frozen base and the same numbers each time."""
    model, again = make(tokenizer), make(tokenizer)
    inputs = {"source": SOURCES[:4], "target": TARGETS[:4]}
    base = model.predict(inputs, verbose=0)
    frozen = [ops.convert_to_numpy(weight) for weight in model.weights]
    model.enable_lora(rank=2, targets=targets)
    assert len(model.trainable_weights) == 2 * {"cross_attention/": 4, "all-linear": 7 + 7 + 4}[targets]
    model.compile(keras.optimizers.Adam(5e-2))
    losses = model.fit(SOURCES, TARGETS, epochs=6, batch_size=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.1
    kept = [ops.convert_to_numpy(weight) for weight in model.weights if not weight.trainable]
    for before, after in zip(frozen, kept, strict=True):
        np.testing.assert_array_equal(before, after)
    adapted = model.predict(inputs, verbose=0)
    assert np.abs(adapted - base).max() > 0.05
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(inputs, verbose=0), adapted)
    keras_llama.save_checkpoint(model, tmp_path / "adapter", format="peft")
    again.load_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(again.predict(inputs, verbose=0), adapted, atol=1e-5)
    model.merge_lora()
    np.testing.assert_allclose(model.predict(inputs, verbose=0), adapted, atol=1e-4)


@pytest.mark.plain
@pytest.mark.parametrize("jit", [False, True])
def test_batches_are_padded_no_more_than_need_be(trained, jit):
    trained.compile(jit_compile=jit)
    lengths = set()
    for inputs, _, _ in trained._dataset(SOURCES, TARGETS, batch_size=4):
        mask = ops.convert_to_numpy(inputs["encoder_padding_mask"])
        lengths.add(mask.shape[1])
        assert jit or mask.sum(1).max() == mask.shape[1]
    assert not jit or lengths <= {8, 16, 24, 32}


@pytest.mark.plain
def test_text_that_the_vocabulary_has_never_seen(trained):
    assert isinstance(trained.generate("Привет, мир", 8), str)
    assert all(isinstance(text, str) for text in trained.generate(["नमस्ते", "😀"], 8, num_beams=2))


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # torch's, inside `fit`
def test_a_long_pair_is_cut_with_a_counted_warning(tokenizer):
    model = make(tokenizer, sequence_length=8)
    model.compile()
    with pytest.warns(UserWarning, match="1 of 12 texts are longer than sequence_length=8"):
        model.fit(["day " * 20, *["day"] * 11], ["好"] * 12, verbose=0)
    with pytest.raises(ValueError, match=r"`sources` must have at most sequence_length=8.*truncate=True"):
        model.generate("day " * 20)
    assert isinstance(model.generate("day " * 20, truncate=True), str)


BAD_PAIRS = {
    "an empty source": (["a", ""], ["b", "c"], r"`source\[1\]` must not be empty"),
    "an empty target": (["a", "b"], ["c", ""], r"`target\[1\]` must not be empty"),
    "no target": (["a"], None, "A source needs a target"),
    "fewer targets": (["a", "b"], ["c"], "a target for each source"),
    "a number": (["a", "b"], ["c", 3], r"`target\[1\]` must be a string"),
    "another column": ({"source": ["a"], "goal": ["b"]}, None, "keys source and target"),
    "ids of one side": ({"encoder_token_ids": np.ones((1, 2), int)}, None, "must have the keys"),
    "sides of other lengths": (
        {"encoder_token_ids": np.ones((1, 2), int), "decoder_token_ids": np.ones((2, 2), int)},
        None,
        "as many rows on each side",
    ),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_PAIRS)
def test_refuses_bad_pairs(random, case):
    x, y, message = BAD_PAIRS[case]
    random.compile()
    with pytest.raises(ValueError, match=message):
        random.fit(x, y, verbose=0)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ("", {}, r"`sources\[0\]` must not be empty"),
        (["a", ""], {}, r"`sources\[1\]` must not be empty"),
        ([], {}, "at least one text"),
        ("a", {"num_beams": 0}, "`num_beams` must be"),
        ("a", {"length_penalty": "long"}, "`length_penalty` must be"),
        ("a", {"max_new_tokens": 0}, "`max_new_tokens` must be"),
        ("a", {"batch_size": 0}, "`batch_size` must be"),
        ("a", {"stream": -1}, "`stream` must be"),
        ([[5, 6]], {"stream": True}, "need sources that are strings"),
        ([[5] * 41], {}, "at most sequence_length=40"),
    ],
)
def test_refuses_bad_settings(random, sources, options, message):
    with pytest.raises(ValueError, match=message):
        random.generate(sources, **options)


@pytest.mark.plain
def test_refuses_bad_options(tokenizer):
    for smoothing in (-0.1, 1.0, "much"):
        with pytest.raises(ValueError, match="`label_smoothing` must"):
            make(tokenizer, label_smoothing=smoothing)
    model = keras_llama.LlamaSeq2SeqLM(make(tokenizer).backbone)
    with pytest.raises(ValueError, match="needs a token to begin with"):
        model.generate([[5, 6]], 4)


@pytest.mark.plain
def test_scores_are_those_of_sacrebleu():
    translations, references = ["我喜欢Tim茶，你呢？", "你好"], [["我喜欢Tom喝茶", "我爱茶，你呢？"], "你好"]
    scores = keras_llama.translation_scores(translations, references)
    columns = [["我喜欢Tom喝茶", "你好"], ["我爱茶，你呢？", None]]
    assert scores["bleu"] == sacrebleu.corpus_bleu(translations, columns, tokenize="zh").score
    assert scores["chrf"] == sacrebleu.corpus_chrf(translations, columns).score
    assert scores["bleu"] != sacrebleu.corpus_bleu(translations, columns[:1], tokenize="zh").score
    with pytest.raises(ValueError, match="`tokenize` must be one of"):
        keras_llama.TranslationScores(list, ["a"], ["a"], tokenize="chinese")
    assert keras_llama.translation_scores(["你好吗？"], ["你好吗？"])["bleu"] == pytest.approx(100)
    with pytest.raises(ValueError, match="at least one text for each translation"):
        keras_llama.translation_scores(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="`every`"):
        keras_llama.TranslationScores(list, ["a"], ["a"], every=0)


@pytest.mark.plain
def test_scores_are_metrics_of_an_epoch(trained, capsys):
    callback = keras_llama.TranslationScores(trained.generate, SOURCES[:4], TARGETS[:4], every=2, samples=1)
    trained.compile(keras.optimizers.SGD(0.0))
    history = trained.fit(SOURCES, TARGETS, epochs=2, callbacks=[callback], verbose=0).history
    assert history["val_bleu"] == [pytest.approx(100)]  # after the second epoch
    assert "good day  ->  好日子" in capsys.readouterr().out


@pytest.mark.plain
def test_there_may_be_as_many_beams_as_a_source_has_columns():
    """Then the mask of cross-attention is square, as one of self-attention is."""
    backbone = keras_llama.LlamaSeq2SeqBackbone(vocabulary_size=60, **keras_llama.size("tiny"))
    lm = keras_llama.LlamaSeq2SeqLM(backbone, generation_config={"decoder_start_token_id": 1})
    source = [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert lm.generate(source, 6, num_beams=8)["token_ids"].shape[0] == 1
