"""Inputs: from what users pass to `fit` to batches for the graph. Shapes: B batch, T tokens."""

import functools
from typing import Any

import keras
import numpy as np

from keras_llama import backend
from keras_llama.batches import Batches, StreamedBatches, pack
from keras_llama.config import invalid
from keras_llama.preprocessing import check_texts, pad_rows


class Inputs:
    """The half of a task that makes batches of texts or of token ids; it reads `preprocessor` and `backbone`.

    A head overrides what differs:
        `encode`: texts -> columns of rows, `token_ids` and what else belongs to each token,
        `check_targets`: the targets of so many rows, checked and turned into an array,
        `finish_batch`: (inputs, targets, weights) of a padded batch, completed,
        `sides`, `join`, `sort_key`: for a graph of two texts, what they are called, how they come together,
            and which rows make a batch of little padding.
    """

    preprocessor: Any
    backbone: Any
    jit_compile: bool
    sides: tuple[str, ...] = ("",)  # what `token_ids` and `padding_mask` of each text are prefixed with
    packs = False  # whether `pack` may put several texts into a row
    augment: Any = None  # (a batch to train on, integers to draw from) -> the batch, changed at random

    @property
    def prompt_tokens(self):
        """How many tokens stand in front of what is generated: one to begin with, and an image's patches."""
        return 1

    def join(self, x, y):
        """Inputs and targets as `encode` and `check_targets` take them, from those of `fit`."""
        return x, y

    def encode(self, x, argument="x", cut=None, predicting=False):
        """Texts -> columns of rows: `token_ids`, int32 (T_i,) each, and what a head adds."""
        return {"token_ids": self.preprocessor.encode(check_texts(x, argument), cut)}

    def sort_key(self, columns):
        """A number per row; rows of like numbers need little padding together."""
        return np.array([len(row) for row in columns["token_ids"]])

    def check_targets(self, y, rows, training=False):
        raise NotImplementedError

    def finish_batch(self, inputs, y=None, sample_weight=None):
        return inputs, y, sample_weight

    def _dataset(self, x, y=None, sample_weight=None, batch_size=None, *, shuffle_seed=None, **options):
        """The user's data as a dataset of finished batches; all that is in memory is checked here."""
        argument, packing = options.get("argument", "x"), options.get("packing", False)
        if is_dataset(x):
            beside = {"y": y, "sample_weight": sample_weight, "batch_size": batch_size}
            if given := [name for name, value in beside.items() if value is not None]:
                raise invalid(f"`{argument}` must come alone: a dataset has these in its batches.", beside=given)
        if isinstance(x, (Batches, StreamedBatches)) or backend.is_stream(x):
            if packing and options.get("training"):
                raise invalid("`packing` needs texts.", "The batches of a tf.data.Dataset are finished.", packing=True)
            return x  # finished already: `fit` hands its validation data to `evaluate`
        if isinstance(x, keras.utils.PyDataset):
            warn = (lambda cut: None) if self.preprocessor is None else self.preprocessor.warn_of_cut
            chosen = {name: options.get(name, False) for name in ("predicting", "packing")}
            prepare = functools.partial(self._prepare, **chosen)
            streamed = StreamedBatches(x, prepare, warn, shuffle_seed)
            streamed.augment = self.augment if options.get("training") else None
            return backend.stream(streamed)
        batch_size = rows_per_step(batch_size)
        _refuse_weights_of_packed(sample_weight, packing)
        x, y = self.join(x, y)
        inputs, lengths = self._rows(x, argument, packing=packing)
        batches = Batches(
            inputs,
            lengths,
            finish=lambda *batch: _without_none(self.finish_batch(*batch)),
            targets=self.check_targets(y, len(lengths), training=options.get("training", False)),
            sample_weight=row_weights(sample_weight, len(lengths)),
            batch_size=batch_size,
            shuffle_seed=shuffle_seed,
        )
        batches.augment = self.augment if options.get("training") else None
        return backend.stream(batches)

    def _prepare(self, x, y=None, sample_weight=None, *, cut, predicting, packing):
        """One batch of a user's `PyDataset`, tokenized and finished."""
        _refuse_weights_of_packed(sample_weight, packing)
        x, y = self.join(x, y)
        batch, lengths = self._rows(x, predicting=predicting, packing=packing, cut=cut)
        rows = len(lengths)
        inputs = batch(np.arange(rows))
        if predicting:
            return (inputs,)
        return _without_none(self.finish_batch(inputs, self.check_targets(y, rows), row_weights(sample_weight, rows)))

    def _are_token_ids(self, x, packing=False):
        """Whether `x` needs no tokenizer; such rows, and those of other tasks, cannot be packed."""
        found = self.preprocessor is None or is_token_ids(x, self.sides)
        if packing and (found or not self.packs):
            raise invalid(
                "`packing` needs a language model and strings.",
                "Rows of token ids may be packed already: their `padding_mask` holds n for the n-th text.",
                packing=packing,
                task=type(self).__name__,
            )
        return found

    def _packed(self, columns):
        return pack(columns, self.sides, self.preprocessor.sequence_length)

    def _rows(self, x, argument="x", predicting=False, one_length=False, packing=False, cut=None):
        """A function from row numbers to inputs, and a number per row to sort by, for texts or token ids."""
        if self._are_token_ids(x, packing):
            arrays = self._token_ids(x, argument)
            masks = (arrays[f"{side}padding_mask"] for side in self.sides)
            self._check_context((_longest_text(mask) for mask in masks if mask.shape[1] > self._room), argument)
            rows = len(arrays[f"{self.sides[0]}token_ids"])
            return lambda chosen: {key: value[chosen] for key, value in arrays.items()}, np.zeros(rows)
        columns = self.encode(x, argument, cut, predicting=predicting)
        self._check_context((len(row) for side in self.sides for row in columns[f"{side}token_ids"]), argument)
        columns = self._packed(columns) if packing else columns

        def inputs(chosen):
            return self._pad({name: [rows[i] for i in chosen] for name, rows in columns.items()}, longest)

        longest = {side: max(map(len, columns[f"{side}token_ids"])) for side in self.sides} if one_length else None
        return inputs, self.sort_key(columns)

    def _pad(self, columns, lengths=None):
        """Ragged columns -> arrays (B, T), each side as long as `lengths` says, else as its longest row.

        XLA would compile every length, so that it is given buckets.
        """
        arrays: dict[str, np.ndarray] = {}
        for side in self.sides:
            own = {name.removeprefix(side): rows for name, rows in columns.items() if name.startswith(side)}
            length = lengths[side] if lengths else None if self.jit_compile else max(map(len, own["token_ids"]))
            padded = self.preprocessor.pad(own, length)
            arrays |= {f"{side}{name}": array for name, array in padded.items()}
        return arrays

    def _token_ids(self, x, argument="x", sides=None):
        """Token ids as the graph takes them: int32 arrays (B, T), every id inside the vocabulary."""
        given = x if isinstance(x, dict) else {"token_ids": x}
        needed, masks = ([f"{side}{name}" for side in sides or self.sides] for name in ("token_ids", "padding_mask"))
        if not set(needed) <= set(given) <= {*needed, *masks}:
            raise invalid(
                f"`{argument}` must have the keys {' and '.join(needed + masks)}.",
                "The masks may be left out where nothing is padding.",
                **{argument: sorted(given)},
            )
        arrays = {}
        for ids, mask in zip(needed, masks, strict=True):
            arrays[ids] = self._check_ids(given[ids], argument)
            arrays[mask] = np.asarray(given.get(mask, np.ones_like(arrays[ids])))
            if arrays[mask].shape != arrays[ids].shape:
                shapes = {"shape": arrays[mask].shape, "expected": arrays[ids].shape}
                raise invalid(f"`{mask}` must have the shape of `{ids}`.", **shapes)
        rows = {name: len(arrays[name]) for name in needed}
        if len(set(rows.values())) > 1:
            raise invalid(f"`{argument}` must have as many rows on each side.", **rows)
        return {key: value.astype("int32") for key, value in arrays.items()}

    @property
    def _room(self):
        """Most tokens of a text, beside what stands before it, in what the backbone was trained for."""
        context = self.backbone.config.context_length
        return np.inf if context is None else context - (self.prompt_tokens - 1)

    def _check_context(self, lengths, argument):
        if (longest := max(lengths, default=0)) > self._room:
            raise invalid(
                f"`{argument}` must hold texts of at most {self._room} tokens, for the backbone's context.",
                "Cut them, or give the preprocessor such a `sequence_length`.",
                longest=longest,
            )

    def _id_rows(self, x, argument):
        """Rows of token ids of one text each, none empty, from a dict, an array, or lists."""
        arrays = self._token_ids(pad_rows(x) if isinstance(x, (list, tuple)) else x, argument, sides=("",))
        rows = [ids[mask > 0].tolist() for ids, mask in zip(*arrays.values(), strict=True)]
        for i, row in enumerate(rows):
            if not row:
                raise invalid(f"`{argument}`, row {i}, must not be empty.", "It needs a token to begin with.", row=row)
        return rows

    def _check_ids(self, ids, argument):
        try:
            ids = np.asarray(ids)
        except ValueError as error:
            raise invalid(f"`{argument}` must be an int array (B, T).", "Pad its rows to one length.") from error
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise invalid(
                f"`{argument}` must hold token ids, an int array (B, T) that is not empty.",
                "Give the task a preprocessor to pass strings." if self.preprocessor is None else "",
                shape=ids.shape,
                dtype=str(ids.dtype),
            )
        size = self.backbone.config.vocabulary_size
        if ids.min() < 0 or ids.max() >= size:
            raise invalid(
                f"`{argument}` must hold token ids from 0 to {size - 1}, the backbone's vocabulary.",
                smallest=int(ids.min()),
                largest=int(ids.max()),
            )
        return ids


