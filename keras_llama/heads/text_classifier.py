"""LlamaTextClassifier: labels of texts on a LLaMA backbone. Shapes: B batch, T tokens, D hidden, C classes."""

import keras
import numpy as np
from keras import ops

from keras_llama import backend
from keras_llama.checkpoints import hf
from keras_llama.config import invalid
from keras_llama.export.saved_model import STRINGS, Signature
from keras_llama.heads.head_task import HeadTask
from keras_llama.layers import kernel_initializer, register
from keras_llama.losses import PassDivergence

POOLINGS = ("last", "mean")
PROBLEM_TYPES = ("single", "multi", "regression")
_OPTIONS = ("labels", "num_classes", "problem_type", "pooling", "dropout", "r_drop")


@register
class Pooling(keras.layers.Layer):
    """Hidden states (B, T, D) and padding mask (B, T) -> one vector per text (B, D).

    "last" takes the rightmost real token, found by the mask, never by an id; "mean" averages the
    real tokens in float32. A row of nothing but padding gives column 0, or zeros.
    """

    def __init__(self, mode="last", **kwargs):
        if mode not in POOLINGS:
            raise invalid(f"`pooling` must be one of {list(POOLINGS)}.", pooling=mode)
        super().__init__(**kwargs)
        self.mode = mode

    def call(self, hidden, padding_mask):
        real = ops.cast(ops.greater(padding_mask, 0), "int32")
        if self.mode == "last":
            columns = ops.arange(ops.shape(padding_mask)[1], dtype="int32")
            last = ops.max(real * columns, axis=1)  # (B,)
            return ops.squeeze(ops.take_along_axis(hidden, ops.expand_dims(last, (1, 2)), axis=1), 1)
        weights = ops.expand_dims(ops.cast(real, "float32"), -1)
        total = ops.sum(ops.cast(hidden, "float32") * weights, axis=1)
        return ops.cast(total / ops.maximum(ops.sum(weights, axis=1), 1.0), hidden.dtype)

    def get_config(self):
        return {**super().get_config(), "mode": self.mode}


