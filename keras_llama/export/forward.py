"""Files of the forward pass for other runtimes: token ids in, logits out, of any batch and length."""

import os
import pathlib
import warnings
from typing import Any

from keras_llama import backend
from keras_llama.beside import folder_beside
from keras_llama.config import invalid
from keras_llama.export import elsewhere


def export(task, filepath, format: str, overwrite: bool = False) -> None:
    """Writes a task as a file of one of `FORMATS`; see `Task.export`."""
    path, (runs_on, write) = pathlib.Path(filepath), FORMATS[format]
    if any(len(taken.shape) != 2 for taken in task.input.values()):
        raise invalid('`format` must be "tf_saved_model" for a model that reads images.', format=format)
    if path.exists() and not overwrite:
        raise invalid("`filepath` must not exist.", "Or pass overwrite=True.", filepath=str(path))
    if task.dtype_policy.name != "float32":
        raise invalid("The model must be float32.", 'Load it with dtype="float32".', dtype=task.dtype_policy.name)
    with folder_beside(path) as unfinished:
        if backend.name() == runs_on:
            write(task, unfinished / path.name)
        else:
            elsewhere.export(runs_on, task, unfinished / path.name, format=format)
        for file in sorted(unfinished.iterdir(), reverse=True):  # ONNX has weights of 2 GB and more in a file beside
            os.replace(file, path.with_name(file.name))


def _write_onnx(task, path: pathlib.Path) -> None:
    import torch

    names = list(task.input)

    class Forward(torch.nn.Module):
        def forward(self, *values):
            return task(dict(zip(names, values, strict=True)), training=False)

    # An example for each input: the exporter takes one tensor that is given twice for one input.
    examples = tuple(torch.ones((2, 5), dtype=torch.int32) for _ in names)
    batch = torch.export.Dim("batch")
    lengths = {name: torch.export.Dim(_axis(name)) for name in names}
    shapes = (tuple({0: batch, 1: lengths[name]} for name in names),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program: Any = torch.onnx.export(
            Forward().eval(),
            examples,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=["logits"],
            verbose=False,
        )
        program.save(str(path))


def _axis(name: str) -> str:
    """What the second axis of an input is called: that of a mask as that of its ids."""
    side, _, _ = name.rpartition("_token_ids" if name.endswith("_token_ids") else "_padding_mask")
    return f"{side}_tokens" if side else "tokens"


def _write_litert(task, path: pathlib.Path) -> None:
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    names = list(task.input)

    def forward(*values):
        return task(dict(zip(names, values, strict=True)), training=False)

    specs = [tf.TensorSpec([None, None], tf.int32, name) for name in names]
    # Keras' variables would come out of the converter without their values.
    constant = convert_variables_to_constants_v2(tf.function(forward, specs).get_concrete_function())
    path.write_bytes(tf.lite.TFLiteConverter.from_concrete_functions([constant]).convert())


# The backend that writes each format, and how.
FORMATS = {"onnx": ("torch", _write_onnx), "litert": ("tensorflow", _write_litert)}
