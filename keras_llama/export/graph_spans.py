"""Questions about texts inside a graph, as `questions` has them in Python: strings -> windows, logits -> answers.

Shapes: B questions, W windows of all of them, T tokens of the longest window.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from keras_llama.export.graph_text import GraphText
from keras_llama.questions import longest_question, separator

_FAR = -1e9
_TOGETHER = 32  # windows that a model reads at a time, so that a context of any length takes bounded memory
_ALL = 2**20  # tokens of a context
_BLANK = r"[\s\pZ\v\x1c-\x1f\x{85}]"  # what Python's `strip` takes off


class _Windows(NamedTuple):
    """Windows of questions: see `GraphSpans.windows`."""

    ids: Any
    mask: Any
    possible: Any
    last: Any
    owner: Any
    begin: Any


class GraphSpans:
    """What the signature of a SavedModel does with questions.

    Args:
        text: strings <-> ids in the graph.
        stride, longest, threshold: as `windows` and `best_answers` take them.
    """

    def __init__(self, text: GraphText, stride: int, longest: int, threshold: float | None):
        import tensorflow as tf

        self._text, self._stride, self._longest, self._threshold = text, stride, longest, threshold
        self._end = separator(text.preprocessor)
        tokenizer = text.preprocessor.tokenizer
        within = np.zeros(tokenizer.vocabulary_size, bool)
        within[list(tokenizer.within_ids)] = True
        self._within = tf.constant(within)

    def answer(self, questions, contexts, logits: Callable):
        """Strings (B,) each -> answers, strings (B,), and their scores, float32 (B,)."""
        import tensorflow as tf

        found, context = self.windows(questions, contexts)
        score, none, start, end = self._best(found, self._in_parts(logits, found.ids, found.mask))
        rows = tf.RaggedTensor.from_value_rowids(score, found.owner, tf.size(questions, tf.int64))
        # Of each question one window; a column more, for there may be no question.
        by_row = tf.pad(rows.to_tensor(2 * _FAR), [[0, 0], [0, 1]], constant_values=3 * _FAR)
        best = rows.row_starts() + tf.argmax(by_row, axis=1)
        score, start, end = (tf.gather(values, best) for values in (score, start, end))
        ids = tf.gather(context, tf.ragged.range(start, end))
        texts = tf.strings.regex_replace(self._text.decode(ids), f"^{_BLANK}+|{_BLANK}+$", "")
        none = tf.math.segment_min(none, found.owner)
        empty = score <= _FAR  # no span is as short as the longest may be
        if self._threshold is not None:
            empty |= none - score > self._threshold
        texts, score = tf.where(empty, "", texts), tf.where(empty, none, score)
        return {"texts": texts, "scores": tf.exp(score)}

    def windows(self, questions, contexts):
        """Strings (B,) each -> windows, and the ids of all contexts in a row.

        The windows have ids and mask int32 (W, T), whether an answer can begin and end with each token bool (W, T, 2),
        which is the last one bool (W, T), the question of each (W,), and where in that row of ids its column 0 would
        stand (W,).
        """
        import tensorflow as tf

        text = self._text.preprocessor
        asked = self._text.rows(questions, longest_question(text) + len(text.begin), text.add_bos, False)
        asked = tf.concat([asked, tf.fill([asked.nrows(), 1], self._end)], axis=1)
        context = self._text.rows(contexts, _ALL, False, False)
        before, tokens = asked.row_lengths(), context.row_lengths()
        room = text.sequence_length - 1 - before
        step = room - tf.minimum(tf.constant(self._stride, tf.int64), room // 2)
        last = tf.maximum(tokens - room, 0)
        count = 1 + (last + step - 1) // step
        owner = tf.repeat(tf.range(asked.nrows()), count)
        number = tf.range(tf.size(owner, tf.int64)) - tf.gather(tf.cumsum(count, exclusive=True), owner)
        before, tokens, room, step, last = (tf.gather(x, owner) for x in (before, tokens, room, step, last))
        start = tf.minimum(number * step, last)
        size = tf.minimum(room, tokens - start)
        columns = self._text.length(tf.cast(tf.reduce_max(tf.pad(before + size, [[0, 1]])) + 1, tf.int32))
        column = tf.range(tf.cast(columns, tf.int64))[None]
        place = column - before[:, None]
        begin = tf.gather(context.row_starts(), owner) + start - before
        inside, end = (place >= 0) & (place < size[:, None]), place == size[:, None]
        of_question = _at(asked.flat_values, tf.gather(asked.row_starts(), owner)[:, None] + column)
        of_context = _at(context.flat_values, begin[:, None] + column)
        ids = tf.where(inside, of_context, tf.where(place < 0, of_question, self._end))
        mask = tf.cast(place <= size[:, None], tf.int32)
        ids = tf.where(mask > 0, ids, text.tokenizer.pad_id)
        sides = [inside & (_at(side, begin[:, None] + column) > 0) for side in self._sides(context)]
        return _Windows(ids, mask, tf.stack(sides, axis=2), end, owner, begin), context.flat_values

    def _sides(self, context):
        """Whether an answer can begin, and end, with each of the ids of contexts, ragged (B, None): int32 (N,) each."""
        import tensorflow as tf

        ids, owner = context.flat_values, context.value_rowids()
        opens = tf.concat([tf.ones_like(owner[:1], tf.bool), owner[1:] != owner[:-1]], 0)
        first = opens | ~tf.gather(self._within, ids)
        last = tf.concat([first[1:], tf.ones_like(first[:1])], 0)
        characters = tf.RaggedTensor.from_row_starts(ids, tf.where(first)[:, 0], validate=False)
        blank = tf.strings.regex_full_match(self._text.decode(characters), f"{_BLANK}*")
        spoken = ~tf.gather(blank, characters.value_rowids())
        return [tf.cast(side & spoken, tf.int32) for side in (first, last)]

    def _in_parts(self, logits, ids, mask):
        """Logits (W, T, 2) of some windows at a time."""
        import tensorflow as tf

        count = tf.shape(ids)[0]
        rows = tf.constant(_TOGETHER) if self._text.jit else tf.clip_by_value(count, 1, _TOGETHER)
        parts = tf.maximum((count + rows - 1) // rows, 1)
        padding = [[0, parts * rows - count], [0, 0]]
        some = [tf.reshape(tf.pad(x, padding), [parts, rows, tf.shape(ids)[1]]) for x in (ids, mask)]
        found = tf.map_fn(lambda part: logits(*part), some, fn_output_signature=tf.float32, parallel_iterations=1)
        return tf.reshape(found, [parts * rows, tf.shape(ids)[1], 2])[:count]

    def _best(self, found, logits):
        """Of each window the logarithms of its best span's probability and of that of none, and the span's place."""
        import tensorflow as tf

        known = tf.where(found.possible | found.last[..., None], logits, _FAR)
        log_probs = tf.nn.log_softmax(known, axis=1)
        none = tf.reduce_sum(tf.where(found.last[..., None], log_probs, 0.0), axis=[1, 2])
        begins, ends = tf.unstack(tf.where(found.possible, log_probs, _FAR), axis=2)

        def longer(more, score, start, end):
            sums = begins + tf.pad(ends[:, more:], [[0, 0], [0, more]], constant_values=_FAR)
            place = tf.argmax(sums, axis=1)
            most = tf.reduce_max(sums, axis=1)
            better = most > score
            pairs = ((most, score), (place, start), (place + tf.cast(more, tf.int64) + 1, end))
            return more + 1, *(tf.where(better, new, old) for new, old in pairs)

        nowhere = tf.zeros_like(found.begin)
        limit = tf.minimum(self._longest, tf.shape(ends)[1])
        first = (tf.constant(0), tf.fill(tf.shape(none), _FAR), nowhere, nowhere)
        _, score, start, end = tf.while_loop(lambda more, *_: more < limit, longer, first)
        return score, none, found.begin + start, found.begin + end


def _at(values, places):
    """Values at places, whatever for those outside."""
    import tensorflow as tf

    padded = tf.pad(values, [[0, 1]])
    return tf.gather(padded, tf.clip_by_value(places, 0, tf.size(values, tf.int64)))
