"""Blocks of one architecture share a trace in TensorFlow's graphs; what tells blocks apart is not shared."""

import keras
import numpy as np

import keras_llama
from keras_llama import backend, cache
from keras_llama.layers import LlamaBlock


def make(make_backbone, changed):
    """Four blocks with random weights; if changed, one is quantised in part and two are adapted, by unlike factors."""
    backbone = make_backbone(num_layers=4)
    generator = np.random.default_rng(5)
    for variable in backbone.weights:
        variable.assign(generator.normal(0, 0.3, variable.shape))
    if changed:
        backbone.blocks[1].mlp.up.quantize("int8")
        for block, alpha in ((backbone.blocks[2], 1.0), (backbone.blocks[3], 9.0)):
            block.attention.value.enable_lora(2, lora_alpha=alpha)
            block.attention.value.lora_kernel_b.assign(generator.normal(0, 1, (2, block.attention.value.units)))
    return backbone


def calls(monkeypatch):
    """What collects the blocks that are called from now on."""
    called, call = [], LlamaBlock.call
    monkeypatch.setattr(LlamaBlock, "call", lambda self, *a, **k: called.append(self) or call(self, *a, **k))
    return called


def check(backbone, called, expected):
    """Hidden states of a step, compiled, are those of a whole forward; `expected` blocks were called for it."""
    ids = np.array([[5, 8, 2, 7]], "int32")
    ones = np.ones_like(ids)
    exact = keras.ops.convert_to_numpy(backbone({"token_ids": ids, "padding_mask": ones}))

    def step(ids):
        pairs = cache.make(backbone.config, 1, 4)
        return backbone.decode(ids, ones, pairs, 0)[0]

    called.clear()
    found = keras.ops.convert_to_numpy(backend.Compiled(step, backbone.variables)(ids))
    assert len(called) == (expected if keras.config.backend() == "tensorflow" else 4)
    np.testing.assert_allclose(found, exact, atol=2e-5)


def test_blocks_that_are_alike_are_traced_once(make_backbone, monkeypatch):
    backbone = make(make_backbone, changed=False)
    check(backbone, calls(monkeypatch), 1)


def test_blocks_that_differ_are_traced_each(make_backbone, monkeypatch):
    backbone = make(make_backbone, changed=True)
    check(backbone, calls(monkeypatch), 4)


def test_a_model_of_different_blocks_generates(make_backbone):
    """With copies of kernels, and without (more than four rows), the ids are the same."""
    lm = keras_llama.LlamaCausalLM(make(make_backbone, changed=True))
    alone = lm.generate([[5, 8, 2]], 24, temperature=0.0, stop=None)["token_ids"]
    together = lm.generate([[5, 8, 2]] * 5, 24, temperature=0.0, stop=None, batch_size=5)["token_ids"]
    assert (together == alone).all()
