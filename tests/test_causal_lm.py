"""LlamaCausalLM: the loss is the mean over real tokens, whatever the padding; perplexity is exact."""

import keras
import numpy as np
import pytest
import reference
from keras import ops

import keras_llama
from keras_llama.losses import TokenCrossentropy
from keras_llama.preprocessing import next_token_targets


def inputs_of(rows, pad_to, side="right"):
    ids, mask = np.full((len(rows), pad_to), 9, "int32"), np.zeros((len(rows), pad_to), "int32")
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(pad_to - len(row), pad_to)
        ids[i, place], mask[i, place] = row, 1
    return {"token_ids": ids, "padding_mask": mask}


def loss_and_gradients(model, inputs):
    targets, weights = next_token_targets(**inputs)
    return reference.gradients(model, inputs, lambda logits: TokenCrossentropy()(targets, logits, weights))


@pytest.fixture
def rows(rng):
    return [rng.integers(1, 60, n) for n in (3, 11, 7, 2)]


def assert_same(one, other, tolerance=1e-5):
    assert abs(one[0] - other[0]) <= tolerance
    assert max(np.abs(one[1][path] - other[1][path]).max() for path in one[1]) <= tolerance


@pytest.mark.parametrize("tied", [True, False])
def test_padding_changes_neither_loss_nor_gradient(make_backbone, rows, tied):
    model = keras_llama.LlamaCausalLM(make_backbone(tie_word_embeddings=tied))
    tight = loss_and_gradients(model, inputs_of(rows, 11))
    assert_same(tight, loss_and_gradients(model, inputs_of(rows, 60)))
    assert_same(tight, loss_and_gradients(model, inputs_of(rows, 16, "left")))


def test_loss_is_the_mean_over_the_tokens_of_all_rows(make_backbone, rows):
    """Row losses weighted by their tokens, not each row alike."""
    model = keras_llama.LlamaCausalLM(make_backbone())
    batch = loss_and_gradients(model, inputs_of(rows, 11))
    alone = [(len(row) - 1, loss_and_gradients(model, inputs_of([row], len(row)))) for row in rows]
    tokens = sum(n for n, _ in alone)
    mean = (
        sum(n * value for n, (value, _) in alone) / tokens,
        {path: sum(n * found[path] for n, (_, found) in alone) / tokens for path in batch[1]},
    )
    assert_same(batch, mean)


def test_packed_rows_have_the_loss_of_the_rows(make_backbone, rows):
    model = keras_llama.LlamaCausalLM(make_backbone())
    packed = {
        "token_ids": np.concatenate(rows)[None].astype("int32"),
        "padding_mask": np.concatenate([np.full(len(row), i + 1) for i, row in enumerate(rows)])[None].astype("int32"),
    }
    assert_same(loss_and_gradients(model, packed), loss_and_gradients(model, inputs_of(rows, 11)))


def test_a_prompt_of_padding_alone_has_no_loss(make_backbone):
    model = keras_llama.LlamaCausalLM(make_backbone())
    value, found = loss_and_gradients(model, inputs_of([[]], 4))
    assert value == 0
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_exact_over_ragged_batches(make_backbone, rows, batch_size):
    model = keras_llama.LlamaCausalLM(make_backbone())
    model.compile()
    expected, _ = loss_and_gradients(model, inputs_of(rows, 11))
    found = model.evaluate(inputs_of(rows, 24), batch_size=batch_size, return_dict=True, verbose=0)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    logits = model.predict(inputs_of(rows, 11), verbose=0)
    targets, weights = next_token_targets(**inputs_of(rows, 11))
    hits = (logits.argmax(-1) == targets)[weights > 0]
    assert found["accuracy"] == pytest.approx(hits.mean(), rel=1e-6)


@pytest.mark.plain
def test_fit_learns_and_loss_by_name_is_the_same_loss(make_backbone):
    ids = np.tile(np.arange(1, 9), (8, 2))
    values = []
    for loss in ("auto", "sparse_categorical_crossentropy"):
        keras.utils.set_random_seed(0)
        model = keras_llama.LlamaCausalLM(make_backbone())
        model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
        values.append(model.fit(ids, batch_size=2, epochs=20, verbose=0).history)
    assert values[0]["loss"] == values[1]["loss"]
    assert values[0]["perplexity"][-1] < 1.5 < values[0]["perplexity"][0]


@pytest.mark.plain
def test_fits_raw_strings(tokenizer):
    backbone = keras_llama.LlamaBackbone(vocabulary_size=tokenizer.vocabulary_size, **keras_llama.size("tiny"))
    model = keras_llama.LlamaCausalLM(backbone, keras_llama.TextPreprocessor(tokenizer, 32, add_eos=True))
    model.compile()
    texts = ["a good film", "很差的电影", "what a film it is"] * 4
    history = model.fit(texts, epochs=10, batch_size=4, validation_data=(texts[:3],), verbose=0).history
    assert history["val_perplexity"][-1] < 0.2 * history["val_perplexity"][0]
    assert model.predict(texts, verbose=0).shape[0] == 12


