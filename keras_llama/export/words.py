"""How a `tokenizer.json` cuts text into words, as replacements that RE2 can do: each puts `MARK` between words.

RE2, which TensorFlow has, knows no lookahead, and its Unicode tables are older than those of the Rust library. So
`\\s+(?!\\S)` becomes a mark before the last space of a run, and the classes are spelled out as that library has them.
"""

import functools
import sys
from collections.abc import Iterable
from typing import Any

from keras_llama.config import invalid
from keras_llama.tokenizer_files import JSON, PRE_TOKENIZERS

MARK = b"\xff"  # in no UTF-8 text, and in no class of RE2's, not even in a negated one
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"

Rule = tuple[bytes, bytes]  # a pattern, and what each of its matches becomes


def rules(pre_tokenizer: dict[str, Any] | None) -> list[Rule]:
    """The replacements of a `pre_tokenizer`, in turn.

    Raises:
        ValueError: for a kind that is not known to be exact.
    """
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [rule for part in pre_tokenizer["pretokenizers"] for rule in rules(part)]
    if kind == "Digits":
        digits = f"([{_digits()}])" if pre_tokenizer.get("individual_digits") else f"([{_digits()}]+)"
        return [(digits.encode(), MARK + rb"\1" + MARK)]
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return _gpt2() if pre_tokenizer.get("use_regex", True) else []
    if pre_tokenizer == PRE_TOKENIZERS["llama-bpe"]["pretokenizers"][0]:
        return _llama3()
    raise invalid(
        f"{JSON}: the graph cannot cut words as this pre-tokenizer does.",
        "It knows those of GPT-2, SmolLM2 and Llama 3; save the task as .keras instead.",
        pre_tokenizer=pre_tokenizer,
    )


def _gpt2() -> list[Rule]:
    space, letter, number = _class(r"\s"), _class(r"\p{L}"), _class(r"\p{N}")
    return [
        _before_last_space(space, space),
        _each(
            f"{_CONTRACTIONS}| ?[{letter}]+| ?[{number}]+| ?[^{space}{letter}{number}]+|[{space}]+",
        ),
    ]


def _llama3() -> list[Rule]:
    space, letter, number = _class(r"\s"), _class(r"\p{L}"), _class(r"\p{N}")
    return [
        _before_last_space(_class(r"[^\S\r\n]"), space),
        _each(
            rf"(?i:{_CONTRACTIONS})|[^\r\n{letter}{number}]?[{letter}]+|[{number}]{{1,3}}"
            rf"| ?[^{space}{letter}{number}]+[\r\n]*|[{space}]*[\r\n]+|[{space}]+"
        ),
    ]


def _before_last_space(last: str, space: str) -> Rule:
    return f"([{last}])([^{space}])".encode(), MARK + rb"\1\2"


def _each(words: str) -> Rule:
    return f"({words})".encode(), rb"\1" + MARK


@functools.cache
def _class(pattern: str) -> str:
    """The inside of a class of all characters that `pattern` matches in the Rust library."""
    import tokenizers

    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"(?:{pattern})+"), "removed")
    ends = [0, *(end for _, span in cut.pre_tokenize_str(_every_character()) for end in span)]
    ends.append(len(_every_character()))
    return _spelled(zip(ends[::2], ends[1::2], strict=True))  # between what is left


@functools.cache
def _digits() -> str:
    """The same of what the library's `Digits` takes for one: more than `\\p{N}` of its expressions."""
    import tokenizers

    parts = tokenizers.pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str(_every_character())
    return _spelled(span for _, span in parts[1::2])  # U+0000 is none, and then they take turns


@functools.cache
def _every_character() -> str:
    return "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)


def _spelled(spans: Iterable[tuple[int, int]]) -> str:
    text = _every_character()
    return "".join(rf"\x{{{ord(text[start]):x}}}-\x{{{ord(text[end - 1]):x}}}" for start, end in spans if start < end)
