"""TrainingState: a training that goes on after an interruption as if there had been none."""

import json
import os
import pathlib
from collections import Counter
from typing import Any

import keras
import numpy as np

from keras_llama import backend
from keras_llama.beside import written_beside
from keras_llama.config import invalid

_FILE, _KEY, _RANDOM = "training.safetensors", "keras_llama", "random state"


class TrainingState(keras.callbacks.Callback):
    """After each epoch writes all that the next one depends on: weights, optimiser, random states, callbacks.

    It is one file, so that its parts belong together. Of a callback it keeps the numbers and the lists of weights that
    training has changed, as the best ones of `EarlyStopping`. An epoch that a callback ends before its last batch is
    not kept: the next training begins it anew.

    Args:
        directory: where the file is, or will be.

    Raises:
        ValueError: if the file is not whole, or of another format.
    """

    def __init__(self, directory: str | os.PathLike):
        super().__init__()
        self.path = pathlib.Path(directory) / _FILE
        self.epoch, self.stopped = 0, False
        self.seed: int | None = None
        self.history: dict[str, list[float]] = {}
        self.callbacks: list[Any] = []
        self._run: dict[str, Any] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._changed: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            saved, self._arrays = _read(self.path)
            self.epoch, self.stopped, self.seed = saved["epoch"], saved["stopped"], saved["seed"]
            self.history, self._run, self._changed = saved["history"], saved["run"], saved["callbacks"]

    def begin(self, model, seed: int | None, given: dict[str, Any], callbacks: list) -> None:
        """Brings the model to where the file says that it was.

        Args:
            seed: what the order of the data is drawn from.
            given: tells what the model is trained on from other data.
            callbacks: those whose state is kept.

        Raises:
            ValueError: if the file is of another model or loss, or of other data; the model is then unchanged.
        """
        self.seed, self.callbacks = seed, callbacks
        config = _unnamed(json.loads(json.dumps(model.get_config(), default=str)), {})
        run = {**given, "optimizer": type(model.optimizer).__name__, "loss": _described(model.loss)}
        run = {**_settings(json.loads(json.dumps(run, default=_plain))), **_settings(config)}
        variables = _variables(model)
        run |= {f"weight {i}": [list(v.shape), str(v.dtype)] for i, v in enumerate(variables)}
        if self._run:
            self._check(run)
            for i, variable in enumerate(variables):
                variable.assign(self._arrays[_name(i)])
        self._run = run

    def _check(self, run):
        different = [name for name in {**self._run, **run} if self._run.get(name) != run.get(name)]
        if different:
            name = different[0]
            raise invalid(
                f"`resume`: {self.path} must be of this model and of these data; `{name}` differs.",
                "Take another directory, or go on with what it was begun with.",
                saved=self._run.get(name),
                now=run.get(name),
            )

    def on_train_begin(self, logs=None):
        self._before = [_state(callback) for callback in self.callbacks]
        for name, callback in _named(self.callbacks):
            for attribute, value in self._changed.get(name, {}).items():
                setattr(callback, attribute, _restored(value, self._arrays))
        backend.set_random_states([self._arrays[name] for name in sorted(self._arrays) if name.startswith(_RANDOM)])
        self._arrays = {}

    def on_train_batch_end(self, batch, logs=None):
        self._steps = batch + 1

    def on_epoch_end(self, epoch, logs=None):
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        self.epoch, self.stopped = epoch + 1, bool(self.model.stop_training)
        if self._steps < self.params["steps"]:
            return  # within an epoch the next batch is not known
        self._write()

    def _write(self):
        import safetensors.numpy

        arrays = {_name(i): v for i, v in enumerate(_variables(self.model))}
        arrays |= {f"{_RANDOM} {i:03d}": state for i, state in enumerate(backend.random_states())}
        changed: dict[str, dict[str, Any]] = {}
        for (name, callback), before in zip(_named(self.callbacks), self._before, strict=True):
            changed[name] = {
                attribute: _stored(f"{name}/{attribute}", value, arrays)
                for attribute, value in _state(callback).items()
                if attribute not in before or value is not before[attribute]
            }
        document = {name: getattr(self, name) for name in ("epoch", "stopped", "seed", "history")}
        document |= {"run": self._run, "callbacks": changed}
        values = {name: np.asarray(keras.ops.convert_to_numpy(array), order="C") for name, array in arrays.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_beside(self.path) as unfinished:
                safetensors.numpy.save_file(values, unfinished, {_KEY: json.dumps(document)})
        except safetensors.SafetensorError as error:
            raise OSError(f"{self.path}: cannot be written ({error}). The former state is whole.") from error


def _described(loss: Any) -> Any:
    """A loss by its class and settings, or by its name."""
    if isinstance(loss, keras.losses.Loss):
        return _unnamed({"class": type(loss).__name__, **loss.get_config()}, {})
    return getattr(loss, "__name__", loss)


def _plain(value: Any) -> Any:
    """What JSON does not know, the same in each process."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else type(value).__name__


def _variables(model) -> list:
    """The weights and random states of a model and of its optimiser; names change from process to process."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return [*model.variables, *model.optimizer.variables]


def _name(number: int) -> str:
    return f"weight {number}"


def _unnamed(config: Any, numbers: dict[Any, int]) -> Any:
    """A nested configuration without names, which Keras counts on within a process.

    Lists, as those of a functional model's connections, tell a layer by its number among the model's instead.
    """
    if isinstance(config, list):
        return [numbers.get(part, part) if isinstance(part, str) else _unnamed(part, numbers) for part in config]
    if not isinstance(config, dict):
        return config
    if isinstance(layers := config.get("layers"), list):
        numbers = {layer.get("name"): i for i, layer in enumerate(layers) if isinstance(layer, dict)}
    return {key: _unnamed(value, numbers) for key, value in config.items() if key != "name"}


def _settings(config: Any, path: str = "") -> dict[str, Any]:
    """A nested configuration made flat."""
    if not isinstance(config, dict):
        return {path: config}
    parts = (_settings(value, f"{path}.{key}".lstrip(".")) for key, value in config.items())
    return {key: value for part in parts for key, value in part.items()}


def _named(callbacks: list) -> list[tuple[str, Any]]:
    """Each callback under the name of its class and its number among those of that class."""
    counts: Counter = Counter()
    named = []
    for callback in callbacks:
        kind = type(callback).__name__
        named.append((f"{kind} {counts[kind]}", callback))
        counts[kind] += 1
    return named


def _state(callback) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(callback).items()
        if value is None or isinstance(value, (bool, int, float, np.number)) or _are_weights(value)
    }


def _are_weights(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, np.ndarray) for part in value)


def _stored(name: str, value: Any, arrays: dict[str, Any]) -> Any:
    """A value of a callback as JSON has it; weights go among the arrays."""
    if not _are_weights(value):
        return value.item() if isinstance(value, np.number) else value
    names = [f"{name} {i}" for i in range(len(value))]
    arrays.update(zip(names, value, strict=True))
    return {"weights": names}


def _restored(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    return [arrays[name] for name in value["weights"]] if isinstance(value, dict) else value


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    import safetensors

    try:
        with safetensors.safe_open(path, "np") as file:
            document = json.loads((file.metadata() or {})[_KEY])
            return document, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise invalid(
            f"`resume`: {path} must be a state that an earlier training wrote.",
            f"{error!r}. Delete it to begin anew.",
            size=path.stat().st_size,
        ) from error
