"""Text -> ids, masks and targets, in plain Python and NumPy, before any dataset of a backend.

Shapes: B batch, T tokens.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_llama import backend
from keras_llama.config import invalid
from keras_llama.layers import register


def check_texts(texts: Any, argument: str = "x") -> list[str]:
    """The texts as a list of strings, or a `ValueError` naming the argument and the row.

    Takes a list, a tuple or an array of strings (UTF-8 bytes count as strings), none of them empty.
    """
    if isinstance(texts, (str, bytes)):
        raise invalid(f"`{argument}` must be a list of strings.", "Put a single text into a list.", **{argument: texts})
    if hasattr(texts, "numpy"):
        texts = texts.numpy()
    if not isinstance(texts, (list, tuple, np.ndarray)):
        raise invalid(
            f"`{argument}` must be a list or an array of strings, or a `keras.utils.PyDataset` of such batches.",
            **{argument: type(texts)},
        )
    rows = texts.tolist() if isinstance(texts, np.ndarray) else list(texts)
    if not rows:
        raise invalid(f"`{argument}` must hold at least one text.", **{argument: rows})
    return [_check_text(text, f"{argument}[{i}]") for i, text in enumerate(rows)]


def _check_text(text: Any, place: str) -> str:
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise invalid(f"`{place}` must be UTF-8 text.", str(error), text=text) from error
    if not isinstance(text, str):
        raise invalid(f"`{place}` must be a string.", text=text)
    if not text:
        raise invalid(f"`{place}` must not be empty.", "Drop the row.", text=text)
    return text


@register
class TextPreprocessor:
    """Strings -> padded token ids and padding mask.

    Args:
        tokenizer: a `SentencePieceTokenizer` or a `BytePairTokenizer`.
        sequence_length: longest text in tokens; longer ones are cut at the end, with a warning.
        add_bos, add_eos: whether a text begins and ends with the tokenizer's special tokens.

    Raises:
        ValueError: if `sequence_length` leaves no room for a token of the text.

    >>> tokenizer = keras_llama.SentencePieceTokenizer.train(["a good film"], vocabulary_size=280)
    >>> preprocessor = keras_llama.TextPreprocessor(tokenizer, sequence_length=16)
    >>> preprocessor(["good", "a film"])["padding_mask"].shape
    (2, 8)
    """

    def __init__(self, tokenizer, sequence_length: int = 512, add_bos: bool = True, add_eos: bool = False):
        specials = int(add_bos) + int(add_eos)
        if isinstance(sequence_length, bool) or not isinstance(sequence_length, int) or sequence_length <= specials:
            raise invalid(
                f"`sequence_length` must be an integer above {specials}, the number of special tokens.",
                sequence_length=sequence_length,
            )
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.add_bos = add_bos
        self.add_eos = add_eos

    def encode(self, texts: Sequence[str], cut: Counter | None = None, add_eos: bool | None = None) -> list[np.ndarray]:
        """Token ids of each text, int32 (T_i,), none longer than `sequence_length`.

        What is cut off is warned of, or counted into `cut` for `warn_of_cut` to tell later.
        """
        add_eos = self.add_eos if add_eos is None else add_eos
        rows = self.tokenizer.encode(texts, add_bos=self.add_bos, add_eos=add_eos)
        return self.cut(rows, cut, self.end if add_eos else [])

    @property
    def begin(self) -> list[int]:
        """What a text begins with: the vocabulary's token, or nothing."""
        return [self.tokenizer.bos_id] if self.add_bos and self.tokenizer.bos_id >= 0 else []

    @property
    def end(self) -> list[int]:
        """What ends a text that has an end: the vocabulary's token, or nothing where it has none."""
        return [self.tokenizer.eos_id] if self.tokenizer.eos_id >= 0 else []

    def cut(self, rows: Sequence[list[int]], cut: Counter | None = None, tail: Sequence[int] = ()) -> list[np.ndarray]:
        """Rows of token ids, int32 (T_i,), those over `sequence_length` cut so that they still end in `tail`."""
        over = [len(row) - self.sequence_length for row in rows if len(row) > self.sequence_length]
        found = Counter(texts=len(rows), cut_texts=len(over), cut_tokens=sum(over))
        if cut is None:
            self.warn_of_cut(found)
        else:
            cut.update(found)
        keep = self.sequence_length - len(tail)
        return [np.array(row if len(row) <= self.sequence_length else [*row[:keep], *tail], "int32") for row in rows]

    def warn_of_cut(self, cut: Counter) -> None:
        """Warns of the texts and tokens counted in `cut`, if any."""
        if cut["cut_texts"]:
            warnings.warn(
                f"{cut['cut_texts']} of {cut['texts']} texts are longer than sequence_length={self.sequence_length} "
                f"tokens; {cut['cut_tokens']} tokens were cut off.",
                stacklevel=2,
            )

    def pad(self, rows: dict[str, list[np.ndarray]], length: int | None = None) -> dict[str, np.ndarray]:
        """Rows of token ids -> `token_ids` and `padding_mask` (B, T), right-padded to T = `length` or the next bucket.

        Other columns of `rows`, a number per token, are padded with 0.
        """
        ids = rows["token_ids"]
        if length is None:
            length = min(backend.bucket(max(len(row) for row in ids)), self.sequence_length)
        padded = {name: np.zeros((len(ids), length), "int32") for name in (*rows, "padding_mask")}
        padded["token_ids"][:] = self.tokenizer.pad_id
        for i, row in enumerate(ids):
            padded["padding_mask"][i, : len(row)] = 1
            for name, column in rows.items():
                padded[name][i, : len(row)] = column[i]
        return padded

    def __call__(self, texts: Any) -> dict[str, np.ndarray]:
        """Strings -> `token_ids` and `padding_mask`, int32 (B, T)."""
        return self.pad({"token_ids": self.encode(check_texts(texts, "texts"))})

    def get_config(self) -> dict[str, Any]:
        return {
            "tokenizer": keras.saving.serialize_keras_object(self.tokenizer),
            "sequence_length": self.sequence_length,
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TextPreprocessor":
        return cls(**{**config, "tokenizer": keras.saving.deserialize_keras_object(config["tokenizer"])})


def pad_rows(rows: Sequence[Sequence[int]], length: int | None = None) -> dict[str, np.ndarray]:
    """Rows of token ids -> `token_ids` and `padding_mask`, int32 (B, T), padded with 0 on the right.

    >>> pad_rows([[5, 6], [7]])["token_ids"].tolist()
    [[5, 6], [7, 0]]
    """
    arrays = np.zeros((2, len(rows), length or max(map(len, rows), default=0)), "int32")
    for i, row in enumerate(rows):
        arrays[0, i, : len(row)], arrays[1, i, : len(row)] = row, 1
    return {"token_ids": arrays[0], "padding_mask": arrays[1]}


def next_token_targets(
    token_ids: np.ndarray, padding_mask: np.ndarray, sample_weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights of a language model, both (B, T): each token's successor in its segment.

    The weight is 0 where there is none: at padding and at the last token of a segment. A weight
    per text (B,) multiplies it.

    >>> next_token_targets(np.array([[5, 6, 7, 0]]), np.array([[1, 1, 1, 0]]))[1]
    array([[1., 1., 0., 0.]], dtype=float32)
    """
    targets = np.concatenate([token_ids[:, 1:], token_ids[:, :1]], axis=1)
    same = (padding_mask[:, 1:] == padding_mask[:, :-1]) & (padding_mask[:, :-1] > 0)
    weights = np.pad(same, ((0, 0), (0, 1))).astype("float32")
    if sample_weight is not None:
        weights *= np.asarray(sample_weight, "float32").reshape(len(weights), -1)
    return targets, weights
