"""GGUF files: in, out and back; every quantisation; llama.cpp as the judge; and everything that can be wrong."""

import json
import math
import struct
import time
import tracemalloc
import urllib.request

import gguf as reference_gguf
import numpy as np
import pytest
import reference
import transformers
from keras import ops

import keras_llama
from keras_llama import backend
from keras_llama.checkpoints import gguf, mapping
from keras_llama.checkpoints.presets import open_checkpoint, save_checkpoint
from keras_llama.rope import inverse_frequencies

IDS = np.random.default_rng(3).integers(1, 60, (2, 40)).astype("int32")
FLOAT32, STRING, UINT32 = 6, 8, 4
FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
SHAPES = {
    "token_embd": (60, 32),
    "blk.0.attn_norm": (32,),
    "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (16, 32),
    "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32),
    "blk.0.ffn_norm": (32,),
    "blk.0.ffn_gate": (64, 32),
    "blk.0.ffn_up": (64, 32),
    "blk.0.ffn_down": (32, 64),
    "output_norm": (32,),
}


def random_tensors():
    rng = np.random.default_rng(5)
    return {f"{name}.weight": rng.normal(0, 0.3, shape).astype("float32") for name, shape in SHAPES.items()}


def field(name, value):
    """One field, as the specification spells it."""
    head = struct.pack("<Q", len(name)) + name.encode()
    if isinstance(value, str):
        return head + struct.pack("<IQ", STRING, len(value)) + value.encode()
    kind, form = (UINT32, "I") if isinstance(value, int) else (FLOAT32, "f")
    return head + struct.pack(f"<I{form}", kind, value)


def pack(tensors, fields=FIELDS, alignment=32, offsets=None, count=None, kinds=None, magic=b"GGUF", version=3):
    """A file written by hand: `tensors` are arrays of float32, or bytes with a shape in SHAPES."""
    infos, data = b"", b""
    for name, values in tensors.items():
        raw = values if isinstance(values, bytes) else values.tobytes()
        shape = SHAPES.get(name.removesuffix(".weight"), (16,)) if isinstance(values, bytes) else values.shape
        offset = (offsets or {}).get(name, len(data))
        infos += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        infos += struct.pack("<IQ", (kinds or {}).get(name, 0), offset)
        data += raw + bytes(-len(raw) % alignment)
    numbers = struct.pack("<IQQ", version, len(tensors) if count is None else count, len(fields))
    head = magic + numbers + b"".join(field(*pair) for pair in fields.items()) + infos
    return head + bytes(-len(head) % alignment) + data


def logits(model, ids=IDS):
    return ops.convert_to_numpy(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))


@pytest.fixture
def written(tmp_path):
    """Writes bytes, and gives the path."""

    def write(data):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def small_lm(make_backbone, tokenizer):
    def make(**changes):
        backbone = make_backbone(vocabulary_size=tokenizer.vocabulary_size, context_length=64, **changes)
        return keras_llama.LlamaCausalLM(backbone, keras_llama.TextPreprocessor(tokenizer))

    return make


# ---- In


def interchanged(rows, heads):
    """llama.cpp's order of the rows of a query or key matrix, written out row by row."""
    size = len(rows) // heads
    order = [
        head * size + half * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half in range(2)
    ]
    return rows[order]


@pytest.mark.plain
def test_a_file_written_by_hand_is_read(written):
    tensors = random_tensors()
    stored = {**tensors}
    for name, heads in {"attn_q": 4, "attn_k": 2}.items():
        stored[f"blk.0.{name}.weight"] = interchanged(tensors[f"blk.0.{name}.weight"], heads)
    backbone = keras_llama.LlamaBackbone.from_preset(written(pack(stored)))
    assert backbone.config.tie_word_embeddings
    assert backbone.config.context_length == 64
    ours = {variable.path: ops.convert_to_numpy(variable.value) for variable in backbone.variables}
    for row in mapping.TABLE:
        if row.gguf is not None and row.gguf.replace("{i}", "0") in tensors:
            values = tensors[row.gguf.replace("{i}", "0")]
            assert np.array_equal(ours[row.ours.replace("{i}", "0")], values.T if row.transposed else values)


