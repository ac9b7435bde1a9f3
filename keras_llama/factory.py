"""create_llama_model: a LLaMA as a plain Keras model over registered layers, ready for `compile` and `fit`.

Shapes: B batch, T tokens, D hidden, V vocabulary, C classes.
"""

import keras
import numpy as np
from keras import ops

from keras_llama import backend
from keras_llama.backbone import LlamaBackbone
from keras_llama.config import invalid
from keras_llama.config import size as named_size
from keras_llama.heads.text_classifier import Pooling
from keras_llama.layers import kernel_initializer, register
from keras_llama.seq2seq_backbone import INPUTS, LlamaSeq2SeqBackbone

TASKS = ("language_model", "classification", "regression", "translation")


@register
class PaddingMask(keras.layers.Layer):
    """Token ids (B, T) -> padding mask int32 (B, T): 0 where the id is 0, else 1."""

    def call(self, token_ids):
        return ops.cast(ops.not_equal(token_ids, 0), "int32")


@register
class MaskPadding(keras.layers.Layer):
    """[hidden states (B, T, D), padding mask (B, T)] -> the hidden states, carrying the mask as Keras' own.

    Keras' losses and metrics then take the mean over the real tokens.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs):
        return inputs[0]

    def compute_mask(self, inputs, previous_mask=None):
        return ops.not_equal(inputs[1], 0)


@register
class LlamaModel(keras.Model):
    """A functional Keras model that every file format keeps whole, as `create_llama_model` returns it."""

    def compile(self, optimizer="rmsprop", loss=None, *args, **kwargs):
        """Keras' `compile`; "mse" and its like become objects, because Keras cannot load their names from .h5."""
        self.dtype_policy = self.get_layer("backbone").dtype_policy  # mixed_float16 scales the loss by it
        if isinstance(loss, str):
            loss = _REGRESSION_LOSSES[loss]() if loss in _REGRESSION_LOSSES else loss
        super().compile(optimizer, loss, *args, **kwargs)
        backend.prepare_updates(self.optimizer, by_xla=False)

    def fit(self, x=None, y=None, *args, **kwargs):
        self._check(x, y)
        return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        self._check(x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        self._check(x)
        return super().predict(x, *args, **kwargs)

    def _check(self, x, y=None):
        """Ids and class numbers in arrays must be of the vocabulary and the classes: not every backend looks."""
        outputs = self.output_shape[-1]
        several = isinstance(x, (list, tuple)) and len(self.inputs) > 1
        parts = x.values() if isinstance(x, dict) else x if several else [x]
        sparse = str(getattr(self, "loss", "")).startswith("sparse") or "Sparse" in type(self.loss).__name__
        limits = [("x", part, self.get_layer("backbone").config.vocabulary_size, "a vocabulary") for part in parts]
        limits += [("y", y, outputs, "outputs")] if sparse else []
        for name, values, limit, what in limits:
            if not isinstance(values, (np.ndarray, list, tuple)):
                continue
            values = np.asarray(values)
            if values.size and values.dtype.kind in "iuf" and not (values.min() >= 0 and values.max() < limit):
                raise invalid(
                    f"`{name}` must hold numbers from 0 to {limit - 1}, for {what} of {limit}.",
                    smallest=values.min().item(),
                    largest=values.max().item(),
                )

    def get_compile_config(self):
        """Names the optimiser even after a save to .h5, which takes it out of Keras' own settings."""
        config = super().get_compile_config()
        return {"optimizer": keras.saving.serialize_keras_object(self.optimizer), **config} if config else config

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)


keras.saving.get_custom_objects()["LlamaModel"] = LlamaModel  # an .h5 file names the class without its package

_REGRESSION_LOSSES = {
    "mse": keras.losses.MeanSquaredError,
    "mean_squared_error": keras.losses.MeanSquaredError,
    "mae": keras.losses.MeanAbsoluteError,
    "mean_absolute_error": keras.losses.MeanAbsoluteError,
    "mape": keras.losses.MeanAbsolutePercentageError,
    "mean_absolute_percentage_error": keras.losses.MeanAbsolutePercentageError,
    "msle": keras.losses.MeanSquaredLogarithmicError,
    "mean_squared_logarithmic_error": keras.losses.MeanSquaredLogarithmicError,
}


