"""Files that are written beside and then renamed, so that a former one stays whole until the new one is."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def written_beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to, which becomes `path` at the end, or goes if there is an error.

    >>> with written_beside(pathlib.Path("report.json")) as unfinished:
    ...     _ = unfinished.write_text("{}")
    >>> os.listdir()
    ['report.json']
    """
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