@register
class LlamaTextClassifier(HeadTask):
    """Texts -> logits (B, C), float32; `classify` gives labels and scores.

    Args:
        backbone: a `LlamaBackbone`, causal or not.
        num_classes: C; may be left out where `labels` says it (regression: 1 unless given).
        labels: names of the classes, in the order of the logits; targets may then be names.
        problem_type: "single" (one label per text), "multi" (any number of labels) or
            "regression" (C numbers, mean squared error).
        preprocessor: a `TextPreprocessor`, or `None` to take token ids.
        pooling: "last" real token, as `LlamaForSequenceClassification`, or "mean" of the real tokens.
        dropout: rate on the pooled vector while training.
        r_drop: weight in the loss of how much two passes over a batch differ by what each drops out (Wu et al., 2021,
            https://arxiv.org/abs/2106.14448, whose alpha is twice that); their cross-entropy is the mean of both.
            Above 0 a step of training takes up to twice the time; without any dropout it changes nothing. An attribute,
            too, to be set before `compile`.

    Targets: "single" a class number or label name per text, or one-hot rows (B, C); "multi" a list
    of names per text, or rows of 0 and 1 (B, C); "regression" numbers (B,) or (B, C).

    Raises:
        ValueError: for fewer than two classes, labels that do not match, an unknown option, or `r_drop` below 0 or of a
            regression.

    >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
    >>> classifier = keras_llama.LlamaTextClassifier(backbone, num_classes=3)
    >>> classifier.predict(np.array([[5, 8, 2]]), verbose=0).shape
    (1, 3)
    """

    def __init__(
        self,
        backbone,
        num_classes=None,
        labels=None,
        problem_type="single",
        preprocessor=None,
        pooling="last",
        dropout=0.0,
        r_drop=0.0,
        **kwargs,
    ):
        if problem_type not in PROBLEM_TYPES:
            raise invalid(f"`problem_type` must be one of {list(PROBLEM_TYPES)}.", problem_type=problem_type)
        labels, num_classes = _check_classes(labels, num_classes, problem_type)
        _check_r_drop(r_drop, problem_type)
        policy = backbone.dtype_policy
        pooled = Pooling(pooling, dtype=policy, name="pooling")(
            backbone(backbone.input), backbone.input["padding_mask"]
        )
        pooled = keras.layers.Dropout(dropout, dtype=policy, name="pooled_dropout")(pooled)
        options = {"use_bias": False, "kernel_initializer": kernel_initializer(), "name": "score"}
        # Beside a frozen base the head is still trained.
        score = keras.layers.Dense(num_classes, **options, dtype=backend.with_float32_weights(policy))
        logits = score(pooled)
        logits = keras.layers.Activation("linear", dtype="float32", name="logits")(logits)
        super().__init__(backbone, preprocessor, logits, **kwargs)
        self._describe(num_classes, labels, problem_type)
        self.pooling = pooling
        self.dropout = dropout
        self.r_drop = r_drop

    head = "score"
    before_head = "pooled_dropout"

    def _describe(self, num_classes, labels, problem_type):
        self.num_classes = num_classes
        self.labels = labels
        self._label_numbers = {label: i for i, label in enumerate(labels or [])}
        self.problem_type = problem_type

    @classmethod
    def preset_options(cls, checkpoint, preprocessor):
        return {name: checkpoint.options[name] for name in _OPTIONS if name in checkpoint.options}

    def checkpoint_settings(self):
        settings = super().checkpoint_settings()
        labels = self.labels or [f"LABEL_{i}" for i in range(self.num_classes)]
        settings["fields"] |= {
            "architectures": ["LlamaForSequenceClassification"],
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": hf.PROBLEM_TYPES[self.problem_type],
        }
        settings["options"] = {name: getattr(self, name) for name in _OPTIONS}
        if self.pooling != "last":
            settings["differs"] = settings["differs"] or f"pooling={self.pooling!r}"
        return settings

    def default_loss(self):
        return {
            "single": keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float32"),
            "multi": keras.losses.BinaryCrossentropy(from_logits=True, dtype="float32"),
            "regression": keras.losses.MeanSquaredError(dtype="float32"),
        }[self.problem_type]

    def losses_by_name(self):
        options = {"from_logits": True, "dtype": "float32"}
        return {
            "sparse_categorical_crossentropy": keras.losses.SparseCategoricalCrossentropy(**options),
            "categorical_crossentropy": keras.losses.CategoricalCrossentropy(**options),
            "binary_crossentropy": keras.losses.BinaryCrossentropy(**options),
        }

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not (training and self.r_drop):
            return loss
        again = self(x, training=True)
        both = loss + super().compute_loss(x, y, again, sample_weight, training)
        divergence = PassDivergence(self.probabilities, ops.sum if self.problem_type == "single" else ops.mean)
        return both / 2 + self.r_drop * divergence(again, y_pred, sample_weight)

    def default_metrics(self):
        metrics = ["mean_absolute_error"] if self.problem_type == "regression" else ["accuracy"]
        return {"metrics": metrics, "weighted_metrics": None}

    def metrics_by_name(self):
        metrics = keras.metrics
        named = {
            "sparse_categorical_crossentropy": metrics.SparseCategoricalCrossentropy(from_logits=True),
            "categorical_crossentropy": metrics.CategoricalCrossentropy(from_logits=True),
            "binary_crossentropy": metrics.BinaryCrossentropy(from_logits=True),
            "auc": metrics.AUC(from_logits=True),
        }
        if self.problem_type == "multi":  # a logit of 0 is a probability of 1/2
            named |= {
                name: metrics.BinaryAccuracy(name=name, threshold=0.0) for name in ("accuracy", "binary_accuracy")
            }
            named |= {"precision": metrics.Precision(thresholds=0.0), "recall": metrics.Recall(thresholds=0.0)}
        return named

    def check_targets(self, y, rows, training=False):
        if y is None:
            raise invalid("`y` must hold a target for each text.", y=None)
        y = np.asarray(y) if hasattr(y, "shape") else list(y)
        if len(y) != rows:
            raise invalid("`y` must have a row for each text.", texts=rows, targets=len(y))
        if self.problem_type == "regression":
            return _numbers(y, (rows, self.num_classes))
        if self.problem_type == "multi":
            return self._multi_targets(y, rows)
        return self._single_targets(y, rows, training)

    def classify(self, texts, batch_size=None):
        """Labels and scores of texts, one dict each, in their order; a single string gives one dict.

        Args:
            texts: a string, or a list or array of strings.
            batch_size: texts per step; 32 unless given.

        Returns:
            "single": `{"label", "score"}`, the most likely class and its probability.
            "multi": `{"labels", "scores"}`, the classes of probability 1/2 or more.
            "regression": `{"score"}`, the number, or the list of C numbers.
            Labels are names if the classifier has them, else class numbers.

        Raises:
            ValueError: for a text that is empty or no string.
        """
        if isinstance(texts, str):
            return self.classify([texts], batch_size)[0]
        logits = self.predict(texts, batch_size=batch_size, verbose=0)
        if self.problem_type == "regression":
            return [{"score": row[0] if len(row) == 1 else row} for row in logits.tolist()]
        names = self.labels or list(range(self.num_classes))
        rows = ops.convert_to_numpy(self.probabilities(logits))
        if self.problem_type == "single":
            return [{"label": names[row.argmax()], "score": float(row.max())} for row in rows]
        chosen = [np.flatnonzero(row >= 0.5) for row in rows]
        return [
            {"labels": [names[i] for i in one], "scores": row[one].tolist()}
            for one, row in zip(chosen, rows, strict=True)
        ]

    def probabilities(self, logits):
        """Logits (B, C) -> probabilities (B, C): softmax, or a sigmoid each for "multi"; numbers stay numbers."""
        if self.problem_type == "regression":
            return ops.convert_to_tensor(logits)
        return ops.softmax(logits, axis=-1) if self.problem_type == "single" else ops.sigmoid(logits)

    def serving(self, text):
        if text is None:
            return super().serving(text)
        names = text.constant(self.labels or [str(i) for i in range(self.num_classes)])

        @text.compiled
        def answered(token_ids, padding_mask):
            inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
            return self.probabilities(keras.Model.__call__(self, inputs, training=False))

        def classify(texts):
            probabilities = answered(*text.encode(texts))
            answer = {"probabilities": probabilities}
            if self.problem_type != "regression":
                answer["label_names"] = names
            if self.problem_type == "single":
                answer["labels"] = text.at(names, ops.argmax(probabilities, axis=-1))
            return answer

        return {"classify": Signature(classify, {"texts": STRINGS}), **super().serving(text)}

    def get_config(self):
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "labels": self.labels,
            "problem_type": self.problem_type,
            "pooling": self.pooling,
            "dropout": self.dropout,
            "r_drop": self.r_drop,
        }

    def _class_number(self, target, row):
        """The class number of one target: a label name, or a number already."""
        if isinstance(target, (str, bytes)):
            name = target.decode() if isinstance(target, bytes) else str(target)
            if self.labels is None or name not in self._label_numbers:
                raise invalid(
                    f"`y[{row}]` must be one of `labels`, which is {self.labels}.",
                    "Pass every label that occurs when building the classifier.",
                    label=name,
                )
            return self._label_numbers[name]
        number = int(target) if isinstance(target, (int, float, np.number)) and float(target).is_integer() else -1
        if not 0 <= number < self.num_classes:
            raise invalid(f"`y[{row}]` must be a class from 0 to {self.num_classes - 1}.", label=target)
        return number

    def _single_targets(self, y, rows, training):
        """Class numbers (B,); or rows of class probabilities (B, C) where the loss asks for them."""
        wants_rows = isinstance(getattr(self, "loss", None), keras.losses.CategoricalCrossentropy)
        y = np.asarray(y)[:, 0] if np.shape(y) == (rows, 1) else y  # a column of class numbers
        if np.ndim(y[0]) == 1:
            shares = _numbers(y, (rows, self.num_classes))
            numbers = shares.argmax(axis=1)
            if not wants_rows and not np.array_equal(shares, np.eye(self.num_classes)[numbers]):
                raise invalid('`y` with rows of class shares needs loss="categorical_crossentropy".', y=shares[0])
        else:
            numbers = np.array([self._class_number(target, i) for i, target in enumerate(y)], "int32")
            shares = np.eye(self.num_classes, dtype="float32")[numbers] if wants_rows else None
        if training and len(set(numbers.tolist())) < 2:
            raise invalid("`y` must hold at least two classes to train on.", only_class=int(numbers[0]))
        return shares if wants_rows else numbers.astype("int32")

    def _multi_targets(self, y, rows):
        """Rows of 0 and 1 (B, C), from such rows or from a list of label names per text."""
        for i, names in enumerate(y):
            if isinstance(names, (str, bytes)) or not hasattr(names, "__iter__"):
                raise invalid(f"`y[{i}]` must be a list of labels.", "Put a single label into a list.", labels=names)
        if not all(isinstance(name, (str, bytes)) for names in y for name in names):
            targets = _numbers(y, (rows, self.num_classes))
            if not np.isin(targets, (0, 1)).all():
                raise invalid("`y` must hold 0 and 1 only.", values=np.unique(targets)[:5].tolist())
            return targets
        targets = np.zeros((rows, self.num_classes), "float32")
        for i, names in enumerate(y):
            for name in names:
                targets[i, self._class_number(name, i)] = 1
        return targets


