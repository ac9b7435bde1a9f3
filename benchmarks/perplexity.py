"""What fewer bits cost: perplexity of a language model in each dtype, alone and under LoRA, beside llama.cpp.

    KERAS_BACKEND=torch python -m benchmarks.perplexity --text book.txt [--preset smollm2_135m_instruct] [--steps 40]
                                                         [--llama-cpp q4_1.gguf] [--models float32 int8 ...]

The first 50,000 bytes of the text, in windows of 512 tokens whose first has none before it; logits of the first window
are compared with those of the first of `--models`. "int4/32" is int4 in groups of 32 numbers; "gptq" and "awq" are that
of the blocks' kernels alone, calibrated on 64 x 256 tokens of what follows in the text. An adapter (rank 8, beside
all linear kernels) is trained for `--steps` of 4 x 256 tokens, the same ones and on. llama.cpp reads `--llama-cpp`,
and q8_0 of the same weights written here; it is asked for the log-probability of each next token.
"""

import argparse
import json
import math
import os
import tempfile
import urllib.request

import numpy as np

BYTES, WINDOW = 50_000, 512
BATCH, LENGTH, RANK = 4, 256, 8
CERTAIN, PATIENCE = 1e6, 60  # a bias beyond all logits; seconds
SAMPLES, GROUP = 64, 32
MODELS = ("float32", "bfloat16", "int8", "int4", "int4/32", "gptq", "awq")


def windows(tokenizer, text: str, length: int) -> list[list[int]]:
    (ids,) = tokenizer.encode([text])
    return [ids[i : i + length] for i in range(0, len(ids) - 1, length)]


def perplexity(log_probs) -> float:
    return math.exp(-np.mean(log_probs))


def rounded(lm, name: str, rest: str) -> None:
    """Quantises a model as one of `MODELS` says."""
    import keras

    if name in ("int8", "int4"):
        lm.quantize(name)
    elif name == "int4/32":
        lm.quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=GROUP))
    elif name in ("gptq", "awq"):
        kind = keras.quantizers.GPTQConfig if name == "gptq" else keras.quantizers.AWQConfig
        rows = windows(lm.preprocessor.tokenizer, rest, LENGTH)[:SAMPLES]
        lm.quantize(config=kind(rows, None, num_samples=SAMPLES, sequence_length=LENGTH, group_size=GROUP))


def here(args, name: str, text: str, rest: str, exact: np.ndarray | None) -> np.ndarray:
    """Perplexity of one of `MODELS`, before and after an adapter is trained; logits of the first window."""
    import keras

    import keras_llama

    keras.utils.set_random_seed(0)
    computed = "bfloat16" if name == "bfloat16" else "float32"
    lm = keras_llama.LlamaCausalLM.from_preset(args.preset, dtype=computed)
    rounded(lm, name, rest)
    rows = windows(lm.preprocessor.tokenizer, text, WINDOW)

    def measured():
        return perplexity(np.concatenate([row["log_probs"] for row in lm.score(rows, batch_size=1)]))

    print(f"{name}: {measured():.3f} over {sum(map(len, rows)) - len(rows)} tokens", flush=True)
    logits = lm.predict(np.array(rows[:1], "int32"), verbose=0)[0]
    if exact is not None:
        error = np.abs(logits - exact)
        print(
            f"  logits beside {args.models[0]}'s: mean error {error.mean():.3f}, largest {error.max():.2f}", flush=True
        )
    if not args.steps:
        return logits
    lm.enable_lora(RANK, targets="all-linear")
    lm.compile(keras.optimizers.Adam(2e-4))
    learned = windows(lm.preprocessor.tokenizer, rest, LENGTH)[: args.steps * BATCH]
    lm.fit(np.array(learned, "int32"), batch_size=BATCH, verbose=0)
    print(f"{name} under LoRA, {args.steps} steps: {measured():.3f}", flush=True)
    return logits


class LlamaCpp:
    """A file served by llama.cpp."""

    def __init__(self, path: str):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = path
        settings.n_ctx, settings.n_parallel = 2 * WINDOW, 1
        settings.cpuparams.n_threads = len(os.sched_getaffinity(0))  # more of them wait for each other
        self.server = xllamacpp.Server(settings)

    def log_prob(self, before: list[int], wanted: int) -> float:
        """Of a token after others, which stay in the server's cache.

        A bias makes sure that it is drawn; what is told of the drawn token is its probability without the bias.
        """
        options = {"prompt": before, "n_predict": 1, "n_probs": 1, "cache_prompt": True, "temperature": 0.0}
        body = json.dumps({**options, "logit_bias": [[wanted, CERTAIN]]}).encode()
        with urllib.request.urlopen(
            urllib.request.Request(self.server.listening_address + "/completion", body), timeout=PATIENCE
        ) as answer:
            (told,) = json.load(answer)["completion_probabilities"]
        if told["id"] != wanted:
            raise RuntimeError(f"llama.cpp drew token {told['id']} in place of {wanted}")
        return told["logprob"]


def beside(args, text: str) -> None:
    import keras_llama

    lm = keras_llama.LlamaCausalLM.from_preset(args.preset, dtype="float32")
    rows = windows(lm.preprocessor.tokenizer, text, WINDOW)
    with tempfile.TemporaryDirectory() as directory:
        written = f"{directory}/q8_0.gguf"
        keras_llama.save_checkpoint(lm, written, format="gguf", quantization="q8_0")
        for name, path in (("its own file", args.llama_cpp), ("q8_0", written)):
            judge = LlamaCpp(path)
            found = [judge.log_prob(row[:i], row[i]) for row in rows for i in range(1, len(row))]
            print(f"llama.cpp, {name}: {perplexity(found):.3f}", flush=True)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--text", required=True)
    flags.add_argument("--preset", default="smollm2_135m_instruct")
    flags.add_argument("--steps", type=int, default=40)
    flags.add_argument("--llama-cpp", metavar="FILE")
    flags.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    args = flags.parse_args()
    with open(args.text, "rb") as file:
        text, rest = (file.read(size).decode(errors="ignore") for size in (BYTES, 20 * BYTES))
    exact = None
    for name in args.models:
        logits = here(args, name, text, rest, exact)
        exact = logits if exact is None else exact
    if args.llama_cpp:
        beside(args, text)


if __name__ == "__main__":
    main()
