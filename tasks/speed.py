"""How many rows a second a recipe trains; it starts Keras."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import keras


@dataclasses.dataclass
class Speed:
    """Rows that are trained in `seconds`, in the epochs run now: --resume has others from before."""

    rows: int = 0
    seconds: float = 0.0

    @contextlib.contextmanager
    def of(self, rows: int) -> Iterator[keras.callbacks.Callback]:
        """A callback for the `fit` inside, which counts `rows` for each epoch."""

        def count(*_: Any) -> None:
            self.rows += rows

        started = time.perf_counter()
        yield keras.callbacks.LambdaCallback(on_epoch_end=count)
        self.seconds += time.perf_counter() - started

    @property
    def per_second(self) -> float:
        """As a report has it."""
        return round(self.rows / self.seconds, 1)
