"""Text <-> token ids. SentencePiece byte-pair encoding, trained on the user's own texts."""

import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from keras_llama.config import invalid
from keras_llama.layers import register

_MODEL_FILE = "tokenizer.model"
_SPECIALS: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}  # LLaMA's first three, and padding


@register
class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson, 2018, https://arxiv.org/abs/1808.06226).

    Text in any script goes to ids and back unchanged: characters outside the vocabulary become
    UTF-8 bytes. Control tokens such as `</s>` are never read out of text.

    Args:
        proto: the serialized SentencePiece model; `None` waits for `load_assets`.

    >>> tokenizer = SentencePieceTokenizer.train(["good film", "bad film"] * 9, vocabulary_size=280)
    >>> tokenizer.decode(tokenizer.encode(["a good film"]))
    ['a good film']
    """

    def __init__(self, proto: bytes | None = None):
        self.proto = proto
        self._processor: Any = None
        if proto is not None:
            import sentencepiece

            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)

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
                max_sentence_length=max(len(text.encode()) for text in texts) + 1,
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
        return cls(written.getvalue())

    @property
    def vocabulary_size(self) -> int:
        """Number of ids."""
        return self._loaded().vocab_size()

    @property
    def bos_id(self) -> int:
        """Id of the token that begins a text, -1 if the vocabulary has none."""
        return self._loaded().bos_id()

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text, -1 if the vocabulary has none."""
        return self._loaded().eos_id()

    @property
    def pad_id(self) -> int:
        """Id that fills up a batch; the padding mask, not this id, says what is padding."""
        return max(self._loaded().pad_id(), 0)

    def encode(self, texts: Sequence[str], add_bos: bool = False, add_eos: bool = False) -> list[list[int]]:
        """A list of ids for each text."""
        return self._loaded().encode(list(texts), out_type=int, add_bos=add_bos, add_eos=add_eos)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of ids; special tokens are dropped."""
        return self._loaded().decode([[int(i) for i in row] for row in ids])

    def save_assets(self, directory: str) -> None:
        """Writes the vocabulary into `directory`."""
        self._loaded()
        pathlib.Path(directory, _MODEL_FILE).write_bytes(self.proto or b"")

    def load_assets(self, directory: str) -> None:
        """Reads what `save_assets` wrote."""
        self.__init__(pathlib.Path(directory, _MODEL_FILE).read_bytes())  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        return {}  # the vocabulary is an asset: it may be larger than a configuration should be

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SentencePieceTokenizer":
        return cls(**config)

    def _loaded(self) -> Any:
        if self._processor is None:
            raise invalid("This tokenizer has no vocabulary yet.", "Call `train` or `load_assets` first.", proto=None)
        return self._processor
