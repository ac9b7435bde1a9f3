"""TensorFlow SavedModels that need nothing but TensorFlow: strings in, strings or probabilities out.

It knows no task: a task says by `serving` what it offers.
"""

import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keras_llama import backend
from keras_llama.beside import folder_beside
from keras_llama.config import invalid
from keras_llama.export import elsewhere
from keras_llama.export.graph_text import GraphText

# Dtype and number of axes of what signatures take.
STRINGS, NUMBERS, IDS, INTEGER, NUMBER = ("string", 1), ("int32", 1), ("int32", 2), ("int32", 0), ("float32", 0)
METADATA = "keras_llama.json"


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


def export(task, filepath, overwrite: bool = False, versioned: bool = False, jit: bool = False) -> None:
    """Writes a task as a SavedModel; see `Task.export`."""
    path = pathlib.Path(filepath)
    if task.preprocessor is None and jit:
        raise invalid("`jit` needs a preprocessor, whose texts go up to buckets of lengths.", jit=jit)
    if task.preprocessor is None:
        warnings.warn("The SavedModel takes token ids: the task has no preprocessor for strings.", stacklevel=3)
    former = path.with_name(f".{path.name}.former")
    if former.exists() and not path.exists():  # an export was cut off between its two renames
        os.replace(former, path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise invalid(
            "`filepath` must be a directory that is new or empty.", "Or pass overwrite=True.", filepath=str(path)
        )
    with folder_beside(path) as unfinished:
        inside = unfinished / "1" if versioned else unfinished
        if backend.name() == "tensorflow":
            _write(task, inside, jit)
        else:
            elsewhere.export("tensorflow", task, inside, jit=jit)
        needed = json.loads((inside / METADATA).read_text(encoding="utf-8"))["needs"]
        if path.exists():
            os.replace(path, former)
        try:
            os.replace(unfinished, path)
        except OSError:
            if former.exists():
                os.replace(former, path)
            raise
    shutil.rmtree(former, ignore_errors=True)
    if needed:
        warnings.warn(f"Whoever loads the SavedModel must import {', '.join(needed)} for its vocabulary.", stacklevel=3)


def _write(task, path: pathlib.Path, jit: bool) -> None:
    import keras
    import tensorflow as tf

    text = None if task.preprocessor is None else GraphText(task.preprocessor, jit)
    offered: dict[str, Signature] = task.serving(text)
    # Raw variables, stored once. A Keras model as attribute would put every variable into the graph
    # twice, and session loaders (TensorFlow Serving) would not find them.
    module = tf.Module()
    module.variables_once = [variable.value for variable in task.variables]
    module.resources = [] if text is None else list(text.resources)
    functions = {name: _function(signature) for name, signature in offered.items()}
    first = next(iter(functions))
    functions["serving_default"] = _with_defaults(functions[first], offered[first])
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
        "needs": [] if text is None else list(text.needs),
        "versions": {"keras": keras.__version__, "tensorflow": tf.__version__},
    }
    (path / METADATA).write_text(json.dumps(described, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _function(signature: Signature):
    """A signature as a TensorFlow function."""
    import tensorflow as tf

    specs = [tf.TensorSpec([None] * rank, dtype, name) for name, (dtype, rank) in signature.inputs.items()]
    return tf.function(signature.call, specs, autograph=False)


def _with_defaults(function, signature: Signature):
    """The function of a signature without its last inputs; it calls the other one, which is stored once."""
    import tensorflow as tf

    inputs = list(signature.inputs.items())
    free = len(inputs) - len(signature.defaults)
    specs = [tf.TensorSpec([None] * rank, dtype, name) for name, (dtype, rank) in inputs[:free]]
    fixed = [tf.constant(x, dtype) for x, (_, (dtype, _)) in zip(signature.defaults, inputs[free:], strict=True)]
    return tf.function(lambda *values: function(*values, *fixed), specs, autograph=False)
