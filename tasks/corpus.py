"""Text larger than memory -> memory-mapped files of token ids: read in parts, some of them held out to validate on."""

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from tasks import records
from tasks.common import DataError

PART = 2**14  # characters that are read, tokenized, and held out or not, together
MARK = "<|endoftext|>"
LEARNED_FROM = 2**24  # characters, at most, that a vocabulary is learned from
_ENDINGS = (".txt", *records.ENDINGS)
SIDES = ("train", "validation")
_TOLD, _TOKENIZER = "corpus.json", "tokenizer"


def files(paths: Iterable[str]) -> list[pathlib.Path]:
    """The files named, and those below the folders named that end in .txt, .json or .jsonl, by name."""
    found = []
    for path in map(pathlib.Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in _ENDINGS and file.is_file())
        if not inside:
            raise DataError(f"{path}: expected a folder with files ending in {', '.join(_ENDINGS)}.")
        found += inside
    for path in found:
        try:
            empty = not path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        if empty:
            raise DataError(f"{path}: expected text. Received: an empty file.")
    return found


def parts(path: pathlib.Path, template: str = records.TEMPLATE) -> Iterator[tuple[str, bool]]:
    """(text, whether a text begins with it) of a file; longer texts come in parts that end with a line.

    Texts of a plain file are apart by lines `<|endoftext|>`; without any, the file is one text.
    """
    if path.suffix.lower() in records.ENDINGS:
        for text, _ in records.texts(path, template):
            read = functools.partial(io.StringIO(text).readline, PART)
            yield from _gathered(iter(read, ""))
    else:
        yield from _gathered(_lines(path))


