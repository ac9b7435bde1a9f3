"""What a recipe delivers: a model that is saved, reloaded, exported and served, each checked to be the one trained."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def adapter(model: Any, output: pathlib.Path) -> None:
    """The adapter of a model that has one, as PEFT reads it."""
    import keras_llama

    if not model.adapters:
        outdated(output / "adapter")
        return
    keras_llama.save_checkpoint(model, output / "adapter", format="peft", overwrite=True)
    print(f"{output / 'adapter'}: the adapter alone, for `load_adapter` and PEFT")


def preset(lm: Any, output: pathlib.Path) -> None:
    """Saves the folder that other tools read, too; they know no quantised base with an adapter beside it."""
    adapter(lm, output)
    if lm.quantized:
        lm.save(output / "model.keras")
        outdated(output / "preset")
        print(f"{output / 'model.keras'}: saved for --preset and Keras")
        return
    if lm.adapters:
        lm.merge_lora()
    lm.save_to_preset(output / "preset", overwrite=True)
    print(f"{output / 'preset'}: saved for `from_preset`, Transformers and `keras-llama convert`")


def outdated(folder: pathlib.Path) -> None:
    """Takes away what a former run delivered and this one does not, so that no one takes it for this model's."""
    if folder.is_dir():
        shutil.rmtree(folder)
        print(f"{folder}: of another model, removed")


def reloaded(model: Any, output: pathlib.Path) -> Any:
    """The model as `output`/model.keras brings it back; raises unless every weight does."""
    import keras

    model.save(output / "model.keras")
    again = keras.saving.load_model(output / "model.keras")
    pairs = zip(model.weights, again.weights, strict=True)
    if not all(np.array_equal(*map(keras.ops.convert_to_numpy, pair)) for pair in pairs):
        raise RuntimeError("The reloaded model has other weights.")
    return again


def check_texts(
    model: Any,
    expected: list[str],
    found: list[str],
    logits_of: Callable[[dict[str, Any]], Any],
    inputs: dict[str, Any] | None = None,
) -> None:
    """Raises if another form of `model`, which gave the texts `found`, is another model.

    How many U+FFFD a text has is open (docs/serving.md), and of two tokens that are as likely as each other rounding
    takes one, and the text goes on differently. So where texts differ the logits decide.

    Args:
        expected: texts of the model.
        logits_of: inputs of the model, token ids and masks -> logits of the other.
        inputs: what the model reads beside them, a value for each of the texts.
    """
    pairs = zip(expected, found, strict=True)
    differ = sum(own.replace("\ufffd", "") != other.replace("\ufffd", "") for own, other in pairs)
    if not differ:
        return
    ids = np.tile(np.arange(8, dtype="int32"), (len(expected), 1))  # any do
    arrays = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    whole = {**(inputs or {}), **{f"{side}{name}": array for side in model.sides for name, array in arrays.items()}}
    own = model.predict(whole, verbose=0)
    apart = np.abs(own - logits_of(whole)).max()
    if apart > 0.05 * np.ptp(own):  # far more than bfloat16 rounds, far less than another model differs
        raise RuntimeError(f"It answers otherwise. Expected: {expected}. Received: {found}.")
    print(f"{differ} of {len(expected)} texts differ, as near ties do: the logits are within {apart:.0e}")


def classifier(model: Any, output: pathlib.Path, sentences: list[str]) -> None:
    """Saves, reloads, exports and serves the model, and raises if any of them answers otherwise."""
    expected = _probabilities(model, sentences)
    again = reloaded(model, output)
    if np.abs(_probabilities(again, sentences) - expected).max() > tolerance(model):
        raise RuntimeError("The reloaded model answers otherwise.")
    print(f"{output / 'model.keras'}: reloaded, the same weights and predictions")
    adapter(model, output)
    answer = exported(model, output / "saved_model", sentences)
    if answer is None:
        return
    found = np.asarray(answer["probabilities"])
    difference = np.abs(found - expected).max()
    if answer["labels"] != [model.labels[i] for i in found.argmax(axis=1)] or difference > tolerance(model):
        raise RuntimeError(f"The exported model answers otherwise: {answer}.")
    print(f"{output / 'saved_model'}: served by a fresh process, probabilities within {difference:.0e}")


def _probabilities(model: Any, sentences: list[str]) -> np.ndarray:
    import keras

    return keras.ops.convert_to_numpy(model.probabilities(model.predict(sentences, verbose=0)))


def tolerance(model: Any) -> float:
    """How far probabilities of a model may be apart when another program, or another backend, rounds the same sums.

    A classifier of size "small" on torch and its SavedModel, untrained: 0.011 in bfloat16, 0.002 in float16.
    """
    return {"float32": 1e-4, "float16": 1e-2}.get(model.compute_dtype, 5e-2)


Asked = list[str] | dict[str, list]  # texts, by name where a model takes more than one


def exported(model: Any, directory: pathlib.Path, texts: Asked, *options: str) -> dict[str, Any] | None:
    """What a fresh process gets from the exported model; `None`, told why, for a vocabulary no graph holds."""
    try:
        model.export(directory, overwrite=True)
    except ValueError as error:
        print(f"No SavedModel: {error}")
        return None
    return serve(directory, texts, *options)


def serve(directory: str | os.PathLike, texts: Asked, *options: str) -> dict[str, Any]:
    """What a fresh process, with TensorFlow only, gets from an exported model; options are those of serve.py."""
    script = pathlib.Path(__file__).with_name("serve.py")
    command = [sys.executable, str(script), str(directory), *options]
    served = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if served.returncode:
        raise RuntimeError(f"The exported model could not be served: {served.stderr[-2000:]}")
    return json.loads(served.stdout)


def served_logits(directory: str | os.PathLike, inputs: dict[str, Any], *options: str) -> np.ndarray:
    """Logits (B, T, V) of an exported model, asked for as `serve` does."""
    given = {name: np.asarray(values).tolist() for name, values in inputs.items()}
    return np.array(serve(directory, given, "--signature", "logits", *options)["logits"])
