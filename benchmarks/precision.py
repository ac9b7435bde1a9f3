"""Whether half precision trains as float32 does: the loss of 200 steps in each, from the same checkpoint.

    KERAS_BACKEND=torch python -m benchmarks.precision --text book.txt [--preset smollm2_135m_instruct] [--steps 200]

Rows of 2 x 128 tokens in the order of the text, never twice; each point of a curve is the mean of ten steps. All
weights in mixed_bfloat16 stand beside all in float32 (Adam, 2e-5), and an adapter (rank 8, all linear kernels, 2e-4) on
a bfloat16 base beside one on a float32 base.
"""

import argparse

import numpy as np

BATCH, LENGTH, POINT = 2, 128, 10
PAIRS = {"all": ("float32", "mixed_bfloat16"), "lora": ("float32", "bfloat16")}
RATES = {"all": 2e-5, "lora": 2e-4}


def curve(args, trained: str, dtype: str, text: str) -> np.ndarray:
    import keras

    import keras_llama

    keras.utils.set_random_seed(0)
    lm = keras_llama.LlamaCausalLM.from_preset(args.preset, dtype=dtype)
    if trained == "lora":
        lm.enable_lora(8, targets="all-linear")
    lm.compile(keras.optimizers.Adam(RATES[trained], global_clipnorm=1.0))
    (ids,) = lm.preprocessor.tokenizer.encode([text])
    rows = np.array(ids[: args.steps * BATCH * LENGTH], "int32").reshape(args.steps // POINT, POINT * BATCH, LENGTH)
    return np.array([lm.fit(some, batch_size=BATCH, shuffle=False, verbose=0).history["loss"][0] for some in rows])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--text", required=True)
    flags.add_argument("--preset", default="smollm2_135m_instruct")
    flags.add_argument("--steps", type=int, default=200)
    flags.add_argument("--trained", nargs="+", choices=PAIRS, default=list(PAIRS))
    args = flags.parse_args()
    with open(args.text, encoding="utf-8") as file:
        text = file.read(8 * args.steps * BATCH * LENGTH)
    for trained in args.trained:
        expected, found = (curve(args, trained, dtype, text) for dtype in PAIRS[trained])
        difference = np.abs(found / expected - 1)
        print(f"{trained}: {PAIRS[trained][1]} beside {PAIRS[trained][0]}")
        print("  float32 ", *(f"{value:.3f}" for value in expected))
        print("  other   ", *(f"{value:.3f}" for value in found))
        print(f"  largest difference {100 * difference.max():.2f} %, last {100 * difference[-1]:.2f} %", flush=True)


if __name__ == "__main__":
    main()
