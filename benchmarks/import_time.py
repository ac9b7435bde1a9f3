"""Seconds that `import keras_llama` takes beyond `import keras`, per backend, measured in turn in fresh processes.

python benchmarks/import_time.py --rounds 5
"""

import argparse
import os
import statistics
import subprocess
import sys

PROGRAM = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def seconds(module: str, backend: str) -> float:
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", PROGRAM.format(module)]
    return float(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--rounds", type=int, default=5)
    rounds = flags.parse_args().rounds
    print("| backend | keras | keras_llama | difference of medians |\n|---|---|---|---|")
    for backend in ("tensorflow", "jax", "torch"):
        seconds("keras_llama", backend)  # warms the file cache
        times = [(seconds("keras", backend), seconds("keras_llama", backend)) for _ in range(rounds)]
        base, ours = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {backend} | {base:.2f} s | {ours:.2f} s | {ours - base:+.2f} s |")


if __name__ == "__main__":
    main()
