"""What the machine allows and what a process holds: on the GPU where there is one, else on the CPU."""

import contextlib
import pathlib
import threading
import time

import numpy as np

TRIES = 5


def status(field: str) -> int:
    """A size of this process in bytes, such as "VmHWM", its most resident pages so far, or "RssAnon"."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def anonymous() -> int:
    """This process' anonymous memory in bytes: mapped pages of a file are the kernel's."""
    return status("RssAnon")


@contextlib.contextmanager
def process_peak():
    """How far anonymous memory rose inside above its level at first, in bytes, to be asked for afterwards."""
    before = peak = anonymous()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: peak - before
    finally:
        done.set()
        watcher.join()


def peak_memory(backend: str) -> int:
    """The most bytes that this process has held so far: of the GPU's memory if the backend computes there."""
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    elif backend == "jax":
        import jax

        if jax.devices()[0].platform == "gpu":
            return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    else:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    return status("VmHWM")


def torch_device():
    """Where torch computes."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _fastest(work) -> float:
    """Seconds of the best of some tries, the first of which warms up."""
    best = float("inf")
    for _ in range(TRIES + 1):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def arithmetic(dtype: str) -> float:
    """Operations a second of a large product by torch."""
    import torch

    device = torch_device()
    size = 2048 if device == "cpu" else 8192
    one = torch.ones((size, size), dtype=getattr(torch, dtype.removeprefix("mixed_")), device=device)
    return 2 * size**3 / _fastest(lambda: (one @ one)[0, 0].item())


def bandwidth() -> float:
    """Bytes a second that are read: by two threads of NumPy's sum, or by a sum on the GPU."""
    if torch_device() == "cuda":
        import torch

        array = torch.ones(2**28, device="cuda")
        return array.nbytes / _fastest(lambda: array.sum().item())
    arrays = [np.ones(2**26, "float32") for _ in range(2)]

    def work():
        threads = [threading.Thread(target=array.sum) for array in arrays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return sum(array.nbytes for array in arrays) / _fastest(work)
