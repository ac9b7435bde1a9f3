"""Texts to batches: padding, truncation and its warning, buckets, order, and what is refused."""

import threading
import warnings
from collections import Counter

import keras
import numpy as np
import pytest

import keras_llama
from keras_llama.backend import bucket, stream
from keras_llama.batches import Batches, StreamedBatches
from keras_llama.preprocessing import check_texts, next_token_targets


@pytest.fixture
def preprocessor(tokenizer):
    return keras_llama.TextPreprocessor(tokenizer, sequence_length=20)


@pytest.mark.plain
def test_ids_mask_and_padding(preprocessor, tokenizer):
    found = preprocessor(["a film", "a good film it is"])
    for row, mask, ids in zip(["a film", "a good film it is"], found["padding_mask"], found["token_ids"], strict=True):
        expected = tokenizer.encode([row], add_bos=True)[0]
        assert ids[: len(expected)].tolist() == expected
        assert mask.tolist() == [1] * len(expected) + [0] * (len(mask) - len(expected))
        assert (ids[len(expected) :] == tokenizer.pad_id).all()


@pytest.mark.plain
def test_lengths_fall_into_few_buckets():
    lengths = [bucket(n) for n in range(1, 2000)]
    assert all(n <= length < 1.5 * n + 8 for n, length in enumerate(lengths, 1))
    assert len(set(lengths)) <= 17


@pytest.mark.plain
def test_truncation_is_counted_and_warned_of(tokenizer):
    preprocessor = keras_llama.TextPreprocessor(tokenizer, sequence_length=5, add_eos=True)
    texts = ["a", "qwxzqwxzqwxz", "a good film and more"]
    over = [len(row) - 5 for row in tokenizer.encode(texts, add_bos=True, add_eos=True)]
    total = sum(n for n in over if n > 0)
    with pytest.warns(UserWarning, match=rf"2 of 3 texts are longer than sequence_length=5.*; {total} tokens were cut"):
        rows = preprocessor.encode(texts)
    assert [len(row) for row in rows[1:]] == [5, 5]
    assert rows[1][0] == tokenizer.bos_id
    assert all(row[-1] == tokenizer.eos_id for row in rows)


@pytest.mark.plain
def test_a_vocabulary_without_an_end_adds_none_to_what_is_cut(tokenizer, monkeypatch):
    monkeypatch.setattr(keras_llama.SentencePieceTokenizer, "eos_id", -1)
    rows = keras_llama.TextPreprocessor(tokenizer, 5, add_eos=True).encode(["a good film " * 9], cut=Counter())
    assert len(rows[0]) == 5
    assert min(rows[0]) >= 0


