"""llama2.c's files of the three versions, written here by hand from the description of the format."""

import struct
import time

import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama.checkpoints.presets import open_checkpoint

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 32, 48, 2, 4, 2, 300, 64
IDS = np.random.default_rng(3).integers(1, VOCABULARY, (2, 20)).astype("int32")


def interchanged(rows, heads):
    """The order of the rows in the original LLaMA: feature i of a head beside feature i + H/2."""
    size = len(rows) // heads
    return np.concatenate(
        [rows[h * size + i + half * size // 2][None] for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    )


def matrices(backbone):
    """{name: list over blocks of float32 arrays (out, in)} of a backbone, in llama2.c's order of rows."""
    values = {variable.path: ops.convert_to_numpy(variable.value) for variable in backbone.variables}
    kernels = {
        "wq": ("attention/query", HEADS),
        "wk": ("attention/key", KV_HEADS),
        "wv": ("attention/value", None),
        "wo": ("attention/attention_output", None),
        "w1": ("mlp/gate", None),
        "w2": ("mlp/down", None),
        "w3": ("mlp/up", None),
    }
    found = {}
    for name, (path, heads) in kernels.items():
        rows = [values[f"block_{i}/{path}/kernel"].T for i in range(LAYERS)]
        found[name] = [interchanged(x, heads) for x in rows] if heads else rows
    for name in ("attention_norm", "mlp_norm"):
        found[name] = [values[f"block_{i}/{name}/scale"] for i in range(LAYERS)]
    found["norm"], found["embedding"] = values["final_norm/scale"], values["token_embedding/embeddings"]
    return found


def quantised(values, group):
    """Integers and scales of Q8_0 in groups of `group` numbers."""
    groups = values.reshape(-1, group)
    scales = np.abs(groups).max(axis=1) / 127
    return np.round(groups / scales[:, None]).astype("int8"), scales.astype("<f4")


def pack(backbone, version, head=None, group=16):
    """A file of `version`; `head` (V, D) is the matrix apart, `None` the embedding."""
    parts = matrices(backbone)
    numbers = [DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT]
    kernels = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")

    def plain(*names):
        return b"".join(np.asarray(x, "<f4").tobytes() for name in names for x in parts[name])

    norm, embedding = parts["norm"].tobytes(), parts["embedding"]
    heads = [] if head is None else [head]
    if version == 0:
        numbers[5] *= 1 if head is None else -1
        angles = bytes(CONTEXT * (DIM // HEADS // 2) * 4)
        body = [embedding.tobytes(), plain("attention_norm", *kernels[:4], "mlp_norm", *kernels[4:]), norm]
        return struct.pack("<7i", *numbers) + b"".join(body) + angles * 2 + b"".join(x.tobytes() for x in heads)
    start = struct.pack("<Ii7iB", 0x616B3432, version, *numbers, head is None)
    norms = plain("attention_norm", "mlp_norm") + norm
    if version == 1:
        tensors = embedding.tobytes() + plain(*kernels) + b"".join(x.tobytes() for x in heads)
        return start.ljust(256, b"\0") + norms + tensors
    start += struct.pack("<i", group)
    every = [embedding, *(x for name in kernels for x in parts[name]), *heads]
    return start.ljust(256, b"\0") + norms + b"".join(x.tobytes() for v in every for x in quantised(v, group))


@pytest.fixture
def backbone(make_backbone):
    return make_backbone(vocabulary_size=VOCABULARY, tie_word_embeddings=True, context_length=CONTEXT)


@pytest.fixture
def written(tmp_path):
    def write(data, name="model.bin"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def logits(lm):
    return ops.convert_to_numpy(lm({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.plain)])
def test_every_version_is_read(backbone, written, version, tied):
    head = None if tied else np.random.default_rng(9).normal(0, 0.3, (VOCABULARY, DIM)).astype("float32")
    lm = keras_llama.LlamaCausalLM.from_preset(written(pack(backbone, version, head)), dtype="float32")
    assert lm.backbone.config.tie_word_embeddings == tied
    assert lm.backbone.config.context_length == CONTEXT
    assert lm.stop_ids == {1, 2}
    ours = {variable.path: ops.convert_to_numpy(variable.value) for variable in lm.backbone.variables}
    for variable in backbone.variables:
        values = ops.convert_to_numpy(variable.value)
        # Version 2 keeps 8 bits of each matrix, in groups with a scale of their own.
        allowed = np.abs(values).max() / 127 / 2 * 1.001 if version == 2 and values.ndim == 2 else 0
        assert np.abs(ours[variable.path] - values).max() <= allowed, variable.path
    if not tied:
        found = ops.convert_to_numpy(lm.get_layer("lm_head").kernel).T
        assert np.abs(found - head).max() <= (np.abs(head).max() / 127 if version == 2 else 0)
    if version < 2 and tied:
        assert np.array_equal(logits(lm), logits(keras_llama.LlamaCausalLM(backbone)))


@pytest.mark.plain
def test_groups_of_the_file_are_used(backbone, written):
    small, large = (written(pack(backbone, 2, group=group), f"{group}.bin") for group in (8, 32))
    values = ops.convert_to_numpy(backbone.get_layer("block_0").mlp.up.kernel).T
    errors = [
        np.abs(open_checkpoint(path).tensors["layers.0.mlp.up_proj.weight"].read() - values).mean()
        for path in (small, large)
    ]
    assert 0 < errors[0] < errors[1]
    assert open_checkpoint(small).dtype == "bfloat16"


@pytest.mark.plain
@pytest.mark.parametrize("name", ["tokenizer.model", f"tok{VOCABULARY}.model"])
def test_a_tokenizer_beside_the_file_is_taken(backbone, written, tokenizer, name):
    path = written(pack(backbone, 1))
    assert keras_llama.LlamaCausalLM.from_preset(path).preprocessor is None
    written(tokenizer.proto, name)
    lm = keras_llama.LlamaCausalLM.from_preset(path)
    assert lm.preprocessor.tokenizer.encode(["a good film"]) == tokenizer.encode(["a good film"])


@pytest.mark.plain
def test_a_model_of_llama2c_leaves_for_transformers(backbone, written, tmp_path):
    import torch
    import transformers

    lm = keras_llama.LlamaCausalLM.from_preset(written(pack(backbone, 0)))
    keras_llama.save_checkpoint(lm, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = theirs(torch.tensor(IDS.astype(int))).logits.detach().numpy()
    assert np.abs(logits(lm) - expected).max() <= 1e-4


CASES = {
    "a pickle": (lambda good: b"PK\x03\x04" + good, "expected safetensors; a pickle can run any code"),
    "an older pickle": (lambda good: b"\x80\x02}q" + good, "expected safetensors; a pickle can run any code"),
    "empty": (lambda good: b"", "expected a llama2.c file"),
    "text": (lambda good: b"hello, this is no model at all. " * 20, "llama2.c file of version 0, 1 or 2"),
    "magic": (lambda good: b"24kb" + good[4:], "llama2.c file of version 0, 1 or 2"),
    "version": (lambda good: good[:4] + struct.pack("<i", 3) + good[8:], "version 0, 1 or 2"),
    "cut off": (lambda good: good[:-4], "expected \\d+ bytes"),
    "too long": (lambda good: good + b"\0", "expected \\d+ bytes"),
    "a huge size": (lambda good: good[:8] + struct.pack("<7i", *[2**31 - 4] * 3, 4, 2, 60, 64) + good[36:], "expected"),
    "a negative size": (lambda good: good[:8] + struct.pack("<i", -32) + good[12:], "version 0, 1 or 2"),
    "heads": (lambda good: good[:20] + struct.pack("<i", 5) + good[24:], "version 0, 1 or 2"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", CASES)
def test_what_is_no_file_of_llama2c(backbone, written, case):
    change, message = CASES[case]
    path = written(change(pack(backbone, 1)))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        keras_llama.LlamaCausalLM.from_preset(path)
    assert time.perf_counter() - start < 10


@pytest.mark.plain
def test_a_group_that_divides_nothing(backbone, written):
    data = bytearray(pack(backbone, 2))
    for group in (0, -16, 7):
        data[37:41] = struct.pack("<i", group)
        with pytest.raises(ValueError, match="expected"):
            keras_llama.LlamaCausalLM.from_preset(written(bytes(data)))


@pytest.mark.plain
def test_a_number_that_is_none(backbone, written):
    backbone.get_layer("final_norm").scale.assign(np.full(DIM, np.nan))
    with pytest.raises(ValueError, match=r"finite numbers in every tensor.*norm.weight"):
        keras_llama.LlamaCausalLM.from_preset(written(pack(backbone, 0)))
