"""What is built, trained and used is freed again: a search over models must not end for want of memory."""

import pytest

PROGRAM = """
import gc, os, sys
import keras, keras_llama
import numpy as np

def anonymous():
    with open("/proc/self/status") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

ids = np.ones((1, 8), "int32")
sizes = {**keras_llama.size("tiny"), "hidden_dim": 512, "intermediate_dim": 2048}
sizes["tie_word_embeddings"] = sys.argv[1] == "fit tied"
levels = []
for _ in range(8):
    backbone = keras_llama.LlamaBackbone(vocabulary_size=8_000, **sizes)
    lm = keras_llama.LlamaCausalLM(backbone, None, {"eos_token_id": []})
    megabytes = sum(int(np.prod(v.shape)) for v in lm.weights) * 4 / 2**20
    if sys.argv[1].startswith("fit"):
        lm.compile(keras.optimizers.SGD(0.1))
        lm.fit(ids, verbose=0)
    else:
        lm.predict(ids, verbose=0)
        lm.generate(ids, 4, stop=None)
    del backbone, lm
    gc.collect()
    levels.append(anonymous())
print(megabytes, *levels)
"""


@pytest.mark.slow
@pytest.mark.parametrize("use", ["fit", "fit tied", "generate"])
def test_a_model_that_is_gone_takes_its_memory_along(run_python, use):
    megabytes, *levels = map(float, run_python(PROGRAM, use).split())
    assert levels[-1] - levels[3] < 1.5 * megabytes, (megabytes, levels)  # kept, four models would be four times it
