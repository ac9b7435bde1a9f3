"""Several texts in a row: the same losses and gradients as each in its own, and next to no padding."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama.batches import pack

TEXTS = ["a good film", "a bad film it is", "很好的电影", "what", "what a film it is what a film", "很差", "a"]
SMALL = {**keras_llama.size("tiny"), "num_layers": 1}


def language_model(tokenizer, **options):
    backbone = keras_llama.LlamaBackbone(vocabulary_size=300, **SMALL)
    return keras_llama.LlamaCausalLM(backbone, keras_llama.TextPreprocessor(tokenizer, 24, add_eos=True))


def translator(tokenizer):
    backbone = keras_llama.LlamaSeq2SeqBackbone(vocabulary_size=300, **SMALL)
    return keras_llama.LlamaSeq2SeqLM(backbone, keras_llama.TextPreprocessor(tokenizer, 24))


def one_step(make, tokenizer, *data, **options):
    """Results of one step of gradient descent over all texts, and by how much each weight moved."""
    keras.utils.set_random_seed(0)
    model = make(tokenizer)
    start = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(1.0))
    history = model.fit(*data, batch_size=100, verbose=0, **options).history
    moved = [ops.convert_to_numpy(v) - old for v, old in zip(model.trainable_variables, start, strict=True)]
    return {name: values[0] for name, values in history.items()}, moved


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (language_model, (TEXTS,)),
        pytest.param(
            language_model, ([{"prompt": text, "response": " it is"} for text in TEXTS],), marks=pytest.mark.plain
        ),
        pytest.param(translator, (TEXTS, TEXTS[::-1]), marks=pytest.mark.plain),
    ],
    ids=["texts", "dialogues", "pairs"],
)
def test_packed_rows_train_as_their_texts_do(tokenizer, make, data):
    packed, by_packed = one_step(make, tokenizer, *data, packing=True)
    alone, by_alone = one_step(make, tokenizer, *data)
    assert packed == pytest.approx(alone, rel=1e-5)
    for one, other in zip(by_packed, by_alone, strict=True):
        assert np.abs(other).max() > 1e-6
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.plain
def test_each_text_stands_in_one_row_and_little_is_padded(rng):
    texts = [rng.integers(1, 99, n) for n in rng.integers(1, 30, 500)]
    packed = pack({"token_ids": texts, "trained": [row % 2 for row in texts]}, ("",), 64)
    found = []
    for ids, trained, segments in zip(*packed.values(), strict=True):
        assert len(ids) == len(segments) <= 64
        assert (trained == ids % 2).all()
        found += [tuple(ids[segments == n]) for n in range(1, segments.max() + 1)]
    assert sorted(found) == sorted(map(tuple, texts))
    assert sum(map(len, texts)) > 0.97 * 64 * len(packed["token_ids"])


@pytest.mark.plain
def test_both_sides_fit_and_belong_together(rng):
    sizes = rng.integers(1, 30, (300, 2))
    columns = {f"{side}token_ids": [np.full(n, i) for i, n in enumerate(sizes[:, k])] for k, side in enumerate("ab")}
    packed = pack(columns, ("a", "b"), 32)
    for a, b, a_mask, b_mask in zip(*packed.values(), strict=True):
        assert max(len(a), len(b)) <= 32
        assert [a[a_mask == n][0] for n in np.unique(a_mask)] == [b[b_mask == n][0] for n in np.unique(b_mask)]


@pytest.mark.plain
def test_a_dataset_is_packed_batch_by_batch(tokenizer):
    class Dataset(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return (TEXTS[index::2],)

    model = language_model(tokenizer)
    model.compile()
    finish, seen = model.finish_batch, []

    def watched(inputs, *rest):
        seen.append(inputs["padding_mask"].max())
        return finish(inputs, *rest)

    model.finish_batch = watched
    history = model.fit(Dataset(), validation_data=(TEXTS,), packing=True, verbose=0).history
    assert np.isfinite(history["val_loss"]).all()
    assert min(seen) > 1


@pytest.mark.plain
def test_what_cannot_be_packed_is_refused(tokenizer):
    model = language_model(tokenizer)
    model.compile()
    with pytest.raises(ValueError, match="`sample_weight` must be None with `packing`"):
        model.fit(TEXTS, sample_weight=np.ones(len(TEXTS)), packing=True)

    class Weighted(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return TEXTS, None, np.ones(len(TEXTS))

    with pytest.raises(ValueError, match="`sample_weight` must be None with `packing`"):
        model.fit(Weighted(), packing=True)
    with pytest.raises(ValueError, match="`packing` needs a language model and strings"):
        model.fit(np.ones((2, 3), int), packing=True)
    classifier = keras_llama.LlamaTextClassifier(model.backbone, num_classes=2, preprocessor=model.preprocessor)
    classifier.compile()
    with pytest.raises(ValueError, match=r"`packing` needs a language model and strings.*Received: packing=True"):
        classifier.fit(TEXTS, [0, 1, 0, 1, 0, 1, 0], packing=True)
