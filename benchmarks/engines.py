"""Models of SmolLM2-135M's shape with random weights, this project's and its peers', each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.machine import torch_device

SHAPE = {
    "vocabulary_size": 49_152,
    "num_layers": 30,
    "num_query_heads": 9,
    "num_key_value_heads": 3,
    "hidden_dim": 576,
    "intermediate_dim": 1536,
}
THETA = 100_000
CONTEXT = 2048
BACKENDS = ("tensorflow", "jax", "torch")


def keras_llama_lm(dtype: str, shape: dict = SHAPE, **options):
    import keras_llama

    backbone = keras_llama.LlamaBackbone(
        **shape, rope_max_wavelength=THETA, tie_word_embeddings=True, context_length=CONTEXT, dtype=dtype, **options
    )
    return keras_llama.LlamaCausalLM(backbone, None, {"eos_token_id": []})


def keras_hub_lm(dtype: str, shape: dict = SHAPE):
    import keras_hub

    backbone = keras_hub.models.Llama3Backbone(
        **shape, rope_max_wavelength=THETA, tie_word_embeddings=True, dtype=dtype
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


def transformers_lm(dtype: str):
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocabulary_size"],
        hidden_size=SHAPE["hidden_dim"],
        intermediate_size=SHAPE["intermediate_dim"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_query_heads"],
        num_key_value_heads=SHAPE["num_key_value_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
    )
    return transformers.LlamaForCausalLM(config).to(torch_device(), getattr(torch, dtype))


class Engine:
    """A process that runs `python -m module --child name ...`, and answers questions while it is asked none."""

    def __init__(self, module: str, name: str, *flags: str, **environment: str):
        command = [sys.executable, "-m", module, "--child", name, *flags]
        backend = name.split("/")[1].split("-")[0] or "tensorflow"
        variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment, "KERAS_BACKEND": backend}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=variables, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.questions, self.answers = self.process.stdin, self.process.stdout
        if self.answers.readline().strip() != "ready":
            raise SystemExit(f"{name} did not start.")

    def ask(self, *question: Any) -> Any:
        self.questions.write(json.dumps(question) + "\n")
        self.questions.flush()
        answer = self.answers.readline()
        if not answer:
            raise SystemExit(f"A process ended at {question}.")
        return json.loads(answer)

    def close(self) -> None:
        self.questions.close()
        self.process.wait()


def serve(make: Callable[[], Callable]) -> None:
    """What a child does: makes its model, then answers each line, a list of arguments, in JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr
    answer = make()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), file=answers, flush=True)
