"""Text <-> token ids, exactly as the reference does it; chat templates; vocabularies trained here.

A tokenizer is the dict of its Hugging Face files: everything else is derived from them, and they are
written out again byte for byte.
"""

import functools
import io
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keras_llama import chat, tokenizer_files
from keras_llama.config import invalid
from keras_llama.layers import register
from keras_llama.tokenizer_files import JSON, MODEL, SETTINGS

_SPECIALS: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}  # LLaMA's first three, and padding
_GUARD = "\ue000"  # of the private use area: breaks up a control token that stands in a user's words


class Tokenizer:
    """What the kinds of tokenizers share: special tokens, chat templates, and their files.

    Args:
        files: contents by name; `None` waits for `load_assets`.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None):
        self.files = dict(files or {})
        self._settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", SETTINGS):
            try:
                self._settings |= json.loads(self.files.get(name, b"{}"))
            except (ValueError, TypeError) as error:
                raise invalid(f"{name}: expected a JSON object.", str(error), size=len(self.files[name])) from error

    @staticmethod
    def from_files(files: Mapping[str, bytes]) -> "Tokenizer":
        """The tokenizer of a set of files: `tokenizer.json`, or `tokenizer.model` (SentencePiece or tiktoken).

        Raises:
            ValueError: if there is neither, or the file is broken.
        """
        if JSON in files:
            return BytePairTokenizer(files)
        if MODEL not in files:
            raise invalid(f"Expected {JSON} or {MODEL} among the tokenizer's files.", files=sorted(files))
        if tokenizer_files.is_tiktoken(files[MODEL]):
            return BytePairTokenizer({**tokenizer_files.from_tiktoken(files[MODEL]), **files})
        return SentencePieceTokenizer(files)

    @property
    def vocabulary_size(self) -> int:
        """The largest id + 1, added tokens included."""
        raise NotImplementedError

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Control tokens by their text, such as `</s>` or `<|eot_id|>`."""
        raise NotImplementedError

    def token(self, token_id: int) -> str:
        """The text of one token as the vocabulary spells it."""
        raise NotImplementedError

    def _encode(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of ids: the inverse of `encode`."""
        raise NotImplementedError

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
        """
        bos = [self.bos_id] if add_bos and self.bos_id >= 0 else []
        eos = [self.eos_id] if add_eos and self.eos_id >= 0 else []
        rows = self._encode(list(texts), parse_special)
        return [[*bos, *row, *eos] for row in rows] if bos or eos else rows

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's Jinja template, `None` if it has none."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

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
        """
        if self.chat_template is None:
            raise invalid(
                "This tokenizer must have a chat template to format messages.",
                "Take the instruct version of the checkpoint, or add a file chat_template.jinja.",
                files=sorted(self.files),
            )
        names = {name: self._text(name) for name in self._settings if name.endswith("_token") and self._text(name)}
        return chat.render(self.chat_template, messages, add_generation_prompt, **{**names, **variables})

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation: the template's control tokens are parsed, those in a message's content are not."""
        pattern = self._control_pattern
        if pattern is None or not any(pattern.search(str(message.get("content"))) for message in messages):
            return self.encode([self.apply_chat_template(messages, add_generation_prompt)], parse_special=True)[0]

        def broken(found: re.Match) -> str:
            return found[0][0] + _GUARD + found[0][1:]

        guarded = [{**message, "content": pattern.sub(broken, str(message["content"]))} for message in messages]
        text = self.apply_chat_template(guarded, add_generation_prompt)
        return self._encode_split(text, lambda part: part.replace(_GUARD, ""))

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
        return value["content"] if isinstance(value, dict) else value if isinstance(value, str) else None

    def _role(self, role: str) -> int:
        raise NotImplementedError

    def save_assets(self, directory: str) -> None:
        """Writes the files into `directory`."""
        if not self.files:
            raise invalid("This tokenizer has no vocabulary yet.", "Call `train` or `load_assets` first.", files=[])
        for name, data in self.files.items():
            pathlib.Path(directory, name).write_bytes(data)

    def load_assets(self, directory: str) -> None:
        """Reads what `save_assets` wrote."""
        files = {path.name: path.read_bytes() for path in sorted(pathlib.Path(directory).iterdir())}
        for name in [name for name in vars(self) if name != "files"]:  # what was derived from other files
            delattr(self, name)
        self.__init__(files)  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        return {}  # the files are assets: they may be larger than a configuration should be

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Tokenizer":
        return cls(**config)

    def __reduce__(self):
        return type(self), (self.files,)  # data sets in worker processes


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
            self._plain = self._load(parse_special=False)

    def _load(self, parse_special: bool) -> Any:
        import tokenizers

        if JSON not in self.files:
            raise invalid(f"Expected {JSON} among the tokenizer's files.", files=sorted(self.files))
        try:
            rust = tokenizers.Tokenizer.from_buffer(self.files[JSON])
        except Exception as error:  # the library raises no narrower class
            raise invalid(f"{JSON}: expected a tokenizer.", str(error), size=len(self.files[JSON])) from error
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = not parse_special
        return rust

    @functools.cached_property
    def _parsing(self) -> Any:
        return self._load(parse_special=True)

    @property
    def vocabulary_size(self) -> int:
        return self._size

    @functools.cached_property
    def _size(self) -> int:
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        return {added.content: i for i, added in self._plain.get_added_tokens_decoder().items() if added.special}

    def token(self, token_id: int) -> str:
        return self._plain.id_to_token(int(token_id))

    def _encode(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        rust = self._parsing if parse_special else self._plain
        return [row.ids for row in rust.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        return self._plain.decode_batch([[int(i) for i in row] for row in ids], skip_special_tokens)

    @functools.cached_property
    def _frame(self) -> tuple[bool, bool]:
        """Whether the post-processor begins and ends a text with the tokens for it."""
        ids = self._plain.encode("").ids
        return bool(ids) and ids[0] == self.bos_id, bool(ids) and ids[-1] == self.eos_id != self.bos_id

    @property
    def default_add_bos(self) -> bool:
        return self._flag("add_bos_token", self._frame[0])

    @property
    def default_add_eos(self) -> bool:
        return self._flag("add_eos_token", self._frame[1])

    def _flag(self, name: str, default: bool) -> bool:
        """A setting that only the LLaMA classes of Transformers look at."""
        llama = str(self._settings.get("tokenizer_class")).startswith("LlamaTokenizer")
        return self._settings[name] if llama and isinstance(self._settings.get(name), bool) else default

    def _role(self, role: str) -> int:
        text = self._text(role)
        found = None if text is None else self._plain.token_to_id(text)
        return -1 if found is None else found


@register
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo and Richardson, 2018, https://arxiv.org/abs/1808.06226).

    Text in any script goes to ids and back unchanged: characters outside the vocabulary become
    UTF-8 bytes.

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
        self._processor: Any = None
        if files is not None:
            self._processor = self._load()

    def _load(self) -> Any:
        import sentencepiece

        if MODEL not in self.files:
            raise invalid(f"Expected {MODEL} among the tokenizer's files.", files=sorted(self.files))
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.files[MODEL])
        except RuntimeError as error:
            raise invalid(
                f"{MODEL}: expected a SentencePiece model.", str(error), size=len(self.files[MODEL])
            ) from error

    @classmethod
    def train(
        cls, texts: Iterable[str], vocabulary_size: int = 8_000, character_coverage: float = 0.9995
    ) -> "SentencePieceTokenizer":
        """Learns a byte-pair vocabulary of at most `vocabulary_size` pieces from `texts`.

        Args:
            texts: the training texts only; a vocabulary learned from test texts leaks.
            vocabulary_size: number of ids, 256 bytes and 4 special ones included.
            character_coverage: share of the characters in `texts` to hold as pieces of their own;
                the rest is spelled in bytes.

        Raises:
            ValueError: if there is no text, or `vocabulary_size` cannot hold bytes and characters.
        """
        import sentencepiece

        texts = [text for text in texts if text.strip()]
        if not texts:
            raise invalid("`texts` must hold at least one text that is not blank.", texts=texts)
        if vocabulary_size < 256 + len(_SPECIALS) + 1:
            raise invalid(
                f"`vocabulary_size` must be at least {256 + len(_SPECIALS) + 1}: "
                "256 bytes, 4 special tokens and one character.",
                vocabulary_size=vocabulary_size,
            )
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
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
        return cls({MODEL: written.getvalue(), SETTINGS: tokenizer_files.LLAMA_SETTINGS})

    @property
    def proto(self) -> bytes | None:
        """The serialized SentencePiece model, `None` before there is one."""
        return self.files.get(MODEL)

    @property
    def vocabulary_size(self) -> int:
        return max([self._loaded().vocab_size(), *(i + 1 for i in self._added.values())])

    @functools.cached_property
    def _added(self) -> dict[str, int]:
        """Tokens that were added behind the model's own, by their text."""
        size = self._loaded().vocab_size()
        named = json.loads(self.files.get("added_tokens.json", b"{}"))
        listed = {entry["content"]: int(i) for i, entry in self._settings.get("added_tokens_decoder", {}).items()}
        return {text: i for text, i in {**named, **listed}.items() if i >= size}

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        processor = self._loaded()
        control = [i for i in range(processor.vocab_size()) if processor.is_control(i)]
        return {processor.id_to_piece(i): i for i in control} | self._added

    def token(self, token_id: int) -> str:
        if token_id < self._loaded().vocab_size():
            return self._loaded().id_to_piece(int(token_id))
        return {i: text for text, i in self._added.items()}[int(token_id)]

    def _encode(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        if parse_special:
            return [self._encode_split(text) for text in texts]
        return self._loaded().encode(texts, out_type=int)

    def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        rows = [[int(i) for i in row] for row in ids]
        if skip_special_tokens:
            size = self._loaded().vocab_size()
            return self._loaded().decode([[i for i in row if i < size] for row in rows])
        return [self._decode_with_control(row) for row in rows]

    def _decode_with_control(self, row: list[int]) -> str:
        control = {i: text for text, i in self.special_tokens.items()}
        parts: list[str] = []
        run: list[int] = []

        def flush():
            if run:  # a part that is not the first keeps the space that SentencePiece takes off its start
                kept = " " if parts and self.token(run[0]).startswith("▁") else ""
                parts.append(kept + self._loaded().decode(run))
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
        return getattr(self._loaded(), own)()

    def _loaded(self) -> Any:
        if self._processor is None:
            raise invalid("This tokenizer has no vocabulary yet.", "Call `train` or `load_assets` first.", files=[])
        return self._processor