@pytest.mark.plain
def test_the_order_of_rows_is_undone_for_grouped_heads(make_backbone):
    config = make_backbone(num_query_heads=8, num_key_value_heads=2).config
    for kind, heads in (("query", 8), ("key", 2)):
        row = next(row for row in mapping.TABLE if row.rotated == kind)
        array = np.arange(heads * config.head_dim * 3).reshape(-1, 3)
        assert np.array_equal(mapping.interleave(array, row, config), interchanged(array, heads))
        assert np.array_equal(mapping.deinterleave(interchanged(array, heads), row, config), array)


@pytest.mark.plain
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantised_matrices_are_those_of_the_reference(written, kind):
    number = reference_gguf.GGMLQuantizationType[kind]
    tensors = random_tensors()
    values = tensors["token_embd.weight"]
    raw = reference_gguf.quants.quantize(values, number)
    stored = {**tensors, "token_embd.weight": raw.tobytes()}
    checkpoint = open_checkpoint(written(pack(stored, kinds={"token_embd.weight": number.value})))
    found = checkpoint.tensors["embed_tokens.weight"].read().astype("float32")
    assert np.array_equal(found, reference_gguf.quants.dequantize(raw, number))
    assert 0 < np.abs(found - values).max() < {"Q4_0": 0.2, "Q4_1": 0.2, "Q5_0": 0.1, "Q5_1": 0.1}.get(kind, 0.01)


@pytest.mark.plain
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_those_of_the_reference(written, kind):
    number = reference_gguf.GGMLQuantizationType[kind]
    size = reference_gguf.GGML_QUANT_SIZES[number][1]
    blocks = np.random.default_rng(7).integers(0, 256, (6, size), "uint8")
    blocks[:, -4:] = blocks[:, :4] = np.frombuffer(np.array([0.25, 0.5], "<f2").tobytes(), "uint8")  # finite scales
    shapes = {**SHAPES, "token_embd": (6, 256)}
    stored = {f"{name}.weight": np.ones(shape, "float32") for name, shape in shapes.items()}
    path = written(pack(stored))
    info = gguf._Stored(kind, (6, 256), path.stat().st_size, blocks.size)
    path.write_bytes(path.read_bytes() + blocks.tobytes())
    assert np.array_equal(gguf._values(path, info), reference_gguf.quants.dequantize(blocks, number))


@pytest.mark.plain
@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_llama_3s_scaling_is_found_again_in_its_divisors(make_backbone, head_dim, factor):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = make_backbone(head_dim=head_dim, rope_max_wavelength=500_000.0, rope_scaling=scaling).config
    factors = gguf._factor_tensor(config)[0][2]().astype("float32")
    assert gguf.llama3_scaling(factors, config) == scaling


@pytest.mark.plain
def test_other_llama_3_settings_give_the_same_frequencies(make_backbone):
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0}
    scaling["original_max_position_embeddings"] = 4096
    config = make_backbone(head_dim=64, rope_max_wavelength=500_000.0, rope_scaling=scaling).config
    factors = gguf._factor_tensor(config)[0][2]().astype("float32")
    again = gguf.llama3_scaling(factors, config)
    wanted, found = (inverse_frequencies(64, 500_000.0, options)[0] for options in (scaling, again))
    assert np.allclose(found, wanted, rtol=1e-5)


@pytest.mark.plain
def test_divisors_of_another_kind_are_refused(make_backbone):
    with pytest.raises(ValueError, match=r"must be those of Llama 3.1"):
        gguf.llama3_scaling(np.linspace(1, 9, 16, dtype="float32"), make_backbone(head_dim=32).config)


# ---- Out and in again


@pytest.mark.parametrize(
    "name",
    [
        *("base", "llama3"),
        *(pytest.param(x, marks=pytest.mark.plain) for x in ("heads_one_kv", "head_dim", "theta", "linear", "yarn")),
        pytest.param("tied", marks=pytest.mark.plain),
    ],
)
def test_the_same_weights_through_safetensors_and_gguf_give_the_same_logits(tmp_path, name, tokenizer):
    changes = {**reference.CONFIGS[name], "vocab_size": tokenizer.vocabulary_size}
    if name == "llama3":  # the settings that a file of divisors can be read back to
        changes |= reference._rope("llama3", 500_000.0, **{**reference.LLAMA3, "original_max_position_embeddings": 32})
        changes["head_dim"] = 32
    model = reference.randomize(transformers.LlamaForCausalLM(reference.hf_config(**changes)))
    model.save_pretrained(tmp_path / "hf")
    lm = keras_llama.LlamaCausalLM.from_preset(tmp_path / "hf")
    lm.preprocessor = keras_llama.TextPreprocessor(tokenizer)
    save_checkpoint(lm, tmp_path / "model.gguf", format="gguf")
    back = keras_llama.LlamaCausalLM.from_preset(tmp_path / "model.gguf")
    if name == "llama3":
        assert np.abs(logits(back) - logits(lm)).max() < 1e-4  # the divisors are float32
    else:
        assert np.array_equal(logits(back), logits(lm))


