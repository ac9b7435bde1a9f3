"""A profile is a file that its viewer reads, of steps of training; the profiler stops however training ends."""

import gzip
import json

import keras
import numpy as np
import pytest

from tasks import profiling


@pytest.fixture
def train():
    """Trains a small model for so many steps, with callbacks."""

    def run(steps, callbacks):
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=keras.config.backend() == "jax")
        x = np.ones((4 * steps, 8), "float32")
        model.fit(x, x[:, :1], batch_size=4, verbose=0, callbacks=callbacks)

    return run


def operations(folder):
    """The names of all events in the files of a profile."""
    names = set()
    for path in folder.rglob("*.json.gz"):
        names |= {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    for path in folder.rglob("*.xplane.pb"):
        from tensorflow.tsl.profiler.protobuf import xplane_pb2

        space = xplane_pb2.XSpace.FromString(path.read_bytes())
        for plane in space.planes:
            kinds = {event.metadata_id for line in plane.lines for event in line.events}
            names |= {plane.event_metadata[kind].name for kind in kinds}
    return names


PRODUCTS = {"tensorflow": "MatMul", "jax": "dot", "torch": "aten::mm"}


def has_products(folder):
    return any(PRODUCTS[keras.config.backend()] in (name or "") for name in operations(folder))


@pytest.mark.parametrize(("steps", "traced"), [(20, 5), (5, 2)])
def test_a_profile_holds_the_operations_of_training_steps(train, tmp_path, capsys, steps, traced):
    path = tmp_path / "profile"
    path.mkdir()
    (path / "old").write_text("")
    with profiling.profiled(path) as callbacks:
        train(steps, callbacks)
    assert f"a profile of {traced} training steps" in capsys.readouterr().out
    assert has_products(path)
    assert not [name for name in operations(path) if (name or "").startswith("$")]  # JAX's name of a call of Python
    assert [found.name for found in tmp_path.iterdir()] == ["profile"]
    assert not (path / "old").exists()


def test_too_short_a_training_says_so(train, tmp_path, capsys):
    with profiling.profiled(tmp_path / "profile") as callbacks:
        train(3, callbacks)
    assert "No profile: training took 3 steps, and the first 3 compile." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


class Interruption(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 4:
            raise KeyboardInterrupt


def test_an_interrupted_training_leaves_no_profiler_running(train, tmp_path):
    def interrupted():
        with profiling.profiled(tmp_path / "first") as callbacks:
            train(20, [*callbacks, Interruption()])

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert has_products(tmp_path / "first")
    with profiling.profiled(tmp_path / "second") as callbacks:  # a second profiler cannot start beside one that runs
        train(20, callbacks)
    assert has_products(tmp_path / "second")
