"""A vocabulary of byte pairs as arrays, whatever file it came from: its symbols, merges and pieces.

Shapes: M merges, C characters.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from keras_llama import tokenizer_files
from keras_llama.config import invalid
from keras_llama.export import words
from keras_llama.spelled import SpelledTokenizer
from keras_llama.subword import SentencePieceTokenizer
from keras_llama.tokenizer import Tokenizer
from keras_llama.tokenizer_files import BYTE, JSON, MODEL, NORMAL, SPACE, UNUSED, USER

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_PREFIX = {"type": "Prepend", "prepend": SPACE}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


@dataclasses.dataclass(frozen=True)
class Tables:
    """What encoding and decoding look up.

    Attributes:
        rules: replacements that make a text into words with `words.MARK` between them.
        characters: code points that are symbols, in order, int32 (C,); none where every byte is a symbol.
        character_ids: their ids, int32 (C,).
        byte_ids: ids of the bytes, which are the symbols of all other characters, int32 (256,); -1 is dropped.
        neighbours: left id * 2**32 + right id of symbols that stand side by side in some merged token, in order, int64.
        keys: the same of the two sides of every merge, in order, int64 (M,).
        ranks: which of them goes first, int32 (M,); of equal ranks the leftmost pair does.
        results: the tokens that they make, int32 (M,).
        whole: words that are tokens, though no merges lead there, by their bytes.
        pieces: what each id is written as; nothing for control tokens.
        strip: whether a text that is decoded loses a space at its start.
        spelling: the ids that each id found is spelled with, `None` if it stays as it is.
    """

    rules: list[words.Rule]
    characters: np.ndarray
    character_ids: np.ndarray
    byte_ids: np.ndarray
    neighbours: np.ndarray
    keys: np.ndarray
    ranks: np.ndarray
    results: np.ndarray
    whole: dict[bytes, int]
    pieces: list[bytes]
    strip: bool
    spelling: list[list[int]] | None = None


def tables(tokenizer: Tokenizer) -> Tables:
    """The arrays of a tokenizer.

    Raises:
        ValueError: for a vocabulary, or a preparation of text, whose ids they would not give exactly.
    """
    if isinstance(tokenizer, SpelledTokenizer):
        return _spelled(_of_sentencepiece(tokenizer), tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _of_sentencepiece(tokenizer)
    document = tokenizer_files.read_json(tokenizer.files, JSON)
    return (_of_characters if document.get("normalizer") else _of_bytes)(document, tokenizer.vocabulary_size)


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> Tables:
    proto = tokenizer_files.parse_model(tokenizer.files[MODEL])
    kinds, trained, normalizer = {piece.type for piece in proto.pieces}, proto.trainer_spec, proto.normalizer_spec
    normal = sorted((piece for piece in proto.pieces if piece.type == NORMAL), key=lambda piece: -piece.score)
    order = {score: rank for rank, score in enumerate(dict.fromkeys(piece.score for piece in normal))}
    _require(
        MODEL,
        {
            "byte pairs": trained.model_type == trained.BPE,
            "byte fallback": trained.byte_fallback,
            "no pieces that a user defined, or that are unused": not kinds & {USER, UNUSED},
            "no normalization": not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces,
        },
    )
    texts = [piece.piece for piece in normal]
    ranks = {piece.piece: order[piece.score] for piece in normal}
    pairs = list(tokenizer_files.splits(texts, ranks))
    return _with_spaces(
        {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type in (NORMAL, BYTE)},
        pairs,
        [ranks[left + right] for left, right in pairs],
        tokenizer.vocabulary_size,
        normalizer.add_dummy_prefix,
    )


def _spelled(found: Tables, tokenizer: SpelledTokenizer) -> Tables:
    """The tables of the subwords, which find subwords and then spell them."""
    pieces = [found.pieces[i] for i in tokenizer.characters]
    return dataclasses.replace(found, pieces=pieces, spelling=tokenizer.spelling)


def _of_characters(document: Mapping[str, Any], size: int) -> Tables:
    """SentencePiece's way as `tokenizer.json` has it: Llama 2's fast form."""
    model, normalizer = document["model"], document["normalizer"]
    parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    _require(
        JSON,
        _usual(document)
        | {
            "spaces as SentencePiece has them": parts in ([_SPACES], [_PREFIX, _SPACES]),
            "no pre-tokenizer": not document.get("pre_tokenizer"),
            "byte fallback": model.get("byte_fallback"),
            "merges for every token": not model.get("ignore_merges"),
        },
    )
    pairs = _pairs(model)
    return _with_spaces(_uncontrolled(document), pairs, range(len(pairs)), size, _PREFIX in parts)


def _with_spaces(
    ids: Mapping[str, int], pairs: list[tuple[str, str]], ranks: Iterable[int], size: int, prefix: bool
) -> Tables:
    """Characters as symbols, U+2581 for a space."""
    space = SPACE.encode()
    rules = [(b" ", space)]
    if prefix:
        rules.insert(0, (rb"(?s)^(.)", space + rb"\1"))
    # Without a piece that has a space behind other characters, no merge goes over the start of a word.
    if not any(SPACE in text.lstrip(SPACE) for text in ids):
        rules.append((b"([^%b])(%b)" % (space, space), rb"\1" + words.MARK + rb"\2"))
    codes = sorted((ord(text), i) for text, i in ids.items() if len(text) == 1)
    byte_ids = [ids.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
    pieces = [b""] * size
    for text, i in ids.items():
        pieces[i] = bytes([int(text[3:5], 16)]) if _BYTE_PIECE.fullmatch(text) else text.replace(SPACE, " ").encode()
    return Tables(
        rules=rules,
        characters=np.array([code for code, _ in codes], "int32"),
        character_ids=np.array([i for _, i in codes], "int32"),
        **_symbols_and_merges(byte_ids, ids, pairs, ranks),
        whole={},
        pieces=pieces,
        strip=prefix,
    )


def _of_bytes(document: Mapping[str, Any], size: int) -> Tables:
    """GPT-2's way: every byte is a symbol, spelled as a printable character."""
    model, ids = document["model"], _uncontrolled(document)
    byte_of = {chr(code): byte for byte, code in tokenizer_files.byte_characters().items()}
    decoder = document.get("decoder") or {}
    pre_tokenizer = document.get("pre_tokenizer") or {}
    last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])[-1]
    _require(
        JSON,
        _usual(document)
        | {
            "bytes spelled as characters": decoder.get("type") == last.get("type") == "ByteLevel"
            and all(set(text) <= byte_of.keys() for text in ids),
        },
    )
    pairs = _pairs(model)
    pieces = [b""] * size
    for text, i in ids.items():
        pieces[i] = bytes(byte_of[character] for character in text)
    by_byte = {byte: character for character, byte in byte_of.items()}
    whole = _unreachable(document, ids) if model.get("ignore_merges") else []
    return Tables(
        rules=words.rules(pre_tokenizer),
        characters=np.zeros(0, "int32"),
        character_ids=np.zeros(0, "int32"),
        **_symbols_and_merges([ids.get(by_byte[byte], -1) for byte in range(256)], ids, pairs, range(len(pairs))),
        whole={pieces[i]: i for i in whole},
        pieces=pieces,
        strip=False,
    )