def test_logits_are_float32_and_the_loss_too_under_any_policy(make_backbone):
    for policy in ("bfloat16", "mixed_bfloat16", "mixed_float16"):
        model = keras_llama.LlamaCausalLM(make_backbone(dtype=policy))
        logits = model(inputs_of([[5, 6, 7]], 3))
        assert keras.backend.standardize_dtype(logits.dtype) == "float32"
        value = TokenCrossentropy()(np.array([[6, 7, 1]]), ops.cast(logits, "bfloat16"), np.ones((1, 3)))
        assert keras.backend.standardize_dtype(value.dtype) == "float32"


@pytest.mark.plain
def test_refuses_a_bidirectional_backbone(make_backbone):
    with pytest.raises(ValueError, match="`backbone` must be causal"):
        keras_llama.LlamaCausalLM(make_backbone(causal=False))


@pytest.mark.plain
def test_refuses_targets(make_backbone):
    model = keras_llama.LlamaCausalLM(make_backbone())
    model.compile()
    with pytest.raises(ValueError, match="`y` must be None"):
        model.fit(np.ones((2, 4), int), np.ones((2, 4), int))


BAD_IDS = {
    "an id beyond the vocabulary": (np.array([[1, 60]]), "from 0 to 59.*largest=60"),
    "a negative id": (np.array([[1, -1]]), "smallest=-1"),
    "floats": (np.ones((2, 3)), "int array"),
    "one dimension": (np.ones(3, int), r"\(B, T\)"),
    "no rows": (np.ones((0, 3), int), "not empty"),
    "ragged rows": ([[1, 2], [3]], "Pad its rows"),
    "strings": (["a"], "preprocessor"),
    "another key": ({"ids": np.ones((1, 2), int)}, "keys token_ids and padding_mask"),
    "another shape": ({"token_ids": np.ones((1, 2), int), "padding_mask": np.ones((1, 3), int)}, "the shape of"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_IDS)
def test_refuses_bad_token_ids_before_any_step(make_backbone, case):
    model = keras_llama.LlamaCausalLM(make_backbone())
    model.compile()
    ids, message = BAD_IDS[case]
    for call in (model.fit, model.evaluate, model.predict):
        with pytest.raises(ValueError, match=message):
            call(ids)


@pytest.mark.plain
def test_texts_longer_than_the_context_are_refused(make_backbone, tokenizer):
    ids = np.ones((2, 9), int)
    backbone = make_backbone(context_length=8, vocabulary_size=300)
    texts = keras_llama.TextPreprocessor(tokenizer, 16)
    lm = keras_llama.LlamaCausalLM(backbone, texts)
    models = [(lm, None), (keras_llama.LlamaTextClassifier(backbone, 2, preprocessor=texts), [0, 1])]
    for model, targets in models:
        model.compile()
        before = [ops.convert_to_numpy(weight) for weight in model.weights]
        for x, longest in ((ids, 9), (["a good film", "what a film it is a good film"], 11)):
            message = rf"`x` must hold texts of at most 8 tokens.*Received: longest={longest}\b"
            for call in (lambda x, y=targets, model=model: model.fit(x, y), model.predict):
                with pytest.raises(ValueError, match=message):
                    call(x)
        for weight, old in zip(model.weights, before, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(weight), old)

    class Source(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return (["what a film it is a good film"],)

    with pytest.raises(ValueError, match="at most 8 tokens"):
        lm.fit(Source(), verbose=0)
    packed = {"token_ids": ids, "padding_mask": np.array([[1] * 8 + [2], [1] * 4 + [2] * 4 + [0]])}
    assert lm.predict(packed, verbose=0).shape == (2, 9, 300)
    size = {**keras_llama.size("tiny"), "num_layers": 1, "context_length": 8}
    translator = keras_llama.LlamaSeq2SeqLM(keras_llama.LlamaSeq2SeqBackbone(vocabulary_size=300, **size))
    with pytest.raises(ValueError, match="at most 8 tokens"):
        translator.predict({"encoder_token_ids": ids[:, :3], "decoder_token_ids": ids}, verbose=0)


@pytest.mark.plain
def test_fit_without_compile_says_so(make_backbone):
    with pytest.raises(ValueError, match="compile"):
        keras_llama.LlamaCausalLM(make_backbone()).fit(np.ones((2, 4), int), verbose=0)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the others build the optimiser themselves")
def test_an_optimiser_may_have_nothing_to_train(make_backbone):
    model = keras_llama.LlamaCausalLM(make_backbone())
    model.compile("adam")
    model.trainable = False
    with pytest.warns(UserWarning, match="does not have any trainable"):
        model.fit(np.ones((2, 4), int), verbose=0)