@pytest.mark.plain
@pytest.mark.parametrize("biases", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_float32_out_and_in_is_bit_equal(tmp_path, small_lm, biases):
    lm = small_lm(**biases)
    save_checkpoint(lm, tmp_path / "model.gguf", format="gguf")
    back = keras_llama.LlamaCausalLM.from_preset(tmp_path / "model.gguf")
    for before, after in zip(lm.variables, back.variables, strict=True):
        assert before.path == after.path
        assert np.array_equal(ops.convert_to_numpy(before.value), ops.convert_to_numpy(after.value)), before.path
    assert back.backbone.config == lm.backbone.config
    assert back.stop_ids == lm.stop_ids
    texts = ["a good film", "  很好的电影", ""]
    assert back.preprocessor.tokenizer.encode(texts) == lm.preprocessor.tokenizer.encode(texts)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("quantization", "error"), [("f16", 1e-3), ("q8_0", 2e-2)])
def test_smaller_files_within_their_error(tmp_path, small_lm, quantization, error):
    lm = small_lm()
    sizes = {}
    for kind in ("f32", quantization):
        save_checkpoint(lm, tmp_path / f"{kind}.gguf", format="gguf", quantization=kind)
        sizes[kind] = (tmp_path / f"{kind}.gguf").stat().st_size
    assert sizes[quantization] < 0.8 * sizes["f32"]
    back = keras_llama.LlamaCausalLM.from_preset(tmp_path / f"{quantization}.gguf", dtype="float32")
    for before, after in zip(lm.variables, back.variables, strict=True):
        first, second = (ops.convert_to_numpy(variable.value) for variable in (before, after))
        assert np.abs(first - second).max() <= error * np.abs(first).max(), before.path
    kinds = {t.name: t.tensor_type.name for t in reference_gguf.GGUFReader(tmp_path / f"{quantization}.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == quantization.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 48 are no whole blocks of 32


@pytest.mark.plain
def test_large_tensors_are_read_in_parts(tmp_path, small_lm, monkeypatch):
    path = tmp_path / "model.gguf"
    save_checkpoint(small_lm(), path, format="gguf", quantization="q8_0")
    whole = keras_llama.LlamaCausalLM.from_preset(path, dtype="float32")
    monkeypatch.setattr(backend.arrays, "PART", 7)
    for one, other in zip(
        whole.weights, keras_llama.LlamaCausalLM.from_preset(path, dtype="float32").weights, strict=True
    ):
        np.testing.assert_array_equal(*(ops.convert_to_numpy(variable.value) for variable in (one, other)), one.path)


@pytest.mark.plain
def test_our_files_are_read_by_the_reference(tmp_path, small_lm):
    lm = small_lm()
    save_checkpoint(lm, tmp_path / "model.gguf", format="gguf")
    reader = reference_gguf.GGUFReader(tmp_path / "model.gguf")
    fields, _ = gguf.read_header(tmp_path / "model.gguf")
    theirs = {name: entry.contents() for name, entry in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields.keys() == theirs.keys()
    for name, value in fields.items():
        assert (np.float32(value) if isinstance(value, float) else value) == theirs[name], name
    for tensor in reader.tensors:
        row, name = mapping.gguf_to_hf(tensor.name)
        ours = open_checkpoint(tmp_path / "model.gguf").tensors[name].read()
        assert np.array_equal(mapping.interleave(ours, row, lm.backbone.config), tensor.data)


def test_the_dtype_is_that_of_the_file(tmp_path, small_lm):
    lm = small_lm()
    for quantization, dtype in {"f32": "float32", "f16": "float16", "q8_0": "bfloat16"}.items():
        path = tmp_path / f"{quantization}.gguf"
        save_checkpoint(lm, path, format="gguf", quantization=quantization)
        assert keras_llama.LlamaBackbone.from_preset(path).dtype_policy.name == dtype


@pytest.mark.plain
def test_what_gguf_cannot_hold(tmp_path, make_backbone, small_lm, tokenizer):
    path = tmp_path / "model.gguf"
    bare = keras_llama.LlamaCausalLM(make_backbone())
    with pytest.raises(ValueError, match="holds its tokenizer"):
        save_checkpoint(bare, path, format="gguf")
    classifier = keras_llama.LlamaTextClassifier(
        make_backbone(vocabulary_size=300), num_classes=2, preprocessor=keras_llama.TextPreprocessor(tokenizer)
    )
    with pytest.raises(ValueError, match="no place for this weight"):
        save_checkpoint(classifier, path, format="gguf")
    with pytest.raises(ValueError, match="`quantization` must be one of"):
        save_checkpoint(small_lm(), path, format="gguf", quantization="q2")
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(ValueError, match="overwrite=True"):
        save_checkpoint(small_lm(), path, format="gguf")
    assert path.read_text() == "mine"
    save_checkpoint(small_lm(), path, format="gguf", overwrite=True)
    assert path.read_bytes().startswith(b"GGUF")


# ---- llama.cpp as the judge


class LlamaCpp:
    """A file opened by llama.cpp: greedy ids."""

    def __init__(self, path, columns=64):
        xllamacpp = pytest.importorskip("xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = columns, 1, 1, False
        kinds = xllamacpp.ggml_type
        settings.cache_type_k = settings.cache_type_v = kinds.GGML_TYPE_F32
        # its fused attention rounds to half precision: log-probabilities are off by 4e-3 with it, by 6e-6 without
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(settings)

    def generate(self, prompt, count):
        options = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "top_k": 1, "return_tokens": True}
        options |= {"cache_prompt": False, "ignore_eos": True}
        address = self.server.listening_address + "/completion"
        with urllib.request.urlopen(urllib.request.Request(address, json.dumps(options).encode())) as answer:
            return json.load(answer)["tokens"]


def greedy(lm, prompt, count):
    found = lm.generate([prompt], count, stop=None, strip_prompt=True)
    return found["token_ids"][0].tolist()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1}, {"scaled": True}])
