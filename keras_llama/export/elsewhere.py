"""Exports that another backend has to write: a process of that backend loads the task and exports it."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

_PROGRAM = """
import json, sys
import keras, keras_llama
source, target, options = sys.argv[1:]
keras.saving.load_model(source, compile=False).export(target, **json.loads(options))
"""


def export(backend: str, task, path: pathlib.Path, **options) -> None:
    """Has a process of a backend call `task.export(path, **options)`.

    Raises:
        ValueError: for what that call refuses.
        RuntimeError: if the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = pathlib.Path(folder, "task.keras")
        task.save(saved)
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(saved), str(path), json.dumps(options)],
            env={**os.environ, "KERAS_BACKEND": backend},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        reason = [f"It ended with {done.returncode}.", *done.stderr.strip().splitlines()][-1]
        if reason.startswith("ValueError: "):  # of what was asked for, not of the process
            raise ValueError(reason.removeprefix("ValueError: "))
        raise RuntimeError(
            f"The process that exports on the {backend} backend failed. It needs {backend} and the memory for a "
            f"second copy of the model. Received: {reason}"
        )
