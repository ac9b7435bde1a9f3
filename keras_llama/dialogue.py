"""Prompt and response pairs, and messages, -> token ids and which of them are trained: the responses only.

Shapes: T_i tokens of row i.
"""

import itertools
from collections import Counter
from typing import Any

import numpy as np

from keras_llama.config import invalid

ROLES = ("system", "user", "assistant", "tool", "ipython")
_FORMS = 'strings, {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'


def dialogues(x: Any, argument: str = "x") -> list[dict[str, Any]] | None:
    """The rows of `x` as dicts with "prompt" and "response", or with "messages"; `None` if `x` holds none.

    Takes a list of such dicts, a list of lists of messages, or a dict of columns.

    Raises:
        ValueError: for a row in another form, named.
    """
    if isinstance(x, dict):
        if "token_ids" in x:
            return None
        columns = {key: list(value) for key, value in x.items()}
        if len({len(column) for column in columns.values()}) != 1:
            raise invalid(f"`{argument}` must have columns of one length.", lengths=[*map(len, columns.values())])
        x = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not isinstance(x, (list, tuple)) or not x or not any(isinstance(row, (dict, list, tuple)) for row in x):
        return None
    rows = [row if isinstance(row, dict) else {"messages": row} for row in x]
    for i, row in enumerate(rows):
        place = f"{argument}[{i}]"
        if set(row) == {"prompt", "response"}:
            for key, text in row.items():
                if not isinstance(text, str) or not text:
                    raise invalid(f"`{place}` must have a {key} that is a string and not empty.", **{key: text})
        elif set(row) == {"messages"}:
            check_messages(row["messages"], place)
            if not any(message["role"] == "assistant" for message in row["messages"]):
                raise invalid(f"`{place}` must have a message of the assistant to train on.", **row)
        else:
            raise invalid(f"`{place}` must be one of {_FORMS}.", row=row)
    return rows


def check_messages(messages: Any, argument: str = "messages") -> list[dict[str, str]]:
    """The messages, or a `ValueError` that names the one that is no {"role": ..., "content": ...}."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise invalid(f"`{argument}` must be a list of messages that is not empty.", messages=messages)
    for i, message in enumerate(messages):
        good = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not good:
            raise invalid(
                f'`{argument}`, message {i}, must be {{"role": ..., "content": a string}}.',
                f"Roles are {list(ROLES)}.",
                message=message,
            )
    return list(messages)


def encode(rows: list[dict[str, Any]], preprocessor: Any, cut: Counter | None = None) -> dict[str, list[np.ndarray]]:
    """Rows of `dialogues` -> `token_ids` and `trained`, int32 (T_i,) each: 1 for what the assistant says.

    The token that ends the assistant's turn is trained too, so that the model learns to stop. Rows
    are cut at the end to `sequence_length`, with a warning, or counted into `cut`; a `ValueError` names a row of
    whose responses nothing is left.
    """
    pairs = [
        _encode_pair(row, preprocessor) if "prompt" in row else _encode_messages(row["messages"], preprocessor)
        for row in rows
    ]
    kept = preprocessor.cut([ids for ids, _ in pairs], cut)
    trained = [mask[: len(ids)] for ids, (_, mask) in zip(kept, pairs, strict=True)]
    for i, mask in enumerate(trained):
        if not any(mask):
            raise invalid(
                f"Row {i} must have a token of a response among its first {preprocessor.sequence_length}.",
                "Shorten what comes before, or raise the preprocessor's `sequence_length`.",
                tokens=len(pairs[i][0]),
            )
    return {"token_ids": kept, "trained": [np.array(mask, "int32") for mask in trained]}


def _encode_pair(row: dict[str, str], preprocessor: Any) -> tuple[list[int], list[int]]:
    tokenizer = preprocessor.tokenizer
    prompt, ids = tokenizer.encode([row["prompt"], row["prompt"] + row["response"]], add_bos=preprocessor.add_bos)
    if tokenizer.eos_id >= 0:
        ids = [*ids, tokenizer.eos_id]
    start = _common(prompt, ids)
    return ids, [0] * start + [1] * (len(ids) - start)


def _encode_messages(messages: list[dict[str, str]], preprocessor: Any) -> tuple[list[int], list[int]]:
    tokenizer = preprocessor.tokenizer
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    trained = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.encode_chat(messages[:i], add_generation_prompt=True) if i else _opening(message, tokenizer)
        through = tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False)
        start = _common(before, through)
        if ids[: len(through)] != through or start < len(before) - 1:
            raise invalid(
                "The chat template must write a turn in the same way whatever follows it, to train on its responses.",
                "Pass prompt and response instead.",
                message=message,
            )
        said = through[start:]
        if tokenizer.turn_end_id in said:  # what the template writes after the turn's end is not said
            said = said[: len(said) - said[::-1].index(tokenizer.turn_end_id)]
        trained[start : start + len(said)] = [1] * len(said)
    return ids, trained


def _opening(message: dict[str, str], tokenizer: Any) -> list[int]:
    """What the template writes before the words of a first message; it need not take a conversation without any."""
    place = "\ue000"  # a character of no text
    text = tokenizer.apply_chat_template([{**message, "content": place}], False)
    return tokenizer.encode([text.partition(place)[0]], parse_special=True)[0]


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two rows share at their start: a token that straddles the prompt's end is the response's."""
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in shared)