def test_llama_cpp_writes_the_same_text(tmp_path, small_lm, changes):
    if changes.pop("scaled", False):
        scaling = {**reference.LLAMA3, "rope_type": "llama3", "factor": 32.0}
        changes = {"head_dim": 32, "rope_max_wavelength": 500_000.0, "rope_scaling": scaling}
    lm = small_lm(**changes)
    save_checkpoint(lm, tmp_path / "model.gguf", format="gguf")
    prompt = [1, *lm.preprocessor.tokenizer.encode(["what a good film it is"])[0]]
    written = LlamaCpp(tmp_path / "model.gguf").generate(prompt, 24)
    token_ids = np.array([prompt + written])
    logits = ops.convert_to_numpy(lm({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}))[0]
    best = logits[len(prompt) - 1 : -1]
    # of two tokens closer than the rounding of float32 it may write either
    np.testing.assert_allclose(best[range(24), written], best.max(axis=-1), atol=1e-4)


@pytest.mark.plain
def test_a_model_tuned_here_writes_the_same_text_in_transformers_and_in_llama_cpp(tmp_path, chat_lm):
    chat_lm.compile(optimizer="adam")
    chat_lm.fit(["what is a good film", "很好的电影 is a film"] * 8, epochs=4, batch_size=8, verbose=0)
    prompt = chat_lm.preprocessor.tokenizer.encode(["what is"])[0]
    wanted = greedy(chat_lm, prompt, 12)
    save_checkpoint(chat_lm, tmp_path / "hf")
    save_checkpoint(chat_lm, tmp_path / "model.gguf", format="gguf")
    import torch

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.generation_config.eos_token_id = None
    ids = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert ids[0, len(prompt) :].tolist() == wanted
    assert LlamaCpp(tmp_path / "model.gguf").generate(prompt, 12) == wanted
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("what is", add_special_tokens=False)["input_ids"] == prompt


# ---- What is refused


