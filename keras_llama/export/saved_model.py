"""TensorFlow SavedModels that need nothing but TensorFlow: strings in, strings or probabilities out.

It knows no task: a task says by `serving` what it offers.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keras_llama import backend
from keras_llama.config import invalid
from keras_llama.export.graph_text import GraphText

# Dtype and number of axes of what signatures take.
STRINGS, NUMBERS, IDS, INTEGER, NUMBER = ("string", 1), ("int32", 1), ("int32", 2), ("int32", 0), ("float32", 0)
METADATA = "keras_llama.json"
_IN_TENSORFLOW = """
import sys
import keras, keras_llama
source, target = sys.argv[1:]
keras.saving.load_model(source, compile=False).export(target)
"""


class Signature(NamedTuple):
    """One function of a SavedModel.

    Attributes:
        call: takes the inputs in turn, gives a dict of tensors.
        inputs: dtype and number of axes of each, by name; all axes are open.
        defaults: what `serving_default`, which takes the other inputs only, puts in for the last ones.
    """

    call: Callable[..., dict[str, Any]]
    inputs: Mapping[str, tuple[str, int]]
    defaults: tuple = ()


def export(task, filepath, overwrite: bool = False, versioned: bool = False) -> None:
    """Writes a task as a SavedModel; see `Task.export`."""
    path = pathlib.Path(filepath)
    unfinished, former = (path.with_name(f".{path.name}.{state}") for state in ("unfinished", "former"))
    if former.exists() and not path.exists():  # an export was cut off between its two renames
        os.replace(former, path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise invalid(
            "`filepath` must be a directory that is new or empty.", "Or pass overwrite=True.", filepath=str(path)
        )
    shutil.rmtree(unfinished, ignore_errors=True)
    inside = unfinished / "1" if versioned else unfinished
    try:
        (_write if backend.name() == "tensorflow" else _write_elsewhere)(task, inside)
        if path.exists():
            os.replace(path, former)
        try:
            os.replace(unfinished, path)
        except OSError:
            if former.exists():
                os.replace(former, path)
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)


def _write(task, path: pathlib.Path) -> None:
    import keras
    import tensorflow as tf

    text = None if task.preprocessor is None else GraphText(task.preprocessor)
    if text is None:
        warnings.warn("The SavedModel takes token ids: the task has no preprocessor for strings.", stacklevel=3)
    offered: dict[str, Signature] = task.serving(text)
    # Raw variables, stored once. A Keras model as attribute would put every variable into the graph
    # twice, and session loaders (TensorFlow Serving) would not find them.
    module = tf.Module()
    module.variables_once = [variable.value for variable in task.variables]
    functions = {name: _function(signature) for name, signature in offered.items()}
    first = next(iter(functions))
    functions["serving_default"] = _function(offered[first], *offered[first].defaults)
    module.functions = functions
    try:
        tf.saved_model.save(module, str(path), functions)
    except (OSError, tf.errors.OpError) as error:
        raise OSError(f"The SavedModel could not be written to {path.parent}: {error}") from error
    limits = {"context_length": task.backbone.config.context_length}
    if task.preprocessor is not None:
        limits["sequence_length"] = task.preprocessor.sequence_length
    described = {
        "task": type(task).__name__,
        "labels": getattr(task, "labels", None),
        "limits": limits,
        "serving_default": first,
        "signatures": {name: list(signature.inputs) for name, signature in offered.items()},
        "versions": {"keras": keras.__version__, "tensorflow": tf.__version__},
    }
    (path / METADATA).write_text(json.dumps(described, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _function(signature: Signature, *fixed):
    """A signature as a TensorFlow function; its last inputs may be fixed."""
    import tensorflow as tf

    inputs = list(signature.inputs.items())
    free = len(inputs) - len(fixed)
    specs = [tf.TensorSpec([None] * rank, dtype, name) for name, (dtype, rank) in inputs[:free]]
    constants = [tf.constant(x, dtype) for x, (_, (dtype, _)) in zip(fixed, inputs[free:], strict=True)]
    return tf.function(lambda *values: signature.call(*values, *constants), specs, autograph=False)


def _write_elsewhere(task, path: pathlib.Path) -> None:
    """Has a TensorFlow process write it."""
    with tempfile.TemporaryDirectory() as folder:
        saved = pathlib.Path(folder, "task.keras")
        task.save(saved)
        done = subprocess.run(
            [sys.executable, "-c", _IN_TENSORFLOW, str(saved), str(path)],
            env={**os.environ, "KERAS_BACKEND": "tensorflow"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise invalid(
            "The TensorFlow process that writes a SavedModel failed.",
            "It needs tensorflow installed beside this backend.",
            backend=backend.name(),
            error=reason[-1] if reason else done.returncode,
        )
