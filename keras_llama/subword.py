"""Exact tokenizers, each kind run by its reference library; vocabularies trained here."""

import contextlib
import functools
import io
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from keras_llama import tokenizer_files
from keras_llama.config import invalid
from keras_llama.layers import register
from keras_llama.tokenizer import Tokenizer
from keras_llama.tokenizer_files import JSON, MODEL

_SPECIALS: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}  # LLaMA's first three, and padding
_NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
IDEOGRAPH = "[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_BESIDE_IDEOGRAPH = re.compile(f"(?<={IDEOGRAPH})(?=.)|(?<=.)(?={IDEOGRAPH})", re.DOTALL)


@register
class BytePairTokenizer(Tokenizer):
    """Any `tokenizer.json`, run by Hugging Face's Rust library: Llama 3, SmolLM2, and Llama 2's fast form.

    Args:
        files: contents by name, `tokenizer.json` among them; `None` waits for `load_assets`.

    Raises:
        ValueError: if `tokenizer.json` is broken.

    >>> import tokenizers
    >>> raw = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    >>> tokenizer = keras_llama.BytePairTokenizer({"tokenizer.json": raw.to_str().encode()})
    >>> tokenizer.encode(["abb"])
    [[2, 1]]
    """

    def __init__(self, files: Mapping[str, bytes] | None = None):
        super().__init__(files)
        if files is not None:
            self._plain  # noqa: B018 (a broken file is told of now)

    @functools.cached_property
    def _plain(self) -> Any:
        return self._load(parse_special=False)

    @functools.cached_property
    def _parsing(self) -> Any:
        return self._load(parse_special=True)

    def _load(self, parse_special: bool) -> Any:
        import tokenizers

        document = self._file(JSON)
        try:
            rust = tokenizers.Tokenizer.from_buffer(document)
        except Exception as error:  # the library raises no narrower class
            raise invalid(f"{JSON}: expected a tokenizer.", str(error), size=len(document)) from error
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = not parse_special
        return rust

    @property
    def vocabulary_size(self) -> int:
        return self._size

    @functools.cached_property
    def _size(self) -> int:
        return max(self._plain.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        return {added.content: i for i, added in self._plain.get_added_tokens_decoder().items() if added.special}

    def _token(self, token_id: int) -> str:
        return self._plain.id_to_token(token_id) or ""

    def _encode(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        rust = self._parsing if parse_special else self._plain
        return [row.ids for row in rust.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_with_offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        return [(row.ids, row.offsets) for row in self._plain.encode_batch(texts, add_special_tokens=False)]

    def _decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return self._plain.decode_batch(rows, skip_special_tokens)

    @functools.cached_property
    def within_ids(self) -> frozenset[int]:
        decoder = self._plain.decoder
        if decoder is None or b"ByteLevel" not in decoder.__getstate__():
            return super().within_ids
        letters = {chr(code) for byte, code in tokenizer_files.byte_characters().items() if 0x80 <= byte < 0xC0}
        vocabulary = self._plain.get_vocab(with_added_tokens=False)
        return frozenset(i for token, i in vocabulary.items() if token[:1] in letters)

    @functools.cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Ids that the reference puts before and after a text."""
        processor = self._plain.post_processor
        return tokenizer_files.frame_ids(None if processor is None else json.loads(processor.__getstate__()))

    @property
    def default_add_bos(self) -> bool:
        return bool(self._frame[0])

    @property
    def default_add_eos(self) -> bool:
        return bool(self._frame[1])

    def _role(self, role: str) -> int:
        if role in self._settings:
            text = self._text(role)
            found = None if text is None else self._plain.token_to_id(text)
            return -1 if found is None else found
        before, after = self._frame
        return {"bos_token": [*before, -1][0], "eos_token": [-1, *after][-1]}.get(role, -1)


@register
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo and Richardson, 2018, https://arxiv.org/abs/1808.06226).

    Text in any script goes to ids and back unchanged: characters outside the vocabulary become
    UTF-8 bytes. Only U+2581, which stands for a space inside, comes back as a space.

    Args:
        files: contents by name, `tokenizer.model` among them; `None` waits for `load_assets`.

    Raises:
        ValueError: if `tokenizer.model` is broken.

    >>> tokenizer = SentencePieceTokenizer.train(["good film", "bad film"] * 9, vocabulary_size=280)
    >>> tokenizer.decode(tokenizer.encode(["a good film"]))
    ['a good film']
    """

    def __init__(self, files: Mapping[str, bytes] | None = None):
        super().__init__(files)
        if files is not None:
            self._processor  # noqa: B018 (a broken file is told of now)

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(self._file(MODEL))
            return processor
        except RuntimeError as error:
            raise invalid(
                f"{MODEL}: expected a SentencePiece model.", str(error), size=len(self.files[MODEL])
            ) from error

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocabulary_size: int = 8_000,
        character_coverage: float = 0.9995,
        split_ideographs: bool = False,
    ) -> Self:
        """Learns a byte-pair vocabulary of at most `vocabulary_size` pieces from `texts`.

        Args:
            texts: the training texts only; a vocabulary learned from test texts leaks.
            vocabulary_size: number of ids, 256 bytes and 4 special ones included.
            character_coverage: share of the characters in `texts` to hold as pieces of their own;
                the rest is spelled in bytes.
            split_ideographs: whether Chinese characters stay apart, and leave the vocabulary's room to other words.

        Raises:
            ValueError: if there is no text, or `vocabulary_size` cannot hold bytes and characters.
        """
        import sentencepiece

        texts = list(texts)
        if not all(isinstance(text, str) for text in texts):
            wrong = next(text for text in texts if not isinstance(text, str))
            raise invalid("`texts` must hold strings only.", text=wrong)
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise invalid("`texts` must hold at least one text that is not blank.", texts=texts)
        if vocabulary_size < 256 + len(_SPECIALS) + 1:
            raise invalid(
                f"`vocabulary_size` must be at least {256 + len(_SPECIALS) + 1}: "
                "256 bytes, 4 special tokens and one character.",
                vocabulary_size=vocabulary_size,
            )
        border = ""
        if split_ideographs:  # no piece is learned across a border, and none is left in the vocabulary
            border = next(c for c in map(chr, range(0xE000, 0xF900)) if not any(c in text for text in texts))
            texts = [_BESIDE_IDEOGRAPH.sub(border, text) for text in texts]
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                pretokenization_delimiter=border,
                model_writer=written,
                model_type="bpe",
                vocab_size=vocabulary_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=character_coverage,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                max_sentence_length=max([10, *(len(text.encode()) + 1 for text in texts)]),  # it takes no less
                num_threads=1,
                minloglevel=2,
                **_SPECIALS,
            )
        except RuntimeError as error:
            raise invalid(
                "SentencePiece could not build this vocabulary.",
                f"It says: {error}",
                vocabulary_size=vocabulary_size,
                number_of_texts=len(texts),
            ) from error
        return cls(cls._files_of(written.getvalue()))

    @staticmethod
    def _files_of(model: bytes) -> dict[str, bytes]:
        """The files of a model that `train` learned."""
        return tokenizer_files.from_sentencepiece(model, {**_NAMES, "add_bos_token": True})

    @property
    def vocabulary_size(self) -> int:
        return max([self._processor.vocab_size(), *(i + 1 for i in self._added.values())])

    @functools.cached_property
    def _added(self) -> dict[str, int]:
        """Tokens that were added behind the model's own, by their text."""
        size = self._processor.vocab_size()
        named = tokenizer_files.read_json(self.files, "added_tokens.json")
        listed = {entry["content"]: int(i) for i, entry in self._settings.get("added_tokens_decoder", {}).items()}
        return {text: i for text, i in {**named, **listed}.items() if i >= size}

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        processor = self._processor
        control = [i for i in range(processor.vocab_size()) if processor.is_control(i) or processor.is_unknown(i)]
        return {processor.id_to_piece(i): i for i in control} | self._added

    def _token(self, token_id: int) -> str:
        if token_id < self._processor.vocab_size():
            return self._processor.id_to_piece(token_id)
        return {i: text for text, i in self._added.items()}.get(token_id, "")

    def _encode(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        if parse_special:
            return [self._encode_split(text) for text in texts]
        return self._processor.encode(texts, out_type=int)

    def _encode_with_offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        found = self._processor.encode(texts, return_type="offset_mapping")
        return [(row["ids"], self._of_characters(row["ids"], row["offsets"])) for row in found]

    def _of_characters(self, ids: list[int], offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Offsets with the place of all of a character for each of its bytes; the library has it for the last one."""
        spans: list[tuple[int, int]] = []
        for token, (start, end) in zip(reversed(ids), reversed(offsets), strict=True):
            spans.append((start, spans[-1][1]) if start == end and self._processor.is_byte(token) else (start, end))
        return spans[::-1]

    def _decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        if not skip_special_tokens:
            return [self._decode_with_control(row) for row in rows]
        with contextlib.suppress(IndexError):  # a control token beyond the library's vocabulary
            texts = self._processor.decode(rows) if rows else []  # the library takes [] for a single row
            if not any(self._unknown in text for text in texts):
                return texts
        unwritten = {self._processor.unk_id(), *range(self._processor.vocab_size(), self.vocabulary_size)}
        return self._processor.decode([[i for i in row if i not in unwritten] for row in rows])

    @functools.cached_property
    def _unknown(self) -> str:
        """What the library writes for the token of unknown text."""
        return self._processor.decode([self._processor.unk_id()]).strip()

    def _decode_with_control(self, row: list[int]) -> str:
        control = {i: text for text, i in self.special_tokens.items()}
        parts: list[str] = []
        run: list[int] = []

        def flush():
            if run:  # a part that is not the first keeps the space that SentencePiece takes off its start
                kept = " " if parts and self.token(run[0]).startswith("▁") else ""
                parts.append(kept + self._processor.decode(run))
                run.clear()

        for i in row:
            if i in control:
                flush()
                parts.append(control[i])
            else:
                run.append(i)
        flush()
        return "".join(parts)

    @property
    def default_add_bos(self) -> bool:
        return self._settings.get("add_bos_token", True) is True

    @property
    def default_add_eos(self) -> bool:
        return self._settings.get("add_eos_token", False) is True

    def _role(self, role: str) -> int:
        text = self._text(role)
        if text is not None and text in self.special_tokens:
            return self.special_tokens[text]
        own = {"bos_token": "bos_id", "eos_token": "eos_id", "pad_token": "pad_id"}[role]
        return getattr(self._processor, own)()
