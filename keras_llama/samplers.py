"""Logits -> next token: functions, no model in sight. Shapes: B batch, V vocabulary.

All settings are tensors, so that a new value compiles nothing anew, on torch numbers. The order is Transformers':
repetition penalty, temperature, top-k, top-p, min-p.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_llama.config import invalid


class Settings(NamedTuple):
    """How to choose a token; the defaults choose the most likely one and filter nothing.

    Attributes:
        temperature: 0 takes the most likely token; above 0, logits are divided by it and sampled from.
        top_k: sample from the k most likely tokens; 0 from all.
        top_p: sample from the fewest tokens that hold this much probability; 1 from all
            (Holtzman et al., 2020, https://arxiv.org/abs/1904.09751).
        min_p: drop tokens less likely than this share of the most likely one; 0 drops none
            (Nguyen et al., 2025, https://arxiv.org/abs/2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen before;
            1 leaves them (Keskar et al., 2019, https://arxiv.org/abs/1909.05858).
    """

    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0

    def checked(self) -> "Settings":
        """The same settings as arrays, or a `ValueError` that names the one out of range."""
        ranges = {
            "temperature": (0, np.inf, "a number of at least 0"),
            "top_p": (1e-9, 1, "a number above 0 and at most 1"),
            "min_p": (0, 1, "a number from 0 to 1"),
            "repetition_penalty": (1e-9, np.inf, "a number above 0"),
        }
        for name, (low, high, expected) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not low <= value <= high:
                raise invalid(f"`{name}` must be {expected}.", **{name: value})
            if not np.isfinite(value):
                raise invalid(f"`{name}` must be finite.", **{name: value})
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, (int, np.integer)) or self.top_k < 0:
            raise invalid("`top_k` must be an integer of at least 0; 0 switches it off.", top_k=self.top_k)
        return Settings(*(np.array(value, "float32") for value in self))


def penalize(logits, seen, penalty):
    """Makes the tokens of `seen`, bool (B, V), less likely: logits (B, V) -> same."""
    return ops.where(seen, ops.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likely(logits, settings):
    """Sets the logits (B, V) that top-k, top-p and min-p drop to minus infinity; the most likely one stays.

    No sorting, which takes longer than a step of a small model: how many tokens, or how much probability, lies above a
    logit falls as it rises, so halving an interval finds the cut.
    """
    highest = ops.max(logits, axis=-1, keepdims=True)
    nothing = ops.full_like(highest, -np.inf)

    def fewest(x):
        return ops.sum(ops.cast(logits > x, "float32"), axis=-1, keepdims=True) < settings.top_k

    cut = ops.cond(settings.top_k > 0, lambda: _cut(highest, fewest), lambda: nothing)
    shares = ops.where(logits > cut, ops.exp(logits - highest), 0.0)
    mass = ops.sum(shares, axis=-1, keepdims=True) * settings.top_p

    def nucleus(x):
        return ops.sum(ops.where(logits > x, shares, 0.0), axis=-1, keepdims=True) < mass

    cut = ops.maximum(cut, ops.cond(settings.top_p < 1, lambda: _cut(highest, nucleus), lambda: nothing))
    kept = ops.logical_and(logits > cut, shares >= settings.min_p)
    return ops.where(kept, logits, -np.inf)


def _cut(highest, enough):
    """The highest logit below those to keep (B, 1): `enough(x)` says whether no more than these lie above x (B, 1).

    To 2e-8, which is less than the distance of float32 numbers above 0.25.
    """

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = enough(middle)
        return ops.where(below, low, middle), ops.where(below, middle, high)

    # Further below, a share is 0 in float32.
    return ops.fori_loop(0, 32, halve, (highest - 104.0, highest))[0]


def draw(logits, uniform):
    """Samples a token per row: logits (B, V), uniform numbers in [0, 1) (B,) -> int32 (B,).

    Inverts the cumulative distribution, so that one number of the host decides a token and the same
    seed gives the same text on every backend.
    """
    total = ops.cumsum(ops.softmax(logits, axis=-1), axis=-1)
    return ops.cast(ops.argmax(total > uniform[:, None] * total[:, -1:], axis=-1), "int32")


def choose(logits, seen, settings, uniform):
    """The next token of each row, int32 (B,): logits float32 (B, V), seen bool (B, V), uniform (B,)."""

    def likely():
        return penalize(logits, seen, settings.repetition_penalty)

    return ops.cond(
        settings.temperature > 0,
        lambda: draw(keep_likely(likely() / settings.temperature, settings), uniform),
        lambda: ops.cast(ops.argmax(likely(), axis=-1), "int32"),
    )
