"""SpelledTokenizer: a token for each Chinese character, which knows the subword that it is of."""

import functools
import re

import numpy as np

from keras_llama import tokenizer_files
from keras_llama.layers import register
from keras_llama.subword import IDEOGRAPH, SentencePieceTokenizer
from keras_llama.tokenizer_files import MODEL, NORMAL, SETTINGS

_CHINESE = re.compile(IDEOGRAPH)


@register
class SpelledTokenizer(SentencePieceTokenizer):
    """SentencePiece's subwords, those with Chinese characters spelled: k characters are k tokens, the last with its id.

    A classifier of short Chinese texts learns most from characters and what they stand in: as tokens they are many
    enough to be counted, and by its id each still tells its word. Ids from the model's size on stand for the characters
    before the last; what is no Chinese stays as it is.

    Args: those of `SentencePieceTokenizer`.

    >>> tokenizer = SpelledTokenizer.train(["好电影", "坏电影", "good"] * 9, vocabulary_size=280)
    >>> [tokenizer.token(i) for i in tokenizer.encode(["电影 good"])[0]]
    ['▁', '电', '影', '▁good']
    >>> tokenizer.decode(tokenizer.encode(["好电影"]))
    ['好电影']
    """

    @staticmethod
    def _files_of(model: bytes) -> dict[str, bytes]:
        # No `tokenizer.json`: it would give others the subwords.
        settings = tokenizer_files.settings(SentencePieceTokenizer._files_of(model))
        return {MODEL: model, SETTINGS: tokenizer_files.dump({**settings, "tokenizer_class": "SpelledTokenizer"})}

    @functools.cached_property
    def spelling(self) -> list[list[int]]:
        """The ids that each id of the model is spelled with."""
        size, rows = super().vocabulary_size, []
        for i, piece in enumerate(self._pieces):
            before = len(piece) - 1 if _CHINESE.search(piece) else 0
            rows.append([*range(size, size + before), i])
            size += before
        return rows

    @functools.cached_property
    def characters(self) -> np.ndarray:
        """The id of the character alone that each id stands for, or the id itself: int32 (V,)."""
        alone = {piece: i for i, piece in enumerate(self._pieces)}
        found = np.arange(self.vocabulary_size, dtype="int32")
        for piece, ids in zip(self._pieces, self.spelling, strict=True):
            if len(ids) > 1:
                found[ids] = [alone.get(character, i) for character, i in zip(piece, ids, strict=True)]
        return found

    @functools.cached_property
    def _pieces(self) -> list[str]:
        """What each id of the model is written as; nothing for control tokens and bytes."""
        pieces = tokenizer_files.parse_model(self._file(MODEL)).pieces
        rest = super().vocabulary_size - len(pieces)
        return [piece.piece if piece.type == NORMAL else "" for piece in pieces] + [""] * rest

    @property
    def vocabulary_size(self) -> int:
        return max(row[0] if len(row) == 1 else row[-2] for row in self.spelling) + 1

    def _token(self, token_id: int) -> str:
        return super()._token(int(self.characters[token_id]))

    def _encode(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        rows = super()._encode(texts, parse_special)
        if parse_special:  # put together of parts, which came here before
            return rows
        return [[i for one in row for i in self.spelling[one]] for row in rows]

    def _encode_with_offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        return [self._spelled(*row) for row in super()._encode_with_offsets(texts)]

    def _spelled(self, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """A row in characters; the one for a space before the text stands for no character of it."""
        spelled: list[int] = []
        places: list[tuple[int, int]] = []
        for token, (start, end) in zip(ids, offsets, strict=True):
            characters = self.spelling[token]
            spelled += characters
            if len(characters) == 1:
                places.append((start, end))
            else:
                first = end - len(characters)
                places += [(at, at + 1) if at >= start else (start, start) for at in range(first, end)]
        return spelled, places

    def _decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return super()._decode([self.characters[row].tolist() for row in rows], skip_special_tokens)
