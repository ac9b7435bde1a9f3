"""Files and folders that are written beside and then renamed, so that former ones stay whole until the new ones are."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def written_beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to, which becomes `path` at the end, or goes if there is an error.

    >>> with written_beside(pathlib.Path("report.json")) as unfinished:
    ...     _ = unfinished.write_text("{}")
    >>> pathlib.Path("report.json").read_text()
    '{}'
    """
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder beside `path`. Who is done renames it, or what is in it; at the end the rest goes.

    >>> with folder_beside(pathlib.Path("model")) as unfinished:
    ...     _ = (unfinished / "weights").write_text("1")
    ...     os.replace(unfinished, "model")
    >>> os.listdir("model")
    ['weights']
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
