"""Which tokenizer some files are of."""

from collections.abc import Mapping

from keras_llama import tokenizer_files
from keras_llama.config import invalid
from keras_llama.spelled import SpelledTokenizer
from keras_llama.subword import BytePairTokenizer, SentencePieceTokenizer
from keras_llama.tokenizer import Tokenizer
from keras_llama.tokenizer_files import JSON, MODEL


def open_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of a set of files: `tokenizer.json`, or `tokenizer.model` (SentencePiece or tiktoken).

    Raises:
        ValueError: if there is neither, or the file is broken.

    >>> trained = SentencePieceTokenizer.train(["a good film"], vocabulary_size=280)
    >>> open_tokenizer(trained.files).encode(["good"]) == trained.encode(["good"])
    True
    """
    if JSON in files:
        return BytePairTokenizer(files)
    if tokenizer_files.settings(files).get("tokenizer_class") == "SpelledTokenizer":
        return SpelledTokenizer(files)
    if MODEL not in files:
        raise invalid(f"Expected {JSON} or {MODEL} among the tokenizer's files.", files=sorted(files))
    if tokenizer_files.is_tiktoken(files[MODEL]):
        return BytePairTokenizer({**tokenizer_files.from_tiktoken(files[MODEL]), **files})
    return SentencePieceTokenizer(files)
