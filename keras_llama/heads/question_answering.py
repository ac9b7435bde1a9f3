"""LlamaQuestionAnswering: the part of a context that answers a question, on a LLaMA backbone.

Shapes: B batch, T tokens, W windows.
"""

from collections import Counter

import keras
import numpy as np

from keras_llama import backend
from keras_llama.config import invalid
from keras_llama.export.graph_spans import GraphSpans
from keras_llama.export.saved_model import STRINGS, Signature
from keras_llama.heads.head_task import HeadTask
from keras_llama.layers import kernel_initializer, register
from keras_llama.losses import SpanAccuracy, SpanCrossentropy
from keras_llama.overlap import QuestionOverlap
from keras_llama.questions import Windows, best_answers, questions, separator, training_columns, windows
from keras_llama.scores import answer_scores

_OPTIONS = ("stride", "max_answer_length", "no_answer_threshold", "dropout", "question_overlap")


@register
class LlamaQuestionAnswering(HeadTask):
    """Questions and contexts -> logits (W, T, 2) of where the answer starts and ends, float32; `answer` gives answers.

    A context that is too long for a row goes into several, its windows: `[begin] question end context end`. An answer
    is a part of the context; the last token stands for none in this window. `fit` and `evaluate` take lists of
    `{"question", "context", "answers"}`, or a dict of such columns, with the answers in it or as `y`: strings, or dicts
    of `text` and `answer_start` as SQuAD has them; [] for none. Where a string stands several times, each place is
    right. A `PyDataset` gives such lists: a step takes all windows of the questions in one, less those that teach
    nothing.

    Args:
        backbone: a `LlamaBackbone`, causal or not.
        preprocessor: a `TextPreprocessor`, whose `sequence_length` is that of a window; or `None` to take token ids,
            with targets (B, 2), the places of the first and the last token.
        stride: tokens of the context that a window shares with the one before, at most half of what it holds.
        max_answer_length: most tokens of an answer that is given.
        no_answer_threshold: `None` always gives an answer. A number gives none where the logarithm of its probability,
            the least of all windows, is so much above that of the best answer (Rajpurkar et al., 2018,
            https://arxiv.org/abs/1806.03822); only then `fit` takes questions without answers.
        dropout: rate on the hidden states before the head while training.
        question_overlap: whether tokens are told, beside their embedding, that the question has them, too
            (`QuestionOverlap`): for a model from scratch. Other tools know no such checkpoint. `True`, or the id of
            the token that ends the question.

    Raises:
        ValueError: for a number out of range, or a preprocessor that leaves no room or has no token to part texts by.

    >>> texts = ["The cat sat on the mat. Who sat?"] * 9
    >>> tokenizer = keras_llama.SentencePieceTokenizer.train(texts, vocabulary_size=280)
    >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=280, **keras_llama.size("tiny"), causal=False)
    >>> reader = keras_llama.LlamaQuestionAnswering(backbone, keras_llama.TextPreprocessor(tokenizer, 64))
    >>> reader.compile()
    >>> row = {"question": "Who sat?", "context": "The cat sat on the mat.", "answers": ["The cat"]}
    >>> history = reader.fit([row] * 8, epochs=20, verbose=0)
    >>> answer = reader.answer("Who sat?", "The cat sat on the mat.")
    >>> answer["text"], answer["start"], answer["end"]
    ('The cat', 0, 7)
    """

    head = "qa_outputs"
    before_head = "hidden_dropout"
    base = "transformer."

    def __init__(
        self,
        backbone,
        preprocessor=None,
        stride=64,
        max_answer_length=64,
        no_answer_threshold=None,
        dropout=0.0,
        question_overlap=False,
        **kwargs,
    ):
        for name, value, least in (("stride", stride, 0), ("max_answer_length", max_answer_length, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise invalid(f"`{name}` must be an integer of at least {least}.", **{name: value})
        if isinstance(no_answer_threshold, bool) or not isinstance(no_answer_threshold, (int, float, type(None))):
            raise invalid("`no_answer_threshold` must be a number or None.", no_answer_threshold=no_answer_threshold)
        if preprocessor is not None and preprocessor.tokenizer.files:
            end = separator(preprocessor)  # checks it
            question_overlap = end if question_overlap is True else question_overlap
        if question_overlap is not False and not _is_id(question_overlap, backbone.config.vocabulary_size):
            hint = "True takes that token from a preprocessor, which there must be."
            expected = "`question_overlap` must be False, True, or the id of the token that ends the question."
            raise invalid(expected, hint, question_overlap=question_overlap)
        policy = backbone.dtype_policy
        read = backbone(backbone.input) if question_overlap is False else _overlapped(backbone, question_overlap)
        hidden = keras.layers.Dropout(dropout, dtype=policy, name="hidden_dropout")(read)
        options = {"kernel_initializer": kernel_initializer(), "name": self.head}
        # Beside a frozen base the head is still trained.
        logits = keras.layers.Dense(2, **options, dtype=backend.with_float32_weights(policy))(hidden)
        logits = keras.layers.Activation("linear", dtype="float32", name="logits")(logits)
        super().__init__(backbone, preprocessor, logits, **kwargs)
        self.stride = stride
        self.max_answer_length = max_answer_length
        self.no_answer_threshold = no_answer_threshold
        self.dropout = dropout
        self.question_overlap = question_overlap

    @classmethod
    def preset_options(cls, checkpoint, preprocessor):
        known = checkpoint.options if checkpoint.head == cls.head else {}
        return {name: known[name] for name in _OPTIONS if name in known}

    def checkpoint_settings(self):
        settings = super().checkpoint_settings()
        settings["fields"]["architectures"] = ["LlamaForQuestionAnswering"]
        if self.question_overlap is not False:
            settings["differs"] = settings["differs"] or "question_overlap"
        return {**settings, "options": {name: getattr(self, name) for name in _OPTIONS}}

    def fresh_weights(self, checkpoint):
        """A head, and the vectors of `question_overlap` where the checkpoint was read without them."""
        known = checkpoint.options.get("question_overlap", False) is not False
        fresh = self.question_overlap is not False and not known
        return [*super().fresh_weights(checkpoint), *(["question_overlap.weight"] if fresh else [])]

    def _head_weights(self):
        """With the vectors of `question_overlap`, which no checkpoint of another task has trained."""
        return [*super()._head_weights(), *(w for w in self.weights if w.path.startswith("question_overlap/"))]

    def default_loss(self):
        return SpanCrossentropy()

    def losses_by_name(self):
        return {"sparse_categorical_crossentropy": SpanCrossentropy()}

    def default_metrics(self):
        return {"metrics": [SpanAccuracy()], "weighted_metrics": None}

    def metrics_by_name(self):
        return {"accuracy": SpanAccuracy()}

    def answer(self, question, context, batch_size=None):
        """The answers to questions, each a part of its context.

        Args:
            question: a string, or a list or array of strings.
            context: a context for each, or a string for all of them.
            batch_size: windows per step; 32 unless given.

        Returns:
            A dict for a single question and context, else a list of dicts: `text`; `start` and `end`, the places in the
            context of its first character and that behind its last one; `score`, its probability in its window. No
            answer is the text "", its place `None`, its score the least probability of none.

        Raises:
            ValueError: for an empty question or context, or without a preprocessor.
        """
        if isinstance(question, str):
            found = self.answer([question], context, batch_size)
            return found[0] if isinstance(context, str) else found
        contexts = [context] * len(question) if isinstance(context, str) else context
        return self._best(questions({"question": question, "context": contexts}), batch_size)

    def evaluate(self, x=None, y=None, batch_size=None, *, sample_weight=None, return_dict=False, **kwargs):
        """Keras' `evaluate` on what `fit` takes; for questions in memory also `exact_match` and `f1`."""
        logs = super().evaluate(x, y, batch_size, sample_weight=sample_weight, return_dict=True, **kwargs)
        if isinstance(x, (list, tuple, dict)) and not self._are_token_ids(x):
            rows = questions(x, y, found=Counter())  # told of already
            texts = [answer["text"] for answer in self._best(rows, batch_size)]
            logs |= answer_scores(texts, [row.answers for row in rows])
        return logs if return_dict else list(logs.values())

    def fit_head(self, x, y=None, *args, **kwargs):
        """As of every head, on the states of all windows, (W, T, D), which are kept in memory.

        Where there are vectors of `question_overlap`, which are trained, too, and stand before the blocks, states do
        not stay: then it is `freeze_base()` and `fit`, and takes what that takes.
        """
        if self.question_overlap is False:
            return super().fit_head(x, y, *args, **kwargs)
        self.check_compiled()
        self.freeze_base()
        return self.fit(x, y, *args, **kwargs)

    def _best(self, rows, batch_size):
        """The best answers to `Question`s."""
        if self.preprocessor is None:
            raise invalid("Questions and contexts need a preprocessor.", preprocessor=None)
        found = windows(rows, self.preprocessor, self.stride)
        logits = self.predict(found, batch_size, verbose=0)
        return list(best_answers(rows, found, logits, self.max_answer_length, self.no_answer_threshold))

    def _dataset(self, x, y=None, sample_weight=None, batch_size=None, **options):
        self._refuse_weights(x, sample_weight)
        return super()._dataset(x, y, sample_weight, batch_size, **options)

    def _checked(self, x, y, sample_weight, *args, **kwargs):
        self._refuse_weights(x, sample_weight)
        return super()._checked(x, y, sample_weight, *args, **kwargs)

    def _refuse_weights(self, x, sample_weight):
        if sample_weight is not None and not self._are_token_ids(x):
            raise invalid("`sample_weight` must be None: a question may have several rows.", rows=len(sample_weight))

    def join(self, x, y):
        if isinstance(x, Windows) or self._are_token_ids(x):
            return x, y
        return questions(x, y), None

    def encode(self, x, argument="x", cut=None, predicting=False):
        """Windows of questions -> their token ids, and where they have an answer."""
        if isinstance(x, Windows):
            return {"token_ids": [window.token_ids for window in x]}
        rows = questions(x, argument=argument)
        found = windows(rows, self.preprocessor, self.stride)
        if predicting:
            return {"token_ids": [window.token_ids for window in found]}
        for i, row in enumerate(rows):
            if not row.spans and self.no_answer_threshold is None:
                raise invalid(
                    f"`{argument}[{i}]` must have an answer.",
                    "Build the model with a `no_answer_threshold` for questions without.",
                    question=row.question,
                )
        return training_columns(rows, found, streamed=cut is not None)

    def check_targets(self, y, rows, training=False):
        """Places (B, 2) of the first and the last token of each answer; `None` where questions have theirs."""
        if y is None and self.preprocessor is not None:
            return None
        places = np.asarray(y)
        if places.shape != (rows, 2) or places.dtype.kind not in "iu":
            raise invalid(
                f"`y` must hold the first and the last token of each answer, an int array ({rows}, 2).",
                shape=places.shape,
                dtype=str(places.dtype),
            )
        if (turned := np.flatnonzero(places[:, 0] > places[:, 1])).size:
            i = int(turned[0])
            raise invalid(f"`y[{i}]` must have its first token before its last.", places=places[i].tolist())
        return places.astype("int32")

    def finish_batch(self, inputs, y=None, sample_weight=None):
        if "starts" in inputs:
            return inputs, np.stack([inputs.pop("starts"), inputs.pop("ends")], axis=-1), sample_weight
        if y is None:  # ids beside a preprocessor
            raise invalid("`y` must hold the first and the last token of each answer.", y=None)
        real = inputs["padding_mask"] > 0
        if y.min() < 0 or y.max() >= real.shape[1] or not np.take_along_axis(real, y, axis=1).all():
            raise invalid("`y` must hold places of real tokens.", smallest=int(y.min()), largest=int(y.max()))
        targets = np.repeat(real[..., None], 2, axis=-1).astype("int32")
        np.put_along_axis(targets, y[:, None], 2, axis=1)
        return inputs, targets, sample_weight

    def serving(self, text):
        if text is None:
            return super().serving(text)
        spans = GraphSpans(text, self.stride, self.max_answer_length, self.no_answer_threshold)

        @text.compiled
        def logits(token_ids, padding_mask):
            inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
            return keras.Model.__call__(self, inputs, training=False)

        def answer(questions, contexts):
            return spans.answer(questions, contexts, logits)

        inputs = {"questions": STRINGS, "contexts": STRINGS}
        return {"answer": Signature(answer, inputs), **super().serving(text)}

    def get_config(self):
        return {**super().get_config(), **{name: getattr(self, name) for name in _OPTIONS}}


def _is_id(value, vocabulary_size):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary_size


def _overlapped(backbone, separator):
    """Hidden states (B, T, D) of tokens that know which of them the question has."""
    ids, mask = backbone.input["token_ids"], backbone.input["padding_mask"]
    policy = backend.with_float32_weights(backbone.dtype_policy)  # trained with the head
    overlap = QuestionOverlap(backbone.config.hidden_dim, separator=separator, dtype=policy, name="question_overlap")
    return backbone.decode(ids, mask, embeddings=backbone.token_embedding(ids) + overlap(ids))[0]
