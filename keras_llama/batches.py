"""Rows of token ids -> batches for `fit`: sorted by length, in an order per epoch, or packed together."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import keras
import numpy as np


def longer_side(*sides: Sequence[Sequence[int]]) -> np.ndarray:
    """A number per pair, by which to sort pairs of rows: the length of the longer side, each measured by its mean.

    It pads less than sorting by either side first.

    >>> longer_side([[5], [5, 6, 7]], [[8, 9], [8, 9]]).tolist()
    [1.0, 1.5]
    """
    lengths = (np.array([len(row) for row in rows]) for rows in sides)
    return np.max([side / side.mean() for side in lengths], axis=0)


class _Epochs(keras.utils.PyDataset):
    """A `PyDataset` that counts the epochs read to their end; Keras also ends one after a first look at the data.

    `augment`, if there is one, changes each batch that is read: (batch, integers to draw from) -> batch.
    """

    shuffle_seed: int | None

    def __init__(self):
        super().__init__()
        self.epoch, self._at_end, self.augment = 0, False, None

    def start(self, epoch):
        """Begins with this epoch's order."""
        self.epoch = epoch
        self.draw()

    def __getitem__(self, index):
        self._at_end = index == len(self) - 1
        batch = self.batch(index)
        return batch if self.augment is None else self.augment(batch, [self.shuffle_seed or 0, self.epoch, index])

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

    With `shuffle_seed`, each epoch draws a new order of the batches. A source that has other batches in each epoch
    says so by a method `start(epoch)`, and one that can tell its data from others by `digest()`.

    With `workers` above 1, so many threads make up to `max_queue_size` batches ahead (docs/decisions.md).

    Args:
        prepare: (inputs, targets, sample weights, cut=counter) -> batch; counts what truncation cut off.
        warn_of_cut: told the counts of all batches after the first epoch.
    """

    def __init__(self, source, prepare, warn_of_cut, shuffle_seed=None):
        super().__init__()
        if source.use_multiprocessing:
            warnings.warn("`workers` of a PyDataset are threads here, not use_multiprocessing=True.", stacklevel=2)
        self.source, self.prepare, self.warn_of_cut = source, prepare, warn_of_cut
        self.shuffle_seed = shuffle_seed
        self.cut: dict[int, Counter] = {}  # by batch, because a backend may look at one twice
        self._threads = ThreadPoolExecutor(source.workers) if source.workers > 1 else None
        self._ahead: dict[int, Future] = {}

    def __len__(self):
        return len(self.source)

    def batch(self, index):
        if self._threads is None:
            return self._made(index)
        for i in range(index, min(len(self), index + 1 + self.source.max_queue_size)):
            if i not in self._ahead:
                self._ahead[i] = self._threads.submit(self._made, i)
        return self._ahead.pop(index).result()

    def _made(self, index):
        if self.shuffle_seed is not None:
            index = int(np.random.default_rng([self.shuffle_seed, self.epoch]).permutation(len(self))[index])
        batch, self.cut[index] = self.source[index], Counter()
        return self.prepare(*_parts(batch), cut=self.cut[index])

    def on_epoch_begin(self):
        self._forget()
        self.source.on_epoch_begin()

    def on_epoch_end(self):
        self._forget()
        self.source.on_epoch_end()
        super().on_epoch_end()

    def _forget(self):
        """Waits for what is on its way, and drops it: the source may change."""
        for future in self._ahead.values():
            future.cancel()
        wait(self._ahead.values())
        self._ahead = {}

    def draw(self):
        self._forget()
        if self.epoch and self.cut:
            self.warn_of_cut(sum(self.cut.values(), Counter()))
            self.warn_of_cut = lambda cut: None  # once is enough
        if hasattr(self.source, "start"):
            self.source.start(self.epoch)

    def digest(self):
        """Tells these batches from others by their number and the first one: there may be more than fit into memory."""
        if hasattr(self.source, "digest"):
            return f"{len(self)} batches: {self.source.digest()}"
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
