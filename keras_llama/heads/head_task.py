"""HeadTask: a head of its own, which can be trained alone. Shapes: B batch, T tokens, D hidden, N texts, W windows."""

import functools

import keras
import numpy as np

from keras_llama.config import invalid
from keras_llama.heads.inputs import row_weights, rows_per_step
from keras_llama.heads.task import Task, hold_out, in_order


class HeadTask(Task):
    """A task whose head reads vectors, (B, D) of texts or (B, T, D) of tokens: the input of the layer `before_head`."""

    before_head: str
    r_drop = 0.0  # a second pass over each batch of `fit`, as a classifier may have it

    @property
    def head_input(self):
        """The tensor that the head reads."""
        return self.get_layer(self.before_head).input

    def features(self, x, batch_size=None):
        """The vectors that the head reads, in the order of the texts or rows of token ids: (N, D).

        Of questions they are (W, T, D): the windows of all of them, T as long as the longest.

        Args:
            x: what `predict` takes.
            batch_size: rows per step; 32 unless given.

        Raises:
            ValueError: for a text that is empty or no string, or longer than the backbone's context.

        >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
        >>> classifier = keras_llama.LlamaTextClassifier(backbone, num_classes=3)
        >>> classifier.features(np.array([[5, 8, 2]])).shape
        (1, 128)
        """
        return self._vectors(self._rows(x, predicting=True, one_length=self._of_tokens), batch_size)

    def fit_head(
        self,
        x,
        y,
        batch_size=None,
        epochs=1,
        *,
        sample_weight=None,
        validation_data=None,
        validation_split=0.0,
        **kwargs,
    ):
        """Freezes all but the head and trains that: `features` of each text are computed once, not in each epoch.

        It is what `freeze_base()` and `fit` would do with a backbone that drops nothing out.

        Args:
            x, y, batch_size, epochs, sample_weight, validation_data, validation_split: as `fit` takes them, but no
                `PyDataset`; instead of texts also their vectors (N, D), as `features` gives them.
            **kwargs: everything else that Keras' `fit` takes.

        Returns:
            The `History`. Callbacks see the model of the head alone, whose layers are this one's.

        Raises:
            ValueError: as `fit`, if the task is not compiled, or if it has `r_drop`, a second pass.

        >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
        >>> classifier = keras_llama.LlamaTextClassifier(backbone, num_classes=2)
        >>> classifier.compile()
        >>> history = classifier.fit_head(np.array([[5, 8, 2], [7, 3, 3]]), [0, 1], epochs=2, verbose=0)
        >>> len(history.history["loss"])
        2
        """
        self.check_compiled()
        batch_size = rows_per_step(batch_size)
        if self.r_drop:
            hint = "Set `r_drop = 0`, or take `freeze_base()` and `fit`, which make two."
            raise invalid("`fit_head` makes one pass over vectors.", hint, r_drop=self.r_drop)
        if unknown := {"resume", "packing"} & set(kwargs):
            raise invalid("`fit_head` has no such options.", "`freeze_base()` and `fit` do.", options=sorted(unknown))
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = hold_out(validation_split, x, y, sample_weight)
        parts = [self._checked(x, y, sample_weight, training=True)]
        if validation_data is not None:
            given = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
            x, y, sample_weight = (*given, None, None)[:3]
            parts.append(self._checked(x, y, sample_weight, argument="validation_data"))
        computed = [(self._vectors(rows, batch_size), targets, weights) for rows, targets, weights in parts]
        self.freeze_base()
        head = keras.Model(self.head_input, self.output)
        head.dtype_policy = self.dtype_policy  # which decides whether the loss is scaled
        head.compile(self.optimizer, **{**self.compile_options, "jit_compile": self.jit_compile})
        vectors, targets, weights = computed[0]
        held = computed[1] if len(computed) > 1 else None
        options = {"validation_data": held, "batch_size": batch_size, "epochs": epochs, **kwargs}
        return head.fit(vectors, targets, sample_weight=weights, **options)

    @property
    def _of_tokens(self):
        return len(self.head_input.shape) == 3

    def _checked(self, x, y, sample_weight, argument="x", training=False):
        """Rows as `_rows` gives them, or vectors, with targets and weights of the user's data."""
        if isinstance(x, keras.utils.PyDataset):
            raise invalid(
                f"`{argument}` must be texts or token ids in memory, as their vectors will be.",
                "`freeze_base()` and `fit` read a PyDataset.",
                **{argument: type(x).__name__},
            )
        if isinstance(x, np.ndarray) and keras.backend.is_float_dtype(x.dtype.name) and not self._of_tokens:
            shape = (len(x), *self.head_input.shape[1:])
            if x.shape != shape:
                raise invalid(f"`{argument}` must hold vectors of shape {shape}.", **{argument: x.shape})
            return x, self.check_targets(y, len(x), training), row_weights(sample_weight, len(x))
        x, y = self.join(x, y)
        batch, lengths = self._rows(x, argument, one_length=self._of_tokens)
        count = len(lengths)
        targets, weights = self.check_targets(y, count, training), row_weights(sample_weight, count)
        if self._of_tokens:  # whose targets stand beside the ids
            _, targets, weights = self.finish_batch(batch(np.arange(count)), targets, weights)
        return (batch, lengths), targets, weights

    def _vectors(self, rows, batch_size):
        if isinstance(rows, np.ndarray):
            return rows
        batch, lengths = rows

        def inputs(chosen):
            return {name: array for name, array in batch(chosen).items() if name in self.input}

        return in_order(self._until_head.predict, (inputs, lengths), batch_size, verbose=0)

    @functools.cached_property
    def _until_head(self):
        return keras.Model(self.input, self.head_input)
