"""What one call of `generate` has settled: its arguments checked, and joined with the defaults of the model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_llama.config import invalid
from keras_llama.heads.inputs import rows_per_step
from keras_llama.samplers import Settings


class Plan(NamedTuple):
    """The checked settings of one call.

    Attributes:
        settings: of the sampler, as arrays.
        num_beams: 1 for no beam search.
        length_penalty: of beam search: a beam's score is its log-probability / tokens ** length_penalty.
        max_new_tokens: most tokens to add.
        stop_ids: ids that end a text.
        stop_texts: strings that end a text.
        seed: of the sampling.
        stream: tokens of a piece of a stream; 0 for no stream.
        rows: numbers of the rows within the call: a row's random numbers are those of its number in any batch.
    """

    settings: Settings
    num_beams: int
    length_penalty: float
    max_new_tokens: int
    stop_ids: set[int]
    stop_texts: tuple[str, ...]
    seed: int
    stream: int
    rows: tuple[int, ...]

    def parts(self, batch_size: int) -> list["Plan"]:
        """The plan of each batch."""
        batch_size = rows_per_step(batch_size)
        starts = range(0, len(self.rows), batch_size)
        return [self._replace(rows=self.rows[start : start + batch_size]) for start in starts]


def make_plan(
    defaults: Mapping[str, Any],
    lengths: Sequence[int],
    context_length: int | None,
    *,
    max_new_tokens: int | None,
    max_length: int | None = None,
    num_beams: int | None,
    length_penalty: float | None,
    seed: int | None,
    stops: tuple[set[int], tuple[str, ...]],
    stream: int = False,
    **sampling: Any,
) -> Plan:
    """Joins what a call was given with the defaults.

    Args:
        defaults: settings in the words of `generation_config.json`, for what the call leaves as `None`.
        lengths: tokens of each prompt.
        context_length: most tokens of prompt and completion, `None` for no limit.
        stops: of `stops`.
        stream: whether pieces are wanted, or of how many tokens.
        **sampling: the fields of `samplers.Settings`.

    Raises:
        ValueError: for a setting out of range, named.
    """
    temperature = defaults.get("temperature")
    sampled = defaults.get("do_sample", bool(temperature))
    own = {"temperature": (1.0 if temperature is None else temperature) if sampled else 0.0}
    own |= {name: defaults[name] for name in Settings._fields[1:] if defaults.get(name) is not None}
    given = {name: value for name, value in sampling.items() if value is not None}
    num_beams = num_beams if num_beams is not None else defaults.get("num_beams") or 1
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
        raise invalid("`num_beams` must be an integer of at least 1.", num_beams=num_beams)
    asked = {name: x for name, x in given.items() if name in _OF_SAMPLING and x != Settings._field_defaults[name]}
    if num_beams > 1 and asked:
        raise invalid("`num_beams` above 1 searches and does not sample.", "Pass num_beams=1 to sample.", **asked)
    if seed is not None and not _is_count(seed, 0):
        raise invalid("`seed` must be an integer of at least 0.", seed=seed)
    if not isinstance(stream, bool) and not _is_count(stream, 1):
        raise invalid("`stream` must be True, False, or a number of tokens of at least 1.", stream=stream)
    length_penalty = length_penalty if length_penalty is not None else defaults.get("length_penalty", 1.0)
    if isinstance(length_penalty, bool) or not isinstance(length_penalty, (int, float)) or not abs(length_penalty) < 9:
        raise invalid(
            "`length_penalty` must be a number, about 1: it is an exponent.",
            "Above 1 favours long texts.",
            length_penalty=length_penalty,
        )
    return Plan(
        settings=Settings(**{**own, **given}).checked(),
        num_beams=num_beams,
        length_penalty=float(length_penalty),
        max_new_tokens=_new_tokens(max_new_tokens, max_length, defaults, max(lengths), context_length),
        stop_ids=stops[0],
        stop_texts=stops[1],
        seed=int(np.random.randint(2**31) if seed is None else seed),
        stream=int(stream),
        rows=tuple(range(len(lengths))),
    )


# What a beam search has no use for.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def _new_tokens(
    asked: int | None, max_length: int | None, defaults: Mapping[str, Any], longest: int, context: int | None
) -> int:
    """How many tokens to add: what was asked for, or what fits; never beyond the context."""
    if context is not None and longest >= context:
        raise invalid(
            f"`prompts` must be shorter than the context of {context} tokens.", "Shorten them.", tokens=longest
        )
    room = np.inf if context is None else context - longest
    if max_length is not None:
        if asked is not None:
            given = {"max_length": max_length, "max_new_tokens": asked}
            raise invalid("`max_length` and `max_new_tokens` say the same.", "Pass one of them.", **given)
        if not _is_count(max_length, longest + 1) or max_length - longest > room:
            most = "" if context is None else f" and at most the context of {context}"
            given = {"max_length": max_length, "prompt_tokens": longest}
            raise invalid(f"`max_length` must be an integer above the tokens of each prompt{most}.", **given)
        return int(max_length - longest)
    if asked is None:
        return int(min(defaults.get("max_new_tokens") or 128, room))
    if not _is_count(asked, 1):
        raise invalid("`max_new_tokens` must be an integer of at least 1.", max_new_tokens=asked)
    if asked > room:
        raise invalid(
            f"`max_new_tokens` must fit into the context of {context} tokens beside the prompt.",
            f"At most {room} are left.",
            max_new_tokens=asked,
            prompt_tokens=longest,
        )
    return int(asked)


def stops(
    own: set[int], stop: str | int | Sequence[str | int] | None, stop_token_ids: Any
) -> tuple[set[int], tuple[str, ...]]:
    """Stop ids and stop strings of `generate`'s arguments, given the model's own stop set."""
    automatic = isinstance(stop_token_ids, str) and stop_token_ids == "auto"
    listed = [] if automatic or stop_token_ids is None else stop_token_ids
    if not hasattr(listed, "__iter__") or not all(isinstance(x, (int, np.integer)) for x in listed):
        raise invalid('`stop_token_ids` must be "auto", None, or a list of token ids.', stop_token_ids=stop_token_ids)
    ids = own if automatic else {int(x) for x in listed}
    if stop is None:
        return set(), ()
    given = [] if stop == "auto" else [stop] if isinstance(stop, (str, int)) else list(stop)
    if any(isinstance(x, bool) or not isinstance(x, (str, int)) or x == "" for x in given):
        raise invalid('`stop` must be "auto", None, or strings and token ids to stop at too.', stop=stop)
    return ids | {x for x in given if isinstance(x, int)}, tuple(x for x in given if isinstance(x, str))