def _usual(document: Mapping[str, Any]) -> dict[str, bool]:
    """What every `tokenizer.json` must have."""
    model = document["model"]
    return {
        "byte pairs": model.get("type") == "BPE",
        "no dropout": not model.get("dropout"),
        "no marks of its own inside or behind words": not any(
            model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")
        ),
        "no added tokens but control tokens": all(token["special"] for token in document.get("added_tokens", [])),
    }


def _require(file: str, conditions: Mapping[str, Any]) -> None:
    missing = [name for name, met in conditions.items() if not met]
    if missing:
        raise invalid(
            f"{file}: a graph gives the same ids only for a vocabulary with {', '.join(conditions)}.",
            "Save the task as .keras instead.",
            missing=missing,
        )


def _uncontrolled(document: Mapping[str, Any]) -> dict[str, int]:
    control = {token["content"] for token in document.get("added_tokens", [])}
    return {text: i for text, i in document["model"]["vocab"].items() if text not in control}


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges, first to last; older files have them as text."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in pairs]


def _symbols_and_merges(
    byte_ids: list[int], ids: Mapping[str, int], pairs: list[tuple[str, str]], ranks: Iterable[int]
) -> dict[str, Any]:
    def key(left: str, right: str) -> int:
        return (ids[left] << 32) + ids[right]

    symbols = (itertools.pairwise(text) for text in {left + right for left, right in pairs} if ids.keys() >= set(text))
    keys = np.array([key(left, right) for left, right in pairs], "int64")
    results = np.array([ids[left + right] for left, right in pairs], "int32")
    by_key = np.argsort(keys)
    return {
        "byte_ids": np.array(byte_ids, "int32"),
        "neighbours": np.array(sorted({key(*pair) for text in symbols for pair in text}), "int64"),
        "keys": keys[by_key],
        "ranks": np.fromiter(ranks, "int32")[by_key],
        "results": results[by_key],
    }


def _unreachable(document: Mapping[str, Any], ids: Mapping[str, int]) -> list[int]:
    """The ids of tokens that no merges lead to."""
    import tokenizers

    model = {**document["model"], "ignore_merges": False}
    plain = tokenizers.Tokenizer.from_str(json.dumps({**document, "model": model}, ensure_ascii=False)).model
    return [i for text, i in ids.items() if [token.id for token in plain.tokenize(text)] != [i]]