def damaged():
    tensors = random_tensors()
    good = pack(tensors)
    name = "blk.0.attn_q.weight"
    nan = {**tensors, name: np.full((32, 32), np.nan, "float32")}
    huge = field("x", "y")[:-9] + struct.pack("<Q", 2**60) + b"y"  # a string that claims 2^60 bytes
    array = struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 8, 2**60)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    endless = struct.pack("<Q", 1) + b"x" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000
    return {
        "magic": (pack(tensors, magic=b"GGML"), "begins with GGUF"),
        "version": (pack(tensors, version=1), "version 2 or 3"),
        "big endian": (pack(tensors, version=3 << 24), "version 2 or 3"),
        "cut in the header": (good[:200], "expected a whole GGUF file"),
        "cut in the data": (good[:-500], "data of every tensor within the file"),
        "empty": (b"", "begins with GGUF"),
        "only the magic": (b"GGUF", "expected a whole GGUF file"),
        "too many tensors": (pack(tensors, count=2**60), "expected a whole GGUF file"),
        "a huge string": (head + huge + bytes(100), "expected a whole GGUF file"),
        "a huge array": (head + array + bytes(100), "expected a whole GGUF file"),
        "arrays without end": (head + endless, "type of GGUF"),
        "no such type": (head + struct.pack("<Q", 1) + b"x" + struct.pack("<I", 99) + bytes(20), "type of GGUF"),
        "a name that is no text": (head + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(30), "UTF-8"),
        "offset beyond the file": (pack(tensors, offsets={name: 2**40}), "data of every tensor within the file"),
        "negative offset": (pack(tensors, offsets={name: 2**64 - 32}), "data of every tensor within the file"),
        "NaN": (pack(nan), "finite numbers in every tensor.*q_proj"),
        "missing": (
            pack({k: v for k, v in tensors.items() if k != name}),
            r"layers.0.self_attn.q_proj.weight +expected \(32, 32\), missing",
        ),
        "misshapen": (pack({**tensors, name: np.ones((32, 31), "float32")}), r"found \(32, 31\)"),
        "not LLaMA's": (pack({**tensors, "blk.0.ssm_a.weight": np.ones(4, "float32")}), "tensors of LLaMA only"),
        "quantisation": (pack(tensors, kinds={name: 19}), "expected tensors of the types"),
        "type of the future": (pack(tensors, kinds={name: 250}), "expected tensors of the types"),
        "architecture": (
            pack(tensors, {**FIELDS, "general.architecture": "qwen2"}),
            "expected the architecture \"llama\".*architecture='qwen2'",
        ),
        "unknown field": (pack(tensors, {**FIELDS, "llama.logit_scale": 0.5}), "logit_scale"),
        "experts": (pack(tensors, {**FIELDS, "llama.expert_count": 8}), "expert_count"),
        "half rotated": (pack(tensors, {**FIELDS, "llama.rope.dimension_count": 4, "llama.attention.key_length": 8}),
                         "one head size"),
        "no sizes": (pack(tensors, {"general.architecture": "llama"}), "missing"),
        "zero layers": (pack(tensors, {**FIELDS, "llama.block_count": 0}), "num_layers"),
        "alignment": (pack(tensors, {**FIELDS, "general.alignment": 0}), "general.alignment"),
    }  # fmt: skip


@pytest.mark.plain
@pytest.mark.parametrize("case", damaged())
def test_a_damaged_file_is_refused_quickly_and_in_little_memory(written, case):
    data, message = damaged()[case]
    path = written(data)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"(?s)model.gguf.*{message}"):
        keras_llama.LlamaBackbone.from_preset(path)
    assert time.perf_counter() - start < 20
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


@pytest.mark.plain
def test_the_same_name_twice(written):
    data = pack(random_tensors())
    name = b"blk.0.attn_k.weight"
    with pytest.raises(ValueError, match="of their own names"):
        keras_llama.LlamaBackbone.from_preset(written(data.replace(b"blk.0.attn_q.weight", name)))


@pytest.mark.plain
def test_the_file_written_by_hand_is_what_the_reference_reads(written):
    tensors = random_tensors()
    found = {t.name: t.data for t in reference_gguf.GGUFReader(written(pack(tensors))).tensors}
    assert all(np.array_equal(found[name], values) for name, values in tensors.items())
    assert math.prod(SHAPES["token_embd"]) == found["token_embd.weight"].size
