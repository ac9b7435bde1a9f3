"""What all tokenizers share: text <-> token ids, special tokens, chat templates, files.

A tokenizer is the dict of its Hugging Face files: everything else is derived from them, and they are
written out again byte for byte.
"""

import functools
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from keras_llama import chat, tokenizer_files
from keras_llama.config import invalid
from keras_llama.tokenizer_files import MODEL

_GUARD = "\ue000"  # of the private use area: breaks up a control token that stands in a user's words
_WITHIN = re.compile("<0x[89AB][0-9A-F]>")  # a byte of UTF-8 that does not begin a character


class Tokenizer:
    """What the kinds of tokenizers share: special tokens, chat templates, and their files.

    Args:
        files: contents by name; `None` waits for `load_assets`.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None):
        self.files = dict(files or {})
        self._settings = tokenizer_files.settings(self.files)

    @property
    def vocabulary_size(self) -> int:
        """The largest id + 1, added tokens included."""
        raise NotImplementedError

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Control tokens by their text, such as `</s>` or `<|eot_id|>`."""
        raise NotImplementedError

    @property
    def proto(self) -> bytes | None:
        """The serialized SentencePiece model, `None` if there is none."""
        model = self.files.get(MODEL)
        return None if model is None or tokenizer_files.is_tiktoken(model) else model

    def token(self, token_id: int) -> str:
        """The text of one token as the vocabulary spells it, empty for an id between tokens.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocabulary_size:
            raise invalid(f"`token_id` must lie from 0 to {self.vocabulary_size - 1}.", token_id=token_id)
        return self._token(int(token_id))

    def _token(self, token_id: int) -> str:
        raise NotImplementedError

    def _encode(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of ids: the inverse of `encode`.

        Args:
            ids: rows of token ids. Those beyond the vocabulary have no text: a model's embedding may have more
                rows than its tokenizer has tokens.
            skip_special_tokens: whether control tokens are left out; else they are written as they are called.

        Raises:
            ValueError: for a negative id.
        """
        rows = [row if isinstance(row, list) else list(row) for row in ids]
        try:
            return self._decode(rows, skip_special_tokens)
        except (IndexError, OverflowError, RuntimeError, TypeError):  # the libraries' word for what they do not know
            rows, size = [list(map(int, row)) for row in rows], self.vocabulary_size
        for row in rows:
            if row and min(row) < 0:
                raise invalid("`ids` must not be negative.", ids=row)
        return self._decode([[token for token in row if token < size] for row in rows], skip_special_tokens)

    def _decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        raise NotImplementedError

    @functools.cached_property
    def blank_ids(self) -> frozenset[int]:
        """Ids of the tokens whose text is blank, or that have none."""
        texts = self.decode([[i] for i in range(self.vocabulary_size)])
        return frozenset(i for i, text in enumerate(texts) if not text.strip())

    @functools.cached_property
    def within_ids(self) -> frozenset[int]:
        """Ids of the tokens that begin within a character, of which an earlier token has the first byte."""
        return frozenset(i for i in range(self.vocabulary_size) if _WITHIN.fullmatch(self._token(i)))

    @property
    def bos_id(self) -> int:
        """Id of the token that begins a text, -1 if the vocabulary has none."""
        return self._role("bos_token")

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text, -1 if the vocabulary has none."""
        return self._role("eos_token")

    @property
    def pad_id(self) -> int:
        """Id that fills up a batch; the padding mask, not this id, says what is padding."""
        return next((i for i in (self._role("pad_token"), self.eos_id) if i >= 0), 0)

    @property
    def default_add_bos(self) -> bool:
        """Whether the reference begins a text with `bos_id` unless told otherwise."""
        raise NotImplementedError

    @property
    def default_add_eos(self) -> bool:
        """Whether the reference ends a text with `eos_id` unless told otherwise."""
        raise NotImplementedError

    def encode(
        self, texts: Sequence[str], add_bos: bool = False, add_eos: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """A list of ids for each text.

        Args:
            texts: strings.
            add_bos, add_eos: whether to add the tokens that begin and end a text.
            parse_special: whether control tokens written in a text become their ids; else they are
                ordinary text, so that a user's words cannot end a turn.

        Raises:
            ValueError: for what is no list of strings, or text that UTF-8 cannot hold.
        """
        bos = [self.bos_id] if add_bos and self.bos_id >= 0 else []
        eos = [self.eos_id] if add_eos and self.eos_id >= 0 else []
        rows = self._checked(self._encode, texts, parse_special)
        return [[*bos, *row, *eos] for row in rows] if bos or eos else rows

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The ids of each text as `encode` gives them, and where in the text each of them stands.

        Args:
            texts: strings.

        Returns:
            For each text its ids, and for each id the place of its first character and that behind its last one. The
            bytes of a character have the place of all of it; a space before the text has an empty one, or the first.

        Raises:
            ValueError: as `encode`.

        >>> tokenizer = keras_llama.SentencePieceTokenizer.train(["a good film"] * 9, vocabulary_size=280)
        >>> ((ids, offsets),) = tokenizer.encode_with_offsets(["a film"])
        >>> ["a film"[start:end] for start, end in offsets]
        ['a', ' film']
        """
        return self._checked(self._encode_with_offsets, texts)

    def _encode_with_offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        raise NotImplementedError

    @staticmethod
    def _checked(encode, texts, *options):
        """What `encode` makes of a list of strings; other texts are refused."""
        if isinstance(texts, (str, bytes)) or not all(isinstance(text, str) for text in texts):
            raise invalid("`texts` must be a list of strings.", "Put a single text into a list.", texts=texts)
        try:
            return encode(list(texts), *options)
        except (TypeError, UnicodeEncodeError) as error:
            wrong = [text for text in texts if any("\ud800" <= character <= "\udfff" for character in text)]
            if not wrong:
                raise
            raise invalid("`texts` must be Unicode; half a surrogate pair is none.", text=wrong[0]) from error

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's Jinja template, `None` if it has none."""
        return tokenizer_files.chat_template(self.files)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation, as Transformers renders it.

        Args:
            messages: dicts with `role` and `content`.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            **variables: what else the template asks for, such as `tools`.

        Raises:
            ValueError: if there is no template, or it refuses the messages.

        >>> template = b"{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        >>> files = keras_llama.SentencePieceTokenizer.train(["a good film"], vocabulary_size=280).files
        >>> tokenizer = keras_llama.SentencePieceTokenizer({**files, "chat_template.jinja": template})
        >>> tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
        'user: Hi</s>'
        """
        if self.chat_template is None:
            raise invalid(
                "This tokenizer must have a chat template to format messages.",
                "Take the instruct version of the checkpoint, or add a file chat_template.jinja.",
                files=sorted(self.files),
            )
        names = {name: text for name, text in self._settings.items() if name.endswith("_token") and self._text(name)}
        return chat.render(self.chat_template, messages, add_generation_prompt, **{**self._roles, **names, **variables})

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation: the template's control tokens are parsed, those in the messages are not.

        Args:
            messages, add_generation_prompt: as in `apply_chat_template`.

        Raises:
            ValueError: if there is no template, or it refuses the messages.
        """
        text = self.apply_chat_template(messages, add_generation_prompt)
        pattern = self._control_pattern
        guard = next(chr(code) for code in range(ord(_GUARD), sys.maxunicode) if chr(code) not in text)
        # Broken up behind every character that can begin a control token, words make none, even put together.
        opening = "".join(sorted({name[0] for name in self.special_tokens}))
        guarded = _broken(messages, str.maketrans({character: character + guard for character in opening}))
        if pattern is None or guarded == list(messages):
            return self.encode([text], parse_special=True)[0]
        safe = self.apply_chat_template(guarded, add_generation_prompt)
        if pattern.findall(safe) == pattern.findall(text):
            return self.encode([text], parse_special=True)[0]
        return self._encode_split(safe, lambda part: part.replace(guard, ""))

    @functools.cached_property
    def turn_end_id(self) -> int | None:
        """The control token that the chat template puts after an assistant's words, `None` if there is none."""
        answer = f"{_GUARD}answer{_GUARD}"
        if self.chat_template is None or self._control_pattern is None:
            return None
        try:
            text = self.apply_chat_template(
                [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}], False
            )
        except ValueError:
            return None  # a template that wants more than a question and an answer
        found = self._control_pattern.search(text.partition(answer)[2])
        token = None if found is None else self.special_tokens[found[0]]
        return None if token == self.bos_id else token

    @functools.cached_property
    def _control_pattern(self) -> re.Pattern | None:
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def _encode_split(self, text: str, clean=str) -> list[int]:
        """Ids of a text cut at its control tokens; each part between is ordinary text, `clean`ed first."""
        ids: list[int] = []
        place = 0
        for found in self._control_pattern.finditer(text) if self._control_pattern else ():
            ids += self._encode_part(clean(text[place : found.start()]))
            ids.append(self.special_tokens[found[0]])
            place = found.end()
        return ids + self._encode_part(clean(text[place:]))

    def _encode_part(self, text: str) -> list[int]:
        return self._encode([text], False)[0] if text else []

    def _text(self, role: str) -> str | None:
        """The text of "bos_token" and its like, as the settings name it."""
        value = self._settings.get(role)
        return value if isinstance(value, str) else None

    @functools.cached_property
    def _roles(self) -> dict[str, str]:
        """The texts of the tokens that begin, end and fill up, as far as there are any."""
        ids = {role: self._role(role) for role in ("bos_token", "eos_token", "pad_token")}
        return {role: self.token(i) for role, i in ids.items() if i >= 0}

    def _role(self, role: str) -> int:
        raise NotImplementedError

    def _file(self, name: str) -> bytes:
        if not self.files:
            raise invalid("This tokenizer has no vocabulary yet.", "Call `train` or `load_assets` first.", files=[])
        if name not in self.files:
            raise invalid(f"Expected {name} among the tokenizer's files.", files=sorted(self.files))
        return self.files[name]

    def save_assets(self, directory: str) -> None:
        """Writes the files into `directory`."""
        if not self.files:
            raise invalid("This tokenizer has no vocabulary yet.", "Call `train` or `load_assets` first.", files=[])
        for name, data in self.files.items():
            pathlib.Path(directory, name).write_bytes(data)

    def load_assets(self, directory: str) -> None:
        """Reads what `save_assets` wrote."""
        paths = sorted(path for path in pathlib.Path(directory).iterdir() if path.is_file())
        files = {path.name: path.read_bytes() for path in paths}
        for name in [name for name in vars(self) if name != "files"]:  # what was derived from other files
            delattr(self, name)
        self.__init__(files)  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        return {}  # the files are assets: they may be larger than a configuration should be

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Tokenizer":
        return cls(**config)

    def __reduce__(self):
        return type(self), (self.files or None,)  # data sets in worker processes


def _broken(value: Any, table: Mapping[int, str]) -> Any:
    """All strings of nested messages, translated."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, Mapping):
        return {key: _broken(part, table) for key, part in value.items()}
    return [_broken(part, table) for part in value] if isinstance(value, (list, tuple)) else value
