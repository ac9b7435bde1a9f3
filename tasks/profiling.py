"""A profiler's trace of a few training steps, by the profiler of each backend."""

import contextlib
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator

import keras

from keras_llama.beside import folder_beside

SKIPPED = 3  # steps, which compile
TRACED = 5
VIEWERS = {
    "tensorflow": "TensorBoard with the package xprof",
    "jax": "https://ui.perfetto.dev, or TensorBoard with the package xprof",
    "torch": "https://ui.perfetto.dev",
}


@contextlib.contextmanager
def profiled(path: pathlib.Path) -> Iterator[list["Profile"]]:
    """Gives the callbacks of a `fit` that write a trace into the folder `path`; the profiler stops however it ends."""
    profile = Profile(path)
    try:
        yield [profile]
    finally:
        profile.close()


class Profile(keras.callbacks.Callback):
    """Traces `TRACED` steps after the first `SKIPPED`, or those that there are until it is closed."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.path = path
        self.steps: Counter = Counter()  # `fit(resume=)` would bring back a number from the training before
        self._trace = contextlib.ExitStack()

    def on_train_batch_begin(self, batch, logs=None):
        if self.steps["seen"] == SKIPPED:
            self._trace.enter_context(_trace(self.path))

    def on_train_batch_end(self, batch, logs=None):
        self.steps["seen"] += 1
        if self.steps["seen"] == SKIPPED + TRACED:
            keras.tree.map_structure(float, logs)  # waits for the step
            self._trace.close()

    def close(self):
        self._trace.close()
        seen, traced = self.steps["seen"], min(self.steps["seen"] - SKIPPED, TRACED)
        if traced > 0:
            print(f"{self.path}: a profile of {traced} training steps, for {VIEWERS[keras.config.backend()]}")
        else:
            print(f"No profile: training took {seen} steps, and the first {SKIPPED} compile.")


@contextlib.contextmanager
def _trace(path: pathlib.Path) -> Iterator[None]:
    with folder_beside(path) as unfinished:
        stop = _start(unfinished)
        try:
            yield
        finally:
            stop()
        shutil.rmtree(path, ignore_errors=True)
        os.replace(unfinished, path)


def _start(folder: pathlib.Path) -> Callable[[], None]:
    """Starts the profiler; what it returns stops it and writes into `folder`."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        tf.profiler.experimental.start(str(folder))
        return tf.profiler.experimental.stop
    if keras.config.backend() == "jax":
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python would fill the million events that a file for Perfetto holds
        jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
        return jax.profiler.stop_trace
    import torch

    profiler = torch.profiler.profile()
    profiler.start()

    def stop():
        profiler.stop()
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))

    return stop
