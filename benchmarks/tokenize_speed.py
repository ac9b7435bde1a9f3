"""Encoding and decoding texts in batch: this project beside the raw libraries under it.

    python benchmarks/tokenize_speed.py [--data DIRECTORY] [--rounds 5]

Llama 3 against `tokenizers` (`encode_batch_fast` and `encode_batch`), Llama 2 against `sentencepiece`, on the shared
English, Chinese and story texts. The two take turns in one process; the best of each counts. Asked for: at least 0.9.
"""

import argparse
import os
import pathlib
import time
from collections.abc import Callable


def texts(data: pathlib.Path) -> list[str]:
    pairs = (data / "translation/tatoeba_cmn.txt").read_text(encoding="utf-8").splitlines()
    stories = (data / "generation/tinystories_sample.txt").read_text(encoding="utf-8").splitlines()
    return [text for pair in pairs for text in pair.split("\t")[:2]] + stories


def best(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call, the best of `rounds`, in turn."""
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def report(title: str, calls: dict[str, Callable[[], object]], rounds: int, characters: int) -> None:
    seconds = best(calls, rounds)
    ours = seconds["keras_llama"]
    for name, taken in seconds.items():
        ratio = "" if name == "keras_llama" else f"   keras_llama is {taken / ours:.2f}x as fast"
        print(f"{title:16} {name:30} {taken:7.3f} s  {characters / taken / 1e6:6.2f} M characters/s{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=os.environ.get("KERAS_LLAMA_DATA", beside))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    import sentencepiece
    import tokenizers

    from keras_llama.opening import open_tokenizer

    lines = texts(args.data)
    characters = sum(map(len, lines))
    llama2, llama3 = (
        open_tokenizer({"tokenizer.model": (args.data / f"checkpoints/{name}_tokenizer/tokenizer.model").read_bytes()})
        for name in ("llama2", "llama3")
    )
    print(f"{len(lines)} texts, {characters / 1e6:.2f} M characters, best of {args.rounds}")

    rust = tokenizers.Tokenizer.from_buffer(llama3.files["tokenizer.json"])
    rust.encode_special_tokens = True
    calls: dict[str, Callable[[], object]] = {
        "keras_llama": lambda: llama3.encode(lines),
        "tokenizers encode_batch_fast": lambda: [
            row.ids for row in rust.encode_batch_fast(lines, add_special_tokens=False)
        ],
        "tokenizers encode_batch": lambda: [row.ids for row in rust.encode_batch(lines, add_special_tokens=False)],
    }
    report("Llama 3 encode", calls, args.rounds, characters)
    ids = llama3.encode(lines)
    calls = {"keras_llama": lambda: llama3.decode(ids), "tokenizers decode_batch": lambda: rust.decode_batch(ids)}
    report("Llama 3 decode", calls, args.rounds, characters)

    raw = sentencepiece.SentencePieceProcessor(model_proto=llama2.files["tokenizer.model"])
    calls = {"keras_llama": lambda: llama2.encode(lines), "sentencepiece": lambda: raw.encode(lines)}
    report("Llama 2 encode", calls, args.rounds, characters)
    pieces = llama2.encode(lines)
    calls = {"keras_llama": lambda: llama2.decode(pieces), "sentencepiece": lambda: raw.decode(pieces)}
    report("Llama 2 decode", calls, args.rounds, characters)


if __name__ == "__main__":
    main()