def _gathered(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    held, size, begins = [], 0, True
    for line in itertools.chain(lines, [MARK]):
        ends = line.strip() == MARK
        if not ends:
            held.append(line)
            size += len(line)
        if ends or size >= PART:
            text = "".join(held)
            text = text.rstrip("\n") if ends else text
            text = text.lstrip("\n") if begins else text
            if text.strip():
                yield text, begins
                begins = False
            held, size = [], 0
        begins = begins or ends


def _lines(path: pathlib.Path) -> Iterator[str]:
    """The lines of a text file, none of them longer than `PART` bytes: the rest comes as another one."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # bytes of a character may come in two lines
    number = 1
    try:
        with path.open("rb") as file:
            while raw := file.readline(PART):
                try:
                    line = decoder.decode(raw.replace(b"\r\n", b"\n"))
                except UnicodeDecodeError as error:
                    hint = f"({error.reason}). Convert the file."
                    raise DataError(f"{path}:{number}: expected UTF-8 text {hint}") from error
                yield records.printable(line, f"{path}:{number}")
                number += raw.endswith(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if decoder.getstate()[0]:
        raise DataError(f"{path}:{number}: expected UTF-8 text (it ends within a character). Convert the file.")


@dataclasses.dataclass(frozen=True)
class Source:
    """The files to train on, and those to validate on or the share of all parts that is held out for it."""

    train: list[pathlib.Path]
    validation: list[pathlib.Path]
    share: float
    template: str
    limit: int | None  # texts of each side

    def read(self) -> Iterator[tuple[int, str, bool]]:
        """(side, text, whether a text begins with it): side 1 is held out.

        What is held out is decided by the words of a part, so that equal ones are on one side.
        """
        for side, paths in enumerate((self.train, self.validation)):
            count = 0
            for text, begins in itertools.chain.from_iterable(parts(path, self.template) for path in paths):
                count += begins
                if self.limit and count > self.limit:
                    break
                held = side or (not self.validation and _chance(text) < self.share)
                yield int(held), text, begins

    def learned_from(self) -> list[str]:
        """Training texts to learn a vocabulary from: all that are read, or some from everywhere."""
        drawn = np.random.default_rng(0)
        found: list[tuple[float, int, str]] = []  # what is drawn for a text, its number, the text
        size = 0
        for number, text in enumerate(text for side, text, _ in self.read() if not side):
            heapq.heappush(found, (drawn.random(), number, text))
            size += len(text)
            while size > LEARNED_FROM:
                size -= len(heapq.heappop(found)[2])
        if not found:
            raise DataError("--data: expected text to train on. Received: blank lines, or all of it is held out.")
        return [text for _, _, text in sorted(found, key=lambda row: row[1])]

    def digest(self, **more: Any) -> str:
        """Tells these files, as they are, and what else is done to them from others."""
        paths = [*self.train, *self.validation]
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        told = json.dumps([stats, len(self.train), self.share, self.template, self.limit, more], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]


def _chance(text: str) -> float:
    """A number from 0 to 1 that the text alone decides."""
    return zlib.crc32(text.encode()) / 2**32


class _Writer:
    """Appends token ids to the file of one side, and where each text starts to another."""

    def __init__(self, tokens: IO[bytes], starts: IO[bytes], dtype: type):
        self.tokens, self.starts, self.dtype, self.digest = tokens, starts, dtype, hashlib.sha256()
        self.counts = {"tokens": 0, "texts": 0, "bytes": 0, "characters": 0}

    def begin(self, bos: list[int]) -> None:
        self.starts.write(np.int64(self.counts["tokens"]).tobytes())
        self.counts["texts"] += 1
        self.write(bos)

    def write(self, ids: list[int], text: str = "") -> None:
        """Appends token ids, and counts them and the text that they predict."""
        written = np.array(ids, self.dtype).tobytes()
        self.tokens.write(written)
        self.digest.update(written)
        for name, count in (("tokens", len(ids)), ("bytes", len(text.encode())), ("characters", len(text))):
            self.counts[name] += count

    @property
    def told(self) -> dict[str, Any]:
        return {**self.counts, "dtype": self.dtype.__name__, "digest": self.digest.hexdigest()}


def write(source: Source, preprocessor: Any, folder: pathlib.Path) -> None:
    """Tokenizes all of it into `folder`, beside and then renamed: the files of both sides, and `corpus.json`."""
    from keras_llama.beside import folder_beside

    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(folder) as unfinished:
        found = _tokenized(source, preprocessor, unfinished)
        texts, sizes = ([found[name][unit] for name in SIDES] for unit in ("texts", "bytes"))
        if not sizes[0] or not (sizes[1] or (source.share == 0 and not source.validation)):
            raise DataError(
                f"Expected text to train on and to validate, of more than a token. Received: {texts[0]} texts to train "
                f"on and {texts[1]} to validate. Pass --test-data, or another --validation-share."
            )
        (unfinished / _TOKENIZER).mkdir()
        preprocessor.tokenizer.save_assets(str(unfinished / _TOKENIZER))
        (unfinished / _TOLD).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, folder)


def _tokenized(source: Source, preprocessor: Any, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Writes the token ids of both sides, and says what there is of each.

    A text begins and ends with the tokenizer's special tokens. What follows a part that is held out begins anew. Where
    no token begins a text, the bytes and characters of its first one are not counted.
    """
    tokenizer, last = preprocessor.tokenizer, None
    bos = [tokenizer.bos_id] if preprocessor.add_bos and tokenizer.bos_id >= 0 else []
    dtype = np.uint16 if tokenizer.vocabulary_size <= 2**16 else np.uint32
    with contextlib.ExitStack() as files:
        tokens, starts = (
            [files.enter_context((folder / f"{name}.{kind}").open("wb")) for name in SIDES]
            for kind in ("tokens", "starts")
        )
        sides = [_Writer(*pair, dtype) for pair in zip(tokens, starts, strict=True)]
        for side, text, begins in source.read():
            if begins and last:
                last.write(preprocessor.end)
            opens = begins or last is not sides[side]
            last = sides[side]
            if opens:
                last.begin(bos)
            (ids,) = tokenizer.encode([text])
            if opens and not bos:  # nothing predicts the first token
                text = text[len(tokenizer.decode([ids[:1]])[0]) :]
            last.write(ids, text)
        if last:
            last.write(preprocessor.end)
        return {name: side.told for name, side in zip(SIDES, sides, strict=True)}


class Side(NamedTuple):
    """The token ids of one side and where each text starts, both mapped into memory, and how much there is of it."""

    tokens: np.ndarray
    starts: np.ndarray
    counts: dict[str, Any]


def opened(folder: pathlib.Path) -> list[Side]:
    """What `write` left in `folder`: the side to train on and, if there is any, the one to validate on."""
    told = json.loads((folder / _TOLD).read_text(encoding="utf-8"))
    return [
        Side(
            np.memmap(folder / f"{name}.tokens", counts["dtype"], "r"),
            np.memmap(folder / f"{name}.starts", np.int64, "r"),
            counts,
        )
        for name, counts in told.items()
        if counts["texts"]
    ]


def vocabulary(folder: pathlib.Path) -> dict[str, bytes]:
    """The files of the tokenizer that `write` took."""
    return {path.name: path.read_bytes() for path in (folder / _TOKENIZER).iterdir()}
