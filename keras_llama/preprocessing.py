"""Text -> ids, masks and targets, in plain Python and NumPy, before any dataset of a backend.

Shapes: B batch, T tokens.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_llama import backend
from keras_llama.config import invalid
from keras_llama.layers import register


def check_texts(texts: Any, argument: str = "x") -> list[str]:
    """The texts as a list of strings, or a `ValueError` naming the argument and the row.

    Takes a list, a tuple or an array of strings (UTF-8 bytes count as strings), none of them empty.
    """
    if isinstance(texts, (str, bytes)):
        raise invalid(f"`{argument}` must be a list of strings.", "Put a single text into a list.", **{argument: texts})
    if hasattr(texts, "numpy"):
        texts = texts.numpy()
    if not isinstance(texts, (list, tuple, np.ndarray)):
        raise invalid(
            f"`{argument}` must be a list or an array of strings, or a `keras.utils.PyDataset` of such batches.",
            **{argument: type(texts)},
        )
    rows = texts.tolist() if isinstance(texts, np.ndarray) else list(texts)
    if not rows:
        raise invalid(f"`{argument}` must hold at least one text.", **{argument: rows})
    return [_check_text(text, f"{argument}[{i}]") for i, text in enumerate(rows)]


def _check_text(text: Any, place: str) -> str:
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise invalid(f"`{place}` must be UTF-8 text.", str(error), text=text) from error
    if not isinstance(text, str):
        raise invalid(f"`{place}` must be a string.", text=text)
    if not text:
        raise invalid(f"`{place}` must not be empty.", "Drop the row.", text=text)
    return text


@register
class TextPreprocessor:
    """Strings -> padded token ids and padding mask.

    Args:
        tokenizer: a `SentencePieceTokenizer` or a `BytePairTokenizer`.
        sequence_length: longest text in tokens; longer ones are cut at the end, with a warning.
        add_bos, add_eos: whether a text begins and ends with the tokenizer's special tokens.

    Raises:
        ValueError: if `sequence_length` leaves no room for a token of the text.

    >>> tokenizer = keras_llama.SentencePieceTokenizer.train(["a good film"], vocabulary_size=280)
    >>> preprocessor = keras_llama.TextPreprocessor(tokenizer, sequence_length=16)
    >>> preprocessor(["good", "a film"])["padding_mask"].shape
    (2, 8)
    """

    def __init__(self, tokenizer, sequence_length: int = 512, add_bos: bool = True, add_eos: bool = False):
        specials = int(add_bos) + int(add_eos)
        if isinstance(sequence_length, bool) or not isinstance(sequence_length, int) or sequence_length <= specials:
            raise invalid(
                f"`sequence_length` must be an integer above {specials}, the number of special tokens.",
                sequence_length=sequence_length,
            )
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.add_bos = add_bos
        self.add_eos = add_eos

    def encode(self, texts: Sequence[str], cut: Counter | None = None, add_eos: bool | None = None) -> list[np.ndarray]:
        """Token ids of each text, int32 (T_i,), none longer than `sequence_length`.

        What is cut off is warned of, or counted into `cut` for `warn_of_cut` to tell later.
        """
        add_eos = self.add_eos if add_eos is None else add_eos
        rows = self.tokenizer.encode(texts, add_bos=self.add_bos, add_eos=add_eos)
        return self.cut(rows, cut, self.end if add_eos else [])

    @property
    def end(self) -> list[int]:
        """What ends a text that has an end: the vocabulary's token, or nothing where it has none."""
        return [self.tokenizer.eos_id] if self.tokenizer.eos_id >= 0 else []

    def cut(self, rows: Sequence[list[int]], cut: Counter | None = None, tail: Sequence[int] = ()) -> list[np.ndarray]:
        """Rows of token ids, int32 (T_i,), those over `sequence_length` cut so that they still end in `tail`."""
        over = [len(row) - self.sequence_length for row in rows if len(row) > self.sequence_length]
        found = Counter(texts=len(rows), cut_texts=len(over), cut_tokens=sum(over))
        if cut is None:
            self.warn_of_cut(found)
        else:
            cut.update(found)
        keep = self.sequence_length - len(tail)
        return [np.array(row if len(row) <= self.sequence_length else [*row[:keep], *tail], "int32") for row in rows]

    def warn_of_cut(self, cut: Counter) -> None:
        """Warns of the texts and tokens counted in `cut`, if any."""
        if cut["cut_texts"]:
            warnings.warn(
                f"{cut['cut_texts']} of {cut['texts']} texts are longer than sequence_length={self.sequence_length} "
                f"tokens; {cut['cut_tokens']} tokens were cut off.",
                stacklevel=2,
            )

    def pad(self, rows: dict[str, list[np.ndarray]], length: int | None = None) -> dict[str, np.ndarray]:
        """Rows of token ids -> `token_ids` and `padding_mask` (B, T), right-padded to T = `length` or the next bucket.

        Other columns of `rows`, a number per token, are padded with 0.
        """
        ids = rows["token_ids"]
        if length is None:
            length = min(backend.bucket(max(len(row) for row in ids)), self.sequence_length)
        padded = {name: np.zeros((len(ids), length), "int32") for name in (*rows, "padding_mask")}
        padded["token_ids"][:] = self.tokenizer.pad_id
        for i, row in enumerate(ids):
            padded["padding_mask"][i, : len(row)] = 1
            for name, column in rows.items():
                padded[name][i, : len(row)] = column[i]
        return padded

    def __call__(self, texts: Any) -> dict[str, np.ndarray]:
        """Strings -> `token_ids` and `padding_mask`, int32 (B, T)."""
        return self.pad({"token_ids": self.encode(check_texts(texts, "texts"))})

    def get_config(self) -> dict[str, Any]:
        return {
            "tokenizer": keras.saving.serialize_keras_object(self.tokenizer),
            "sequence_length": self.sequence_length,
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TextPreprocessor":
        return cls(**{**config, "tokenizer": keras.saving.deserialize_keras_object(config["tokenizer"])})


def pad_rows(rows: Sequence[Sequence[int]], length: int | None = None) -> dict[str, np.ndarray]:
    """Rows of token ids -> `token_ids` and `padding_mask`, int32 (B, T), padded with 0 on the right.

    >>> pad_rows([[5, 6], [7]])["token_ids"].tolist()
    [[5, 6], [7, 0]]
    """
    arrays = np.zeros((2, len(rows), length or max(map(len, rows), default=0)), "int32")
    for i, row in enumerate(rows):
        arrays[0, i, : len(row)], arrays[1, i, : len(row)] = row, 1
    return {"token_ids": arrays[0], "padding_mask": arrays[1]}


def longer_side(*sides: Sequence[Sequence[int]]) -> np.ndarray:
    """A number per pair, by which to sort pairs of rows: the length of the longer side, each measured by its mean.

    It pads less than sorting by either side first.

    >>> longer_side([[5], [5, 6, 7]], [[8, 9], [8, 9]]).tolist()
    [1.0, 1.5]
    """
    lengths = (np.array([len(row) for row in rows]) for rows in sides)
    return np.max([side / side.mean() for side in lengths], axis=0)


class _Epochs(keras.utils.PyDataset):
    """A `PyDataset` that counts the epochs read to their end; Keras also ends one after a first look at the data."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.epoch, self._at_end = 0, False

    def start(self, epoch):
        """Begins with this epoch's order."""
        self.epoch = epoch
        self.draw()

    def __getitem__(self, index):
        self._at_end = index == len(self) - 1
        return self.batch(index)

    def on_epoch_end(self):
        if self._at_end:
            self._at_end = False
            self.start(self.epoch + 1)


class Batches(_Epochs):
    """Rows held in memory, batch by batch; texts of like length together, so that little is padded.

    With `shuffle_seed`, each epoch draws a new order from (seed, epoch) and groups rows of like
    length within it. Without, batches go from the longest row to the shortest; `order` then says
    which row comes where.

    Args:
        inputs: row numbers (B,) -> inputs of the model, a dict of arrays (B, T).
        lengths: tokens of each row.
        finish: (inputs, targets, sample weights) -> batch; what the task makes of them.
        targets, sample_weight: arrays with one entry per row, or `None`.
    """

    _GROUP = 50  # batches sorted by length together: enough to save padding, few enough to stay random

    def __init__(self, inputs, lengths, finish, targets=None, sample_weight=None, batch_size=32, shuffle_seed=None):
        super().__init__()
        self.inputs, self.lengths, self.finish = inputs, np.asarray(lengths), finish
        self.targets, self.sample_weight = targets, sample_weight
        self.batch_size, self.shuffle_seed = batch_size, shuffle_seed
        self.order = np.argsort(-self.lengths, kind="stable")
        self.draw()

    def __len__(self):
        return len(self._batches)

    def batch(self, index):
        rows = self._batches[index]
        parts = (None if part is None else part[rows] for part in (self.targets, self.sample_weight))
        return self.finish(self.inputs(rows), *parts)

    def draw(self):
        self._batches = self._drawn()

    def digest(self):
        """Tells these rows, in this order, from others."""
        return _digest(len(self), map(self.batch, range(len(self))))

    def _drawn(self):
        if self.shuffle_seed is None:
            return self._split(self.order)
        generator = np.random.default_rng([self.shuffle_seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        batches, group = [], self._GROUP * self.batch_size
        for start in range(0, len(order), group):
            part = order[start : start + group]
            batches += self._split(part[np.argsort(-self.lengths[part], kind="stable")])
        return [batches[i] for i in generator.permutation(len(batches))]

    def _split(self, order):
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]


class StreamedBatches(_Epochs):
    """A user's `PyDataset` of (inputs, targets[, sample weights]), made ready batch by batch.

    With `shuffle_seed`, each epoch draws a new order of the batches.

    Args:
        prepare: (inputs, targets, sample weights, cut=counter) -> batch; counts what truncation cut off.
        warn_of_cut: told the counts of all batches after the first epoch.
    """

    def __init__(self, source, prepare, warn_of_cut, shuffle_seed=None):
        super().__init__(
            workers=source.workers,
            use_multiprocessing=source.use_multiprocessing,
            max_queue_size=source.max_queue_size,
        )
        self.source, self.prepare, self.warn_of_cut = source, prepare, warn_of_cut
        self.shuffle_seed = shuffle_seed
        self.cut: dict[int, Counter] = {}  # by batch, because a backend may look at one twice

    def __len__(self):
        return len(self.source)

    def batch(self, index):
        if self.shuffle_seed is not None:
            index = int(np.random.default_rng([self.shuffle_seed, self.epoch]).permutation(len(self))[index])
        batch, self.cut[index] = self.source[index], Counter()
        return self.prepare(*_parts(batch), cut=self.cut[index])

    def on_epoch_begin(self):
        self.source.on_epoch_begin()

    def on_epoch_end(self):
        self.source.on_epoch_end()
        super().on_epoch_end()

    def draw(self):
        if self.epoch and self.cut:
            self.warn_of_cut(sum(self.cut.values(), Counter()))
            self.warn_of_cut = lambda cut: None  # once is enough

    def digest(self):
        """Tells these batches from others by their number and the first one: there may be more than fit into memory."""
        return _digest(len(self), [self.prepare(*_parts(self.source[0]), cut=Counter())])


def _parts(batch):
    return batch if isinstance(batch, (tuple, list)) else (batch,)


def _digest(count, batches):
    found = hashlib.sha256(str(count).encode())
    for batch in batches:
        for array in keras.tree.flatten(batch):
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def pack(columns: dict[str, list[np.ndarray]], sides: Sequence[str], length: int) -> dict[str, list[np.ndarray]]:
    """Texts put together into rows of at most `length` tokens on each side, longest first, each where it fits first.

    `padding_mask` becomes a column: n for the n-th text of a row. Nothing else tells the texts of a row apart.

    >>> packed = pack({"token_ids": [np.array([5, 6]), np.array([7, 8, 9]), np.array([4])]}, ("",), 4)
    >>> [row.tolist() for row in packed["token_ids"]], [row.tolist() for row in packed["padding_mask"]]
    ([[7, 8, 9, 4], [5, 6]], [[1, 1, 1, 2], [1, 1]])
    """
    sizes = np.stack([[len(row) for row in columns[f"{side}token_ids"]] for side in sides], axis=1)
    rows: list[list[int]] = []
    for start in range(0, len(sizes), _PACKED_TOGETHER):
        room = np.zeros((0, len(sides)), int)
        some: list[list[int]] = []
        part = sizes[start : start + _PACKED_TOGETHER]
        for text in np.argsort(-part.max(axis=1), kind="stable"):
            fits = np.flatnonzero((room >= part[text]).all(axis=1))
            place = int(fits[0]) if len(fits) else len(room)
            if place == len(room):
                room = np.concatenate([room, np.full((1, len(sides)), length)])
                some.append([])
            room[place] -= part[text]
            some[place].append(start + int(text))
        rows += some
    packed = {name: [np.concatenate([column[i] for i in row]) for row in rows] for name, column in columns.items()}
    for k, side in enumerate(sides):
        packed[f"{side}padding_mask"] = [np.repeat(np.arange(1, len(row) + 1), sizes[row, k]) for row in rows]
    return packed


_PACKED_TOGETHER = 4096  # texts: enough to leave little room, few enough for the time to grow with their number alone


def next_token_targets(
    token_ids: np.ndarray, padding_mask: np.ndarray, sample_weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights of a language model, both (B, T): each token's successor in its segment.

    The weight is 0 where there is none: at padding and at the last token of a segment. A weight
    per text (B,) multiplies it.

    >>> next_token_targets(np.array([[5, 6, 7, 0]]), np.array([[1, 1, 1, 0]]))[1]
    array([[1., 1., 0., 0.]], dtype=float32)
    """
    targets = np.concatenate([token_ids[:, 1:], token_ids[:, :1]], axis=1)
    same = (padding_mask[:, 1:] == padding_mask[:, :-1]) & (padding_mask[:, :-1] > 0)
    weights = np.pad(same, ((0, 0), (0, 1))).astype("float32")
    if sample_weight is not None:
        weights *= np.asarray(sample_weight, "float32").reshape(len(weights), -1)
    return targets, weights
