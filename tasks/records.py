"""JSON objects made texts by a template such as `{title}\\n{content}`, and what no text may hold."""

import json
import pathlib
import re
import string
from collections.abc import Iterator
from typing import Any

from tasks.common import DataError

ENDINGS = (".json", ".jsonl")
TEMPLATE = "{text}"
# Control characters, as binary files hold, and halves of surrogate pairs, which UTF-8 has no bytes for.
_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\ud800-\udfff]")


def printable(text: str, place: str) -> str:
    """The text, unless it holds a character that no text has."""
    if found := _NO_TEXT.search(text):
        raise DataError(f"{place}: expected text. Received: the character {found[0]!r}, which no text has.")
    return text


def texts(path: pathlib.Path, template: str = TEMPLATE) -> Iterator[tuple[str, str]]:
    """(text, "file:number") of each object in a `.json` file, which holds a list of them, or on a line of a `.jsonl`.

    A field that is a list of strings stands for so many lines. Of a `.jsonl` file one line is held at a time.
    """
    form, parts = _parsed(template)
    names = [field for _, field in parts if field]
    for number, record in enumerate(_listed(path) if path.suffix.lower() == ".json" else _by_line(path), 1):
        place = f"{path}:{number}"
        values = {name: _string(record.get(name)) for name in names} if isinstance(record, dict) else {}
        if not values or None in values.values():
            received = sorted(record) if isinstance(record, dict) else record
            raise DataError(f"{place}: expected an object with {' and '.join(names)}. Received: {str(received)[:80]}.")
        text = form.format_map(values)
        if not text.strip():
            raise DataError(f"{place}: expected a text. Received: {text!r}.")
        yield printable(text, place), place


def opening(template: str, value: str) -> str:
    r"""What texts by the template begin with whose first field has this value, as far as that alone tells.

    >>> opening("{title}\\n{content}", "A walk")
    'A walk\n'
    """
    _, parts = _parsed(template)
    following = parts[1][0] if len(parts) > 1 and parts[1][1] else ""
    return parts[0][0] + value + following


def _parsed(template: str) -> tuple[str, list[tuple[str, str | None]]]:
    """The template with line ends for `\\n`, and its parts: what stands before a field, and the field's name."""
    form = template.replace("\\n", "\n")
    try:
        parts = list(string.Formatter().parse(form))
    except ValueError as error:
        raise DataError(f"--template {template!r}: expected names of fields in braces ({error}).") from error
    plain = all(not spec and conversion is None for _, _, spec, conversion in parts)
    fields = [field for _, field, *_ in parts if field is not None]
    if not (fields and plain and all(field.isidentifier() for field in fields)):
        raise DataError(f"--template {template!r}: expected names of fields in braces, such as {{title}}.")
    return form, [(before, field) for before, field, *_ in parts]


def _string(value: Any) -> str | None:
    """A field as text: a string, a number, or the lines of a list; `None` for anything else."""
    if isinstance(value, list):
        return "\n".join(value) if all(isinstance(line, str) for line in value) else None
    return str(value) if isinstance(value, (str, int, float)) else None


def _listed(path: pathlib.Path) -> list:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: expected a list of JSON objects ({error}).") from error
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of JSON objects. Received: a {type(found).__name__}.")
    return found


def _by_line(path: pathlib.Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: expected a JSON object ({error}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
