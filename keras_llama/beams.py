"""What a beam search knows, as arrays that stay where the model computes. It sees token ids and log-probabilities only.

Shapes: B prompts, n beams of each, S columns of the cache, V vocabulary.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_llama import backend
from keras_llama import cache as kv_cache


class Beams(NamedTuple):
    """Running beams and finished ones of each prompt; what one step hands to the next.

    Attributes:
        tokens: int32 (B * n, S), prompts padded on the left, then the running beams.
        mask: int32 (B * n, S), 1 for the tokens of a text.
        cache: keys and values of the columns before `column` - 1.
        seen: bool (B * n, V), tokens that a text holds already.
        scores: float32 (B, n), log-probabilities of the running beams, best first.
        texts: int32 (B, n, S), finished beams laid out as `tokens`.
        results: float32 (B, n), scores of the finished beams, best first; -inf where there is none yet.
        ends: int32 (B, n), the column behind a finished beam.
        open: bool (B,), prompts whose running beams may still beat a finished one.
        column: int32 (), the next column to write.
    """

    tokens: Any
    mask: Any
    cache: Any
    seen: Any
    scores: Any
    texts: Any
    results: Any
    ends: Any
    open: Any
    column: Any

    def over(self):
        """Whether no running beam of any prompt can beat its finished ones, bool ()."""
        return ops.logical_not(ops.any(self.open))

    def grown(self, columns: int) -> "Beams":
        """The same with empty columns behind its own."""
        tokens, mask, texts = (kv_cache.widened(x, columns) for x in (self.tokens, self.mask, self.texts))
        return self._replace(tokens=tokens, mask=mask, texts=texts, cache=kv_cache.grow(self.cache, columns))


class Rules(NamedTuple):
    """What does not change in a search.

    Attributes:
        stops: int32 (stops,), ids that finish a beam.
        length_penalty: float32 (), a result is log-probability / tokens ** length_penalty.
        first: int32 (), the column behind the prompts.
    """

    stops: Any
    length_penalty: Any
    first: Any

    def width(self, num_beams: int) -> int:
        """How many continuations to look at: enough that `num_beams` of them do not stop."""
        return width(num_beams, self.stops.shape[0])

    def result(self, log_probabilities, tokens):
        """The scores that beams of so many tokens finish with."""
        return log_probabilities / ops.cast(tokens, "float32") ** self.length_penalty


def width(num_beams: int, stops: int) -> int:
    """As `Rules.width`, of so many stop ids."""
    return max(2, 1 + stops) * num_beams


def begin(tokens, mask, cache, seen, column, scores) -> Beams:
    """The beams of each prompt, all of them the prompt itself, before any has been continued; `scores` are zeros."""
    prompts, num_beams = scores.shape
    rows = ops.repeat(ops.arange(prompts, dtype="int32"), num_beams)
    tokens = ops.take(tokens, rows, axis=0)
    return Beams(
        tokens=tokens,
        mask=ops.take(mask, rows, axis=0),
        cache=kv_cache.reorder(cache, rows),
        seen=ops.take(seen, rows, axis=0),
        scores=scores,
        texts=ops.reshape(tokens, (prompts, num_beams, -1)),
        results=ops.full_like(scores, -np.inf),
        ends=ops.zeros((prompts, num_beams), "int32"),
        open=ops.ones((prompts,), "bool"),
        column=column,
    )


def advance(beams: Beams, cache, found, flat, rules: Rules) -> Beams:
    """Takes the best continuations in.

    Args:
        beams: those that were continued.
        cache: theirs, with the keys and values of the column before `beams.column`.
        found: float32 (B, width), log-probabilities of continuations, best first.
        flat: int32 (B, width), beam * V + token id of each.
        rules: of the search.
    """
    prompts, num_beams = beams.scores.shape
    vocabulary = beams.seen.shape[1]
    flat = ops.cast(flat, "int32")  # torch's are int64
    origins, ids = flat // vocabulary, flat % vocabulary
    stopped = ops.any(ops.expand_dims(ids, 2) == rules.stops, axis=2)
    length = beams.column + 1 - rules.first

    # Only the first n candidates may finish; the others are there to keep n beams running. Not cut out of `found`: XLA
    # makes a top-k of a sort that has one length only, which else takes most of a step.
    may_end = ops.logical_and(ops.arange(found.shape[1]) < num_beams, ops.expand_dims(beams.open, 1))
    ended = ops.where(ops.logical_and(stopped, may_end), rules.result(found, length), -np.inf)
    results, places = ops.top_k(ops.concatenate([beams.results, ended], axis=1), num_beams)
    texts = backend.write(ops.take(beams.tokens, _rows(origins, num_beams), axis=0), _flat(ids)[:, None], beams.column)
    texts = ops.concatenate([beams.texts, ops.reshape(texts, (prompts, ids.shape[1], -1))], axis=1)
    ends = ops.concatenate([beams.ends, ops.zeros_like(ids) + (beams.column + 1)], axis=1)

    scores, running = ops.top_k(ops.where(stopped, -np.inf, found), num_beams)
    rows, ids = _rows(_chosen(origins, running), num_beams), _flat(_chosen(ids, running))
    worst = results[:, -1]
    beaten = ops.logical_and(worst > -np.inf, rules.result(scores[:, 0], length) <= worst)
    return Beams(
        tokens=backend.write(ops.take(beams.tokens, rows, axis=0), ids[:, None], beams.column),
        mask=backend.write(beams.mask, ops.ones_like(ids)[:, None], beams.column),
        cache=kv_cache.reorder(cache, rows),
        seen=backend.mark(ops.take(beams.seen, rows, axis=0), ids),
        scores=scores,
        texts=_chosen(texts, places),
        results=results,
        ends=_chosen(ends, places),
        open=ops.logical_and(beams.open, ops.logical_not(beaten)),
        column=beams.column + 1,
    )


def best(beams: Beams, rules: Rules) -> list[list[int]]:
    """The best finished continuation of each prompt, or the best running one where the length ran out."""
    tokens, texts, results, ends, column = (
        ops.convert_to_numpy(x) for x in (beams.tokens, beams.texts, beams.results, beams.ends, beams.column)
    )
    still_open = ops.convert_to_numpy(beams.open)
    running = ops.convert_to_numpy(rules.result(beams.scores, column - rules.first))[:, 0]
    chosen = []
    for i in range(len(results)):
        if still_open[i] and running[i] > results[i, 0]:
            chosen.append(tokens[i * results.shape[1], rules.first : column])
        else:
            chosen.append(texts[i, 0, rules.first : ends[i, 0]])
    return [row.tolist() for row in chosen]


def _flat(x):
    return ops.reshape(x, (-1,))


def _rows(places, per_prompt: int):
    """Places (B, m) within each prompt's `per_prompt` as row numbers of all prompts: (B * m,)."""
    return _flat(places + per_prompt * ops.expand_dims(ops.arange(places.shape[0], dtype="int32"), 1))


def _chosen(x, places):
    """What stands at `places` (B, m) of x (B, k, ...): (B, m, ...)."""
    taken = ops.take(ops.reshape(x, (-1, *x.shape[2:])), _rows(places, x.shape[1]), axis=0)
    return ops.reshape(taken, (*places.shape, *x.shape[2:]))
