"""Task: the base class of the heads. Raw strings in `fit`, `evaluate` and `predict`. Shapes: B batch, T tokens."""

import inspect
import re
import types
import warnings

import keras
import numpy as np

from keras_llama import backend
from keras_llama.batches import Batches
from keras_llama.config import invalid
from keras_llama.export import forward, saved_model
from keras_llama.export.saved_model import IDS, NUMBERS, STRINGS, Signature
from keras_llama.heads.files import Files
from keras_llama.heads.inputs import Inputs, is_dataset, rows_per_step
from keras_llama.resume import TrainingState


class Task(Inputs, Files):
    """A functional model on a backbone that takes strings, or token ids.

    Token ids are a dict of `token_ids` and `padding_mask` (B, T), or an int array (B, T) without
    padding. A head gives its graph to the constructor, whose inputs are the backbone's unless given, and overrides
    what differs, here and in `Inputs` and `Files`:
        `default_loss`, `default_metrics`: what `compile()` without arguments uses,
        `losses_by_name`, `metrics_by_name`: what strings mean for its outputs, which are logits.
    """

    def __init__(self, backbone, preprocessor, outputs, inputs=None, **kwargs):
        super().__init__(inputs=backbone.input if inputs is None else inputs, outputs=outputs, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.dtype_policy = backbone.dtype_policy
        self.base_frozen = False
        self.compile_options = types.MappingProxyType({"jit_compile": "auto"})
        if preprocessor is not None and preprocessor.tokenizer.files:
            self._check_vocabulary()

    def default_loss(self):
        raise NotImplementedError

    def default_metrics(self):
        return {"metrics": None, "weighted_metrics": None}

    def losses_by_name(self):
        return {}

    def metrics_by_name(self):
        return {}

    def place_metrics(self, metrics, weighted_metrics):
        """The two lists as Keras is to have them."""
        return metrics, weighted_metrics

    def choose_step(self, metrics, weighted_metrics, **options):
        """Called at the end of `compile` with what it found and its other options."""

    def compile(
        self, optimizer="auto", loss="auto", *, metrics="auto", weighted_metrics="auto", jit_compile="auto", **kwargs
    ):
        """Keras' `compile` with defaults that train; a loss given by name is taken in its form for logits.

        Args:
            optimizer: name or object; "auto" is AdamW at 1e-3, weight decay 0.01, gradient norm at most 1.
            loss: name or object; "auto" is the task's own.
            metrics, weighted_metrics: one, a list, or Keras' dict by the name of the output; "auto" are the task's own.
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
        weighted_metrics = own["weighted_metrics"] if weighted_metrics == "auto" else weighted_metrics
        metrics, weighted_metrics = (
            given and [named.get(m, m) if isinstance(m, str) else m for m in keras.tree.flatten(given)]
            for given in (metrics, weighted_metrics)
        )
        metrics, weighted_metrics = self.place_metrics(metrics, weighted_metrics)
        options = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics, **kwargs}
        self.compile_options = types.MappingProxyType({**options, "jit_compile": jit_compile})  # not a dict: untracked
        self.forget_traces()  # another task on the backbone may have changed it
        super().compile(optimizer, **options, jit_compile=backend.resolve_jit(jit_compile))
        backend.prepare_updates(self.optimizer, by_xla=jit_compile == "auto")
        self.choose_step(metrics, weighted_metrics, **kwargs)

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
        return {**config, "jit_compile": self.compile_options["jit_compile"]} if config else config

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
        validation_batch_size=None,
        shuffle=True,
        packing=False,
        initial_epoch=0,
        callbacks=None,
        resume=None,
        **kwargs,
    ):
        """Keras' `fit` on raw texts, on token ids, or on a `keras.utils.PyDataset` of batches of either.

        Args:
            x: list or array of strings; or token ids; or a `PyDataset` of (texts, targets[, weights]), whose `workers`
                are threads; or, on TensorFlow, a `tf.data.Dataset` of finished batches, which is taken as it is.
            y: targets, as the task defines them.
            batch_size: rows per step; 32 unless given.
            sample_weight: a weight per row (B,).
            validation_data: (x, y) or (x, y, sample_weight) in the same forms, or a dataset.
            validation_split: last share of the rows to hold out, for lists and arrays; `validation_data` goes before.
            validation_batch_size: rows per step of `validation_data`; `batch_size` unless given.
            packing: put several texts of a language model into one row of the preprocessor's `sequence_length`, so
                that next to no padding is computed. No text sees another, and the loss of all is the same. A batch
                of rows then holds many texts.
            initial_epoch: the epoch to begin with, whose order of the rows it is, too.
            resume: a directory that keeps the state after each epoch, in `training.safetensors`. If one is there
                already, training goes on from it and ends as it would have without the interruption: weights,
                optimiser, schedule, random states, order of the rows, early stopping, history.
            **kwargs: everything else that Keras' `fit` takes.

        Raises:
            ValueError: for a text that is empty or no string, or targets that do not fit, named by row; for texts or
                token ids longer than the backbone's context, but in a `tf.data.Dataset`; for a state in `resume` of
                another model, of other data, or cut short; for arguments beside a dataset that its batches hold; or if
                the task is not compiled.
        """
        self.check_compiled()
        half = {v.dtype for v in self.trainable_variables} & {"bfloat16", "float16"}
        if half:
            warnings.warn(
                f"The weights that are trained are {half.pop()}, which loses small updates; bfloat16 loses all of "
                "Adam's, whose 0.999 is 1 there. "
                'Load or build the model with dtype="mixed_bfloat16" or "float32" to train it.',
                stacklevel=2,
            )
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = hold_out(validation_split, x, y, sample_weight)
        seed = int(np.random.randint(2**31)) if shuffle else None  # from `keras.utils.set_random_seed`
        state = None if resume is None else TrainingState(resume)
        seed = seed if state is None or state.seed is None else state.seed
        data = self._dataset(x, y, sample_weight, batch_size, shuffle_seed=seed, training=True, packing=packing)
        source = backend.source_of(data)
        if source is None and resume is not None:
            raise invalid("`resume` needs lists, arrays or a PyDataset, whose order it keeps.", x=type(x).__name__)
        if validation_data is not None:
            held = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
            x, y, sample_weight = (*held, None, None)[:3]
            if validation_batch_size is None and not is_dataset(x):
                validation_batch_size = batch_size
            validation_data = self._dataset(
                x, y, sample_weight, validation_batch_size, argument="validation_data", packing=packing
            )
        backend.build_optimizer(self)
        callbacks = keras.tree.flatten(callbacks or [])
        if state is not None:
            held = backend.source_of(validation_data)
            given = {"data": source.digest(), "validation_data": None if held is None else held.digest()}
            given["class_weight"] = sorted((kwargs.get("class_weight") or {}).items())
            state.begin(self, seed, given, callbacks)
            initial_epoch, epochs = state.epoch, state.epoch if state.stopped else epochs
            callbacks.append(state)
        if source is not None:
            source.start(initial_epoch)
        options = {"validation_data": validation_data, "callbacks": callbacks, **kwargs}
        history = super().fit(data, epochs=epochs, initial_epoch=initial_epoch, shuffle=False, **options)
        if state is not None:
            history.epoch, history.history = list(range(state.epoch)), state.history
        return history

    def check_compiled(self):
        """Raises a `ValueError` unless the task is compiled."""
        if not self.compiled:
            raise invalid("The task must be compiled to be trained.", "Call `compile()` first.", compiled=False)

    def evaluate(self, x=None, y=None, batch_size=None, *, sample_weight=None, **kwargs):
        """Keras' `evaluate` on what `fit` takes."""
        return super().evaluate(self._dataset(x, y, sample_weight, batch_size), **kwargs)

    def predict(self, x, batch_size=None, **kwargs):
        """Logits, float32, a row for each text or row of token ids, in their order."""
        if isinstance(x, keras.utils.PyDataset):
            return super().predict(self._dataset(x, batch_size=batch_size, predicting=True), **kwargs)
        rows = self._rows(x, predicting=True, one_length=len(self.output_shape) == 3)
        return in_order(super().predict, rows, batch_size, **kwargs)

    def export(self, filepath, *, format="tf_saved_model", overwrite=False, versioned=False, jit=False):
        """Writes a TensorFlow SavedModel that needs nothing but TensorFlow; see docs/serving.md for its signatures.

        Strings go in and strings or probabilities come out, with the ids and numbers of this task; without a
        preprocessor it takes token ids, and a warning says so. Weights are stored once, beside `keras_llama.json`,
        which names task, labels, limits and versions. On JAX and torch a TensorFlow process writes it.
        With `format="onnx"` (which OpenVINO reads, too; written by torch) or "litert" (written by TensorFlow) it is a
        file of the forward pass, token ids in and logits out, of any batch and length.

        Args:
            filepath: a directory, for ONNX and LiteRT a file; written beside and then renamed.
            format: "tf_saved_model", "onnx" or "litert".
            overwrite: whether what `filepath` holds may be replaced.
            versioned: write `filepath/1`, as TensorFlow Serving expects it.
            jit: have XLA compile what the model does, once for each batch size and bucket of lengths.

        Raises:
            ValueError: if `filepath` holds files and `overwrite` is not set, for a vocabulary whose ids a graph
                would not give exactly, or for a format that is not known to work.
            OSError: if it cannot be written, such as on a full disk.
            RuntimeError: if the process of the other backend fails.

        >>> trained = keras_llama.SentencePieceTokenizer.train(["good film", "bad film"] * 9, vocabulary_size=280)
        >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=280, **keras_llama.size("tiny"))
        >>> lm = keras_llama.LlamaCausalLM(backbone, keras_llama.TextPreprocessor(trained, 32))
        >>> lm.export("served")
        """
        if format == "tf_saved_model":
            saved_model.export(self, filepath, overwrite, versioned, jit)
            return
        if format not in forward.FORMATS:
            hint = 'OpenVINO reads the file of format="onnx".' if format == "openvino" else ""
            raise invalid('`format` must be "tf_saved_model", "onnx" or "litert".', hint, format=format)
        if versioned or jit:
            raise invalid("`versioned` and `jit` are of SavedModels.", versioned=versioned, jit=jit, format=format)
        forward.export(self, filepath, format, overwrite)

    def serving(self, text):
        """The `Signature`s of the SavedModel by name, the default one first; `text` is a `GraphText` or `None`."""

        def logits(*values):
            inputs = dict(zip(self.input, values, strict=True))
            return {"logits": keras.Model.__call__(self, inputs, training=False)}

        of_ids = {"logits": Signature(logits, dict.fromkeys(self.input, IDS))}
        if text is None:
            return of_ids
        return {
            **of_ids,
            "tokenize": Signature(text.tokenize, {"texts": STRINGS}),
            "detokenize": Signature(text.detokenize, {"token_ids": IDS, "lengths": NUMBERS}),
        }


def in_order(predict, rows, batch_size=None, **kwargs):
    """What `predict` makes of rows as `_rows` gives them, in their order; it gets rows of like length together."""
    inputs, lengths = rows
    batches = Batches(inputs, lengths, lambda inputs, *_: (inputs,), batch_size=rows_per_step(batch_size))
    outputs = predict(backend.stream(batches), **kwargs)
    restored = np.empty_like(outputs)
    restored[batches.order] = outputs
    return restored


def hold_out(share, x, y, sample_weight):
    """Splits the last `share` of the rows off: ((x, y, w) to train on, (x, y, w) to validate on)."""
    if not 0 < share < 1 or is_dataset(x):
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