def is_dataset(x) -> bool:
    """Whether `x` is a dataset of batches, which hold their targets and weights."""
    return isinstance(x, keras.utils.PyDataset) or backend.is_stream(x)


def rows_per_step(batch_size) -> int:
    """The checked `batch_size`, 32 for `None`."""
    if batch_size is None:
        return 32
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise invalid("`batch_size` must be an integer of at least 1.", batch_size=batch_size)
    return int(batch_size)


def is_token_ids(x, sides=("",)) -> bool:
    """Whether `x` holds token ids: a dict with them, or, for a graph of one text, an int array (B, T)."""
    if isinstance(x, dict):
        return f"{sides[0]}token_ids" in x
    return len(sides) == 1 and "int" in str(getattr(x, "dtype", "")) and len(x.shape) == 2


def are_ids(x) -> bool:
    """Whether `x` holds token ids of one text per row, as `is_token_ids` says, or as lists of lists."""
    if isinstance(x, (list, tuple)):
        return bool(x) and not isinstance(x[0], (str, bytes, dict)) and np.ndim(x[0]) == 1
    return is_token_ids(x)


def _longest_text(mask):
    """Most tokens of a text in rows (B, T), of which each may hold several: n for the n-th of a row, 0 for padding."""
    texts = mask + np.arange(len(mask))[:, None] * (int(mask.max()) + 1)
    return int(np.unique(texts[mask > 0], return_counts=True)[1].max(initial=0))


def _without_none(batch):
    return tuple(part for part in batch if part is not None)


def _refuse_weights_of_packed(sample_weight, packing):
    if packing and sample_weight is not None:
        raise invalid("`sample_weight` must be None with `packing`: a row holds several texts.", packing=packing)


def row_weights(sample_weight, rows):
    """A weight per row, float32 (B,), checked; `None` stays `None`."""
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, "float32")
    if weights.shape != (rows,):
        raise invalid(f"`sample_weight` must have shape ({rows},), a weight per row.", shape=weights.shape)
    return weights
