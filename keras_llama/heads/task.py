"""Task: the one base class of the heads. Raw strings in `fit`, `evaluate` and `predict`.

Shapes: B batch, T tokens, V vocabulary.
"""

import dataclasses
import functools
import inspect
import os
import pathlib
import re
import warnings
from typing import Any

import keras
import numpy as np

from keras_llama import backend
from keras_llama.backbone import LlamaBackbone
from keras_llama.checkpoints import hf, loader, mapping, presets
from keras_llama.config import invalid
from keras_llama.layers import no_random_weights
from keras_llama.preprocessing import Batches, StreamedBatches, TextPreprocessor, check_texts, pad_rows
from keras_llama.tokenizer import Tokenizer


class Task(keras.Model):
    """A functional model on a backbone that takes strings, or token ids.

    Token ids are a dict of `token_ids` and `padding_mask` (B, T), or an int array (B, T) without
    padding. A head gives its graph to the constructor and overrides what differs:
        `default_loss`, `default_metrics`: what `compile()` without arguments uses,
        `losses_by_name`, `metrics_by_name`: what strings mean for its outputs, which are logits,
        `encode`: texts -> columns of rows, `token_ids` and what else belongs to each token,
        `check_targets`: the targets of so many rows, checked and turned into an array,
        `finish_batch`: (inputs, targets, weights) of a padded batch, completed,
        `sides`, `join`, `sort_key`: for a graph of two texts, what they are called, how they come together,
            and which rows make a batch of little padding,
        `preset_options`, `checkpoint_settings`: what it takes from a checkpoint, and writes into one.
    """

    backbone_class: Any = LlamaBackbone
    sides: tuple[str, ...] = ("",)  # what `token_ids` and `padding_mask` of each text are prefixed with
    head = ""  # its weights' name in the words of Hugging Face: "lm_head", "score", "qa_outputs"

    def __init__(self, backbone, preprocessor, outputs, **kwargs):
        super().__init__(inputs=backbone.input, outputs=outputs, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.dtype_policy = backbone.dtype_policy
        if preprocessor is not None and preprocessor.tokenizer.files:
            self._check_vocabulary()

    @classmethod
    def from_preset(cls, preset, dtype=None, sequence_length=None, **options):
        """The task with the weights, the tokenizer and the settings of a checkpoint.

        Args:
            preset: a Hugging Face directory; a `.gguf` file; a llama2.c `.bin` file; `hf://org/name`, with
                `@revision` if wanted; "smollm2_135m_instruct"; a KerasHub preset or backbone.
            dtype: a Keras dtype policy or its name; `None` takes the global policy if it is not float32,
                else the dtype in which the checkpoint loses nothing (bfloat16 for quantised files). To
                train all weights pass "mixed_bfloat16" or "float32".
            sequence_length: longest text to train on, in tokens; the checkpoint's own, at most 2,048, unless given.
            **options: of the task, such as `labels`; a head that the checkpoint lacks starts at random.

        Raises:
            ValueError: if the checkpoint cannot be read or does not fit, in one table of names.
        """
        checkpoint = presets.open_checkpoint(preset)
        own = checkpoint.options.get("preprocessor", {})
        preprocessor = None
        if checkpoint.tokenizer_files:
            tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files)
            length = (
                sequence_length or own.get("sequence_length") or min(checkpoint.config.context_length or 2048, 2048)
            )
            flags = {"add_bos": tokenizer.default_add_bos, "add_eos": tokenizer.default_add_eos, **own}
            preprocessor = TextPreprocessor(tokenizer, **{**flags, "sequence_length": length})
        options = {**cls.preset_options(checkpoint, preprocessor), **options}
        backbone = loader.build_backbone(checkpoint, dtype, cls=cls.backbone_class)
        with no_random_weights():
            task = cls(backbone, preprocessor=preprocessor, **options)
        loader.load(task, checkpoint, fresh=task.fresh_weights(checkpoint))
        return task

    @classmethod
    def preset_options(cls, checkpoint, preprocessor):
        """Arguments of the constructor that a checkpoint decides."""
        return {}

    def save_to_preset(self, directory, *, overwrite=False):
        """Writes a folder that `from_preset` reads back whole, in the layout that other tools read too.

        It is Hugging Face's: safetensors, `config.json`, tokenizer files; and `keras_llama.json` for what
        those have no field for. A model that other tools would compute otherwise is marked as one that
        they do not know.

        Raises:
            ValueError: if `directory` holds files and `overwrite` is not set.
        """
        settings = self.checkpoint_settings()
        config = self.backbone.config
        own = {
            "version": 1,
            "class": type(self).__name__,
            "config": {name: value for name, value in dataclasses.asdict(config).items() if name in _OWN_FIELDS},
            "options": settings["options"],
        }
        if self.preprocessor is not None:
            flags = ("sequence_length", "add_bos", "add_eos")
            own["options"]["preprocessor"] = {name: getattr(self.preprocessor, name) for name in flags}
        if settings["differs"]:
            settings["fields"]["model_type"] = "keras_llama"
        presets.write_directory(self, settings, directory, own, overwrite)

    def checkpoint_settings(self):
        """What a checkpoint says of this task beside its weights, for `save_checkpoint`."""
        config, tokenizer = self.backbone.config, None if self.preprocessor is None else self.preprocessor.tokenizer
        fields = {**hf.fields_from_config(config), "dtype": self.dtype_policy.variable_dtype}
        fields["torch_dtype"] = fields["dtype"]  # the older spelling
        if tokenizer is not None:
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
            fields |= {name: token for name, token in ids.items() if token >= 0}
        return {
            "fields": fields,
            "prefix": "model.",
            "files": {} if tokenizer is None else tokenizer.files,
            "generation": {},
            "options": {},
            "differs": "" if config.causal else "bidirectional attention",
        }

    def default_loss(self):
        raise NotImplementedError

    def default_metrics(self):
        return {"metrics": None, "weighted_metrics": None}

    def losses_by_name(self):
        return {}

    def metrics_by_name(self):
        return {}

    def join(self, x, y):
        """Inputs and targets as `encode` and `check_targets` take them, from those of `fit`."""
        return x, y

    def check_targets(self, y, rows, training=False):
        raise NotImplementedError

    def finish_batch(self, inputs, y=None, sample_weight=None):
        return inputs, y, sample_weight

    def compile(
        self, optimizer="auto", loss="auto", *, metrics="auto", weighted_metrics="auto", jit_compile="auto", **kwargs
    ):
        """Keras' `compile` with defaults that train; a loss given by name is taken in its form for logits.

        Args:
            optimizer: name or object; "auto" is AdamW at 1e-3, weight decay 0.01, gradient norm at most 1.
            loss: name or object; "auto" is the task's own.
            metrics, weighted_metrics: lists; "auto" are the task's own.
            jit_compile: True, False or "auto" (see docs/gpu.md).

        Raises:
            ValueError: for a loss object that expects probabilities, or an unknown `jit_compile`.
        """
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.01, global_clipnorm=1.0)
        loss = self.default_loss() if isinstance(loss, str) and loss == "auto" else self._loss_of_logits(loss)
        if isinstance(loss, keras.losses.Loss) and loss.get_config().get("from_logits") is False:
            raise invalid(
                "`loss` must be built with from_logits=True, because a task returns logits.",
                "Or give the loss by name.",
                loss=loss,
            )
        own, named = self.default_metrics(), self.metrics_by_name()
        metrics = own["metrics"] if metrics == "auto" else metrics
        metrics = [metrics] if isinstance(metrics, str) else metrics
        weighted_metrics = own["weighted_metrics"] if weighted_metrics == "auto" else weighted_metrics
        weighted_metrics = [weighted_metrics] if isinstance(weighted_metrics, str) else weighted_metrics
        self._jit_choice = jit_compile
        super().compile(
            optimizer=optimizer,
            loss=loss,
            metrics=metrics and [named.get(m, m) if isinstance(m, str) else m for m in metrics],
            weighted_metrics=weighted_metrics
            and [named.get(m, m) if isinstance(m, str) else m for m in weighted_metrics],
            jit_compile=backend.resolve_jit(jit_compile),
            **kwargs,
        )

    def _loss_of_logits(self, loss):
        """A loss given by name, alias or function in its form for logits; other losses as they are."""
        if not isinstance(loss, str) and not inspect.isfunction(loss):
            return loss
        found = keras.losses.get(loss)
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", getattr(found, "__name__", type(found).__name__)).lower()
        named = self.losses_by_name()
        if name not in named and "from_logits" in inspect.signature(found).parameters:
            raise invalid(
                f"`loss` must be built with from_logits=True, or be one of {sorted(named)}.",
                "A task returns logits.",
                loss=loss,
            )
        return named.get(name, loss)

    def get_compile_config(self):
        """Keeps "auto" as it is: another backend may choose otherwise."""
        config = super().get_compile_config()
        return {**config, "jit_compile": self._jit_choice} if config else config

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        *,
        sample_weight=None,
        validation_data=None,
        validation_split=0.0,
        shuffle=True,
        **kwargs,
    ):
        """Keras' `fit` on raw texts, on token ids, or on a `keras.utils.PyDataset` of batches of either.

        Args:
            x: list or array of strings; or token ids; or a `PyDataset` of (texts, targets[, weights]).
            y: targets, as the task defines them.
            batch_size: rows per step; 32 unless given.
            sample_weight: a weight per row (B,).
            validation_data: (x, y) or (x, y, sample_weight) in the same forms, or a `PyDataset`.
            validation_split: last share of the rows to hold out, for lists and arrays.
            **kwargs: everything else that Keras' `fit` takes.

        Raises:
            ValueError: for a text that is empty or no string, or targets that do not fit, named by row.
        """
        half = {v.dtype for v in self.trainable_variables} & {"bfloat16", "float16"}
        if half:
            warnings.warn(
                f"The weights that are trained are {half.pop()}, which loses small updates. "
                'Load or build the model with dtype="mixed_bfloat16" or "float32" to train it.',
                stacklevel=2,
            )
        if validation_split:
            (x, y, sample_weight), validation_data = _hold_out(validation_split, x, y, sample_weight)
        seed = int(np.random.randint(2**31)) if shuffle else None  # from `keras.utils.set_random_seed`
        data = self._dataset(x, y, sample_weight, batch_size, shuffle_seed=seed, training=True)
        if validation_data is not None:
            held = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
            x, y, sample_weight = (*held, None, None)[:3]
            validation_data = self._dataset(x, y, sample_weight, batch_size, argument="validation_data")
        return super().fit(data, epochs=epochs, shuffle=False, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, y=None, batch_size=None, *, sample_weight=None, **kwargs):
        """Keras' `evaluate` on what `fit` takes."""
        return super().evaluate(self._dataset(x, y, sample_weight, batch_size), **kwargs)

    def predict(self, x, batch_size=None, **kwargs):
        """Logits, float32, a row for each text or row of token ids, in their order."""
        if isinstance(x, keras.utils.PyDataset):
            return super().predict(self._dataset(x, predicting=True), **kwargs)
        inputs, lengths = self._rows(x, predicting=True, one_length=len(self.output_shape) == 3)
        batches = Batches(inputs, lengths, lambda inputs, *_: (inputs,), batch_size=batch_size or 32)
        outputs = super().predict(backend.stream(batches), **kwargs)
        restored = np.empty_like(outputs)
        restored[batches.order] = outputs
        return restored

    def save(self, filepath, overwrite=True, **kwargs):
        """Keras' `save` to a `.keras` file, written beside and renamed, so that a former file stays whole.

        Raises:
            ValueError: for another ending; `.h5` cannot hold the vocabulary and the optimiser.
        """
        path = pathlib.Path(filepath)
        if path.suffix != ".keras":
            raise invalid(
                "`filepath` must end in .keras.",
                "A task holds more than an .h5 file can: its vocabulary, and the state of its optimiser.",
                filepath=str(filepath),
            )
        if path.exists() and not overwrite:
            raise invalid("`filepath` must not exist when overwrite=False.", filepath=str(filepath))
        unfinished = path.with_name(f".{path.stem}.unfinished.keras")
        try:
            super().save(unfinished, **kwargs)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def encode(self, x, argument="x", cut=None, predicting=False):
        """Texts -> columns of rows: `token_ids`, int32 (T_i,) each, and what a head adds."""
        return {"token_ids": self.preprocessor.encode(check_texts(x, argument), cut)}

    def sort_key(self, columns):
        """A number per row; rows of like numbers need little padding together."""
        return np.array([len(row) for row in columns["token_ids"]])

    def save_assets(self, directory):
        if self.preprocessor is not None:
            self.preprocessor.tokenizer.save_assets(directory)

    def load_assets(self, directory):
        if self.preprocessor is not None:
            self.preprocessor.tokenizer.load_assets(directory)
            self._check_vocabulary()

    def get_config(self):
        return {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "preprocessor": keras.saving.serialize_keras_object(self.preprocessor),
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        nested = {key: keras.saving.deserialize_keras_object(config[key]) for key in ("backbone", "preprocessor")}
        return cls(**{**config, **nested})

    def _dataset(self, x, y=None, sample_weight=None, batch_size=None, *, shuffle_seed=None, **options):
        """The user's data as a dataset of finished batches; all that is in memory is checked here."""
        if isinstance(x, (Batches, StreamedBatches)) or backend.is_stream(x):
            return x  # finished already: `fit` hands its validation data to `evaluate`
        if isinstance(x, keras.utils.PyDataset):
            warn = (lambda cut: None) if self.preprocessor is None else self.preprocessor.warn_of_cut
            prepare = functools.partial(self._prepare, predicting=options.get("predicting", False))
            return backend.stream(StreamedBatches(x, prepare, warn, shuffle_seed))
        if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
            raise invalid("`batch_size` must be an integer of at least 1.", batch_size=batch_size)
        x, y = self.join(x, y)
        inputs, lengths = self._rows(x, options.get("argument", "x"))
        batches = Batches(
            inputs,
            lengths,
            finish=lambda *batch: _without_none(self.finish_batch(*batch)),
            targets=self.check_targets(y, len(lengths), training=options.get("training", False)),
            sample_weight=_weights(sample_weight, len(lengths)),
            batch_size=batch_size or 32,
            shuffle_seed=shuffle_seed,
        )
        return backend.stream(batches)

    def _rows(self, x, argument="x", predicting=False, one_length=False):
        """A function from row numbers to inputs, and a number per row to sort by, for texts or token ids."""
        if self.preprocessor is None or is_token_ids(x, self.sides):
            arrays = self._token_ids(x, argument)
            rows = len(arrays[f"{self.sides[0]}token_ids"])
            return lambda chosen: {key: value[chosen] for key, value in arrays.items()}, np.zeros(rows)
        columns = self.encode(x, argument, predicting=predicting)

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

    def _prepare(self, x, y=None, sample_weight=None, *, cut, predicting):
        """One batch of a user's `PyDataset`, tokenized and finished."""
        x, y = self.join(x, y)
        if self.preprocessor is None or is_token_ids(x, self.sides):
            inputs = self._token_ids(x)
        else:
            inputs = self._pad(self.encode(x, cut=cut, predicting=predicting))
        if predicting:
            return (inputs,)
        rows = len(inputs[f"{self.sides[0]}token_ids"])
        return _without_none(self.finish_batch(inputs, self.check_targets(y, rows), _weights(sample_weight, rows)))

    def _id_rows(self, x, argument):
        """Rows of token ids of one text each, none empty, from a dict, an array, or lists."""
        arrays = self._token_ids(pad_rows(x) if isinstance(x, (list, tuple)) else x, argument, sides=("",))
        rows = [ids[mask > 0].tolist() for ids, mask in zip(*arrays.values(), strict=True)]
        for i, row in enumerate(rows):
            if not row:
                raise invalid(f"`{argument}`, row {i}, must not be empty.", "It needs a token to begin with.", row=row)
        return rows

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

    def fresh_weights(self, checkpoint):
        """Hugging Face's names of the head's weights that a checkpoint of another task may lack."""
        names = (mapping.from_ours(variable.path)[1] for variable in self.weights)
        return [name for name in names if checkpoint.head != self.head == name.split(".")[0]]

    def _check_vocabulary(self):
        tokens, size = self.preprocessor.tokenizer.vocabulary_size, self.backbone.config.vocabulary_size
        if tokens > size:
            raise invalid(
                "The backbone's `vocabulary_size` must be at least the tokenizer's.",
                "Build the backbone with `vocabulary_size=tokenizer.vocabulary_size`.",
                vocabulary_size=size,
                tokenizer_vocabulary_size=tokens,
            )


# Of the configuration, what `config.json` has no field for, or none that may be empty.
_OWN_FIELDS = ("causal", "dropout", "context_length", "num_encoder_layers", "share_embeddings")


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


def _without_none(batch):
    return tuple(part for part in batch if part is not None)


def _weights(sample_weight, rows):
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, "float32")
    if weights.shape != (rows,):
        raise invalid(f"`sample_weight` must have shape ({rows},), a weight per row.", shape=weights.shape)
    return weights


def _hold_out(share, x, y, sample_weight):
    """Splits the last `share` of the rows off: ((x, y, w) to train on, (x, y, w) to validate on)."""
    if not 0 < share < 1 or isinstance(x, keras.utils.PyDataset):
        raise invalid("`validation_split` must lie in (0, 1) and needs lists or arrays.", validation_split=share)
    rows = len(next(iter(x.values())) if isinstance(x, dict) else x)
    cut = rows - int(rows * share)
    if cut in (0, rows):
        raise invalid("`validation_split` must leave a row on both sides.", validation_split=share, rows=rows)

    def part(values, side):
        if isinstance(values, dict):
            return {key: part(value, side) for key, value in values.items()}
        return None if values is None else values[side]

    parts = (x, y, sample_weight)
    return tuple(part(p, slice(cut)) for p in parts), tuple(part(p, slice(cut, None)) for p in parts)