@pytest.mark.plain
def test_nothing_is_warned_of_when_nothing_is_cut(preprocessor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocessor.encode(["a film"])


@pytest.mark.plain
@pytest.mark.parametrize("length", [0, 1, -3, 2.5, True, None])
def test_refuses_a_bad_sequence_length(tokenizer, length):
    with pytest.raises(ValueError, match="`sequence_length` must be an integer above 1"):
        keras_llama.TextPreprocessor(tokenizer, sequence_length=length)


BAD_TEXTS = {
    "a text": "must be a list",
    None: "must be a list or an array",
    7: "must be a list or an array",
    (): "at least one text",
    ("good", ""): r"`x\[1\]` must not be empty",
    ("good", None): r"`x\[1\]` must be a string. Received: text=None",
    (3.5,): r"`x\[0\]` must be a string. Received: text=3.5",
    (b"\xff",): r"`x\[0\]` must be UTF-8",
}


@pytest.mark.plain
@pytest.mark.parametrize("texts", BAD_TEXTS)
def test_refuses_what_is_no_text(texts):
    with pytest.raises(ValueError, match=BAD_TEXTS[texts]):
        check_texts(list(texts) if isinstance(texts, tuple) else texts)


@pytest.mark.plain
@pytest.mark.parametrize("texts", [("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], object), [b"a", "b"]])
def test_takes_lists_tuples_and_arrays(texts):
    assert check_texts(texts) == ["a", "b"]


def batches(shuffle_seed=None, rows=23):
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    data = Batches(
        lambda chosen: {"rows": chosen}, lengths, lambda x, y, w: (x, y), np.arange(rows), None, 4, shuffle_seed
    )
    return data, lengths


def rows_of(data):
    return np.concatenate([data[i][0]["rows"] for i in range(len(data))])


@pytest.mark.plain
@pytest.mark.parametrize("seed", [None, 5])
def test_every_row_comes_once_with_its_target(seed):
    data, _ = batches(seed)
    assert sorted(rows_of(data)) == list(range(23))
    assert all((data[i][0]["rows"] == data[i][1]).all() for i in range(len(data)))


@pytest.mark.plain
def test_without_shuffling_order_says_which_row_comes_where():
    data, lengths = batches()
    assert (rows_of(data) == data.order).all()
    assert (np.diff(lengths[data.order]) <= 0).all()


@pytest.mark.plain
def test_shuffling_depends_on_seed_and_epoch_only():
    first, again, other = batches(5)[0], batches(5)[0], batches(6)[0]
    before = rows_of(first)
    assert (before == rows_of(again)).all()
    assert (before != rows_of(other)).any()
    first.on_epoch_end()
    assert (rows_of(first) != before).any()
    again.on_epoch_end()
    assert (rows_of(first) == rows_of(again)).all()


@pytest.mark.plain
def test_a_first_look_at_the_data_is_no_epoch():
    """Keras takes a batch to build the model by and ends the epoch: the order must not move."""
    data, before = batches(5)[0], rows_of(batches(5)[0])
    data[0]
    data.on_epoch_end()
    assert (rows_of(data) == before).all()


@pytest.mark.plain
def test_shuffled_batches_hold_texts_of_like_length():
    data, lengths = batches(5, rows=400)
    spread = np.mean([np.ptp(lengths[data[i][0]["rows"]]) for i in range(len(data))])
    assert spread < 0.2 * np.ptp(lengths)


class Source(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return [f"text {index}"], [index]


@pytest.mark.plain
def test_streamed_batches_shuffle_and_count_each_batch_once():
    told = []
    data = StreamedBatches(Source(), lambda x, y, cut: cut.update(texts=1) or (x, y), told.append, shuffle_seed=1)
    data[0]
    data.on_epoch_end()
    assert told == []
    orders = []
    for _ in range(6):
        data.on_epoch_begin()
        orders.append(tuple(data[i][1][0] for i in range(3)))
        data.on_epoch_end()
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(orders)) > 1
    assert told == [Counter(texts=3)]


def test_threads_make_streamed_batches_ahead_and_in_order():
    """Two at a time: each waits for the other. A first look, and a source that changes, get none of what was ahead."""
    pair = threading.Barrier(2)

    class Slow(Source):
        turn = 0

        def __len__(self):
            return 4

        def __getitem__(self, index):
            pair.wait(timeout=20)
            return [f"text {index}"], [index, self.turn]

        def on_epoch_end(self):
            self.turn += 1

    data = StreamedBatches(Slow(workers=2, max_queue_size=1), lambda x, y, cut: (x, y), lambda cut: None)
    data[0]
    data.on_epoch_end()
    assert [data[i][1] for i in range(4)] == [[i, 1] for i in range(4)]
    data.on_epoch_end()
    assert (data.epoch, data.workers) == (1, 1)
    with pytest.warns(UserWarning, match="`workers` of a PyDataset are threads here"):
        StreamedBatches(Slow(use_multiprocessing=True), lambda x, y, cut: (x, y), lambda cut: None)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="others take the dataset itself")
def test_tensorflow_gets_batches_without_a_generator(monkeypatch):
    import tensorflow as tf

    def refuse(*_, **__):
        raise AssertionError("a generator slows down every later step of the process")

    monkeypatch.setattr(tf.data.Dataset, "from_generator", refuse)
    data, _ = batches(5)
    expected = [data[i][1].tolist() for i in range(len(data))]
    assert [y.numpy().tolist() for _, y in stream(data)] == expected


def test_next_token_targets_stop_at_padding_and_segments():
    ids = np.array([[5, 6, 7, 8, 9, 0]])
    targets, weights = next_token_targets(ids, np.array([[1, 1, 2, 2, 2, 0]]))
    assert weights.tolist() == [[1, 0, 1, 1, 0, 0]]
    assert targets[weights > 0].tolist() == [6, 8, 9]
    left, weights = next_token_targets(np.array([[0, 0, 5, 6]]), np.array([[0, 0, 1, 1]]), [2.0])
    assert weights.tolist() == [[0, 0, 2, 0]]
    assert left[weights > 0].tolist() == [6]


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the others have no tf.data")
def test_the_end_of_an_epoch_waits_for_no_tuner():
    """That of tf.data sleeps for up to a minute, and an iterator that ends may wait for it."""
    assert stream(batches(5)[0]).options().autotune.enabled is False