def create_llama_model(
    task="language_model",
    *,
    vocabulary_size=10_000,
    num_classes=None,
    sequence_length=None,
    size="tiny",
    dropout=0.0,
    pooling="mean",
    dtype=None,
):
    """A functional Keras model over registered layers: token ids (B, T), 0 = padding on either side -> probabilities.

    It takes what Keras' own models take: string losses and metrics, `.keras` and `.h5` files.
    For raw strings, text generation and checkpoints use the task classes instead.

    Args:
        task: "language_model", causal, -> probabilities of the next token (B, T, V);
            "classification", bidirectional, -> probabilities (B, C);
            "regression", bidirectional, -> numbers (B, C);
            "translation", an encoder-decoder: two inputs, `[source ids (B, S), target ids (B, T)]` or a dict of
            `encoder_token_ids` and `decoder_token_ids`, -> probabilities of the next target token (B, T, V).
        vocabulary_size: V, number of token ids, 0 (padding) included.
        num_classes: C; needed for classification, 1 unless given for regression.
        sequence_length: T (and S), or `None` for any length.
        size: a named size: "tiny", "small", "base", or "0.1m" to "1b" parameters in the blocks.
        dropout: rate on embeddings, sub-layer outputs and the pooled vector while training.
        pooling: "mean" of the real tokens or "last" one; classification and regression.
        dtype: a Keras dtype policy or its name; outputs are float32 under any.

    Raises:
        ValueError: for an unknown task, size or pooling, or a number out of range.

    >>> model = keras_llama.create_llama_model(task="classification", num_classes=3, sequence_length=100)
    >>> model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    >>> model.predict(np.ones((2, 100)), verbose=0).shape
    (2, 3)
    """
    if task not in TASKS:
        raise invalid(f"`task` must be one of {list(TASKS)}.", task=task)
    if sequence_length is not None and (not isinstance(sequence_length, int) or sequence_length < 1):
        raise invalid("`sequence_length` must be a positive integer or None.", sequence_length=sequence_length)
    outputs = _number_of_outputs(task, vocabulary_size, num_classes)
    if task == "translation":
        inputs, x = _translation_graph(vocabulary_size, sequence_length, size, dropout, dtype)
    else:
        inputs, x = _graph(task, vocabulary_size, sequence_length, size, dropout, pooling, dtype)
    activation = None if task == "regression" else "softmax"
    head = keras.layers.Dense(
        outputs, activation=activation, kernel_initializer=kernel_initializer(), dtype="float32", name="output"
    )
    return LlamaModel(inputs, head(x), name=f"llama_{task}")


def _graph(task, vocabulary_size, sequence_length, size, dropout, pooling, dtype):
    token_ids = keras.Input((sequence_length,), dtype="int32", name="token_ids")
    padding_mask = PaddingMask(name="padding_mask", dtype=dtype)(token_ids)
    backbone = LlamaBackbone(
        vocabulary_size=vocabulary_size,
        **named_size(size),
        dropout=dropout,
        causal=task == "language_model",
        dtype=dtype,
        name="backbone",
    )
    x = backbone({"token_ids": token_ids, "padding_mask": padding_mask})
    if task == "language_model":
        x = MaskPadding(name="mask_padding", dtype=dtype)([x, padding_mask])
    else:
        x = Pooling(pooling, name="pooling", dtype=dtype)(x, padding_mask)
        x = keras.layers.Dropout(dropout, name="pooled_dropout", dtype=dtype)(x)
    return token_ids, x


def _translation_graph(vocabulary_size, sequence_length, size, dropout, dtype):
    ids = {name: keras.Input((sequence_length,), dtype="int32", name=name) for name in INPUTS[::2]}
    masks = {
        mask: PaddingMask(name=mask, dtype=dtype)(ids[name])
        for name, mask in zip(INPUTS[::2], INPUTS[1::2], strict=True)
    }
    backbone = LlamaSeq2SeqBackbone(
        vocabulary_size=vocabulary_size, **named_size(size), dropout=dropout, dtype=dtype, name="backbone"
    )
    x = backbone({**ids, **masks})
    return list(ids.values()), MaskPadding(name="mask_padding", dtype=dtype)([x, masks["decoder_padding_mask"]])


def _number_of_outputs(task, vocabulary_size, num_classes):
    if task in ("language_model", "translation"):
        return vocabulary_size
    if num_classes is None and task == "regression":
        return 1
    fewest = 2 if task == "classification" else 1
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < fewest:
        raise invalid(f"`num_classes` must be an integer of at least {fewest}.", num_classes=num_classes, task=task)
    return num_classes