def _check_classes(labels, num_classes, problem_type):
    if labels is not None:
        labels = list(labels)
        if not all(isinstance(label, str) for label in labels):
            raise invalid("`labels` must be strings: a number in `y` is the place of a label in them.", labels=labels)
        if len(set(labels)) != len(labels) or (num_classes is not None and num_classes != len(labels)):
            raise invalid("`labels` must be distinct, one for each class.", labels=labels, num_classes=num_classes)
        num_classes = len(labels)
    if num_classes is None and problem_type == "regression":
        num_classes = 1
    fewest = 2 if problem_type == "single" else 1
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < fewest:
        raise invalid(
            f"`num_classes` must be an integer of at least {fewest} for this problem.",
            "Pass `num_classes` or `labels`.",
            num_classes=num_classes,
            labels=labels,
        )
    return labels, num_classes


def _check_r_drop(r_drop, problem_type):
    if isinstance(r_drop, bool) or not isinstance(r_drop, (int, float)) or not 0 <= r_drop < float("inf"):
        raise invalid("`r_drop` must be a number of at least 0.", r_drop=r_drop)
    if r_drop and problem_type == "regression":
        raise invalid("`r_drop` must be 0 for a regression, which has no probabilities.", r_drop=r_drop)


def _numbers(y, shape):
    """Targets as finite float32 numbers of the given shape (B, C); (B,) will do for one class."""
    try:
        numbers = np.asarray(y, "float32")
    except (TypeError, ValueError) as error:
        raise invalid(f"`y` must hold numbers of shape {shape}.", str(error), y=y[0]) from error
    if numbers.ndim == 1 and shape[1] == 1:
        numbers = numbers[:, None]
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise invalid(f"`y` must hold finite numbers of shape {shape}.", shape=numbers.shape)
    return numbers
