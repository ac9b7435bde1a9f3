"""Greedy decoding whose text is shown as it comes: ms a token, by the number of tokens that are shown at a time.

    python -m benchmarks.stream [--backends tensorflow jax torch] [--dtypes float32 bfloat16] [--rounds 3]

SmolLM2-135M-Instruct, one prompt, 64 new tokens, no stop tokens; the best of the rounds after a first.
"""

import argparse
import time

from benchmarks.engines import BACKENDS, Engine, serve

NEW = 64


def child(dtype: str):
    import keras_llama

    lm = keras_llama.LlamaCausalLM.from_preset("smollm2_135m_instruct", dtype=dtype)
    lm.generation_config["eos_token_id"] = []

    def milliseconds(shown, rounds):
        times = []
        for _ in range(1 + rounds):
            started = time.perf_counter()
            for _ in lm.generate("The history of the town begins", NEW, temperature=0.0, stop=None, stream=shown):
                pass
            times.append((time.perf_counter() - started) / NEW * 1e3)
        return min(times[1:])

    return milliseconds


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    flags.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return serve(lambda: child(args.dtypes[0]))
    for backend in args.backends:
        for dtype in args.dtypes:
            engine = Engine("benchmarks.stream", f"keras_llama/{backend}", "--dtypes", dtype)
            found = {shown: engine.ask(shown, args.rounds) for shown in (1, 8, NEW)}
            engine.close()
            print(f"{backend:12}{dtype:10}", *(f"{n} at a time {ms:6.1f}" for n, ms in found.items()), flush=True)
    return None


if __name__ == "__main__":
    main()
