"""Hugging Face directories: in, out and back bit-equal; and everything that can be wrong with one."""

import json
import shutil
import struct
import warnings

import keras
import numpy as np
import pytest
import reference
import torch
import transformers
from keras import ops
from safetensors.numpy import load_file, save_file

import keras_llama
from keras_llama.checkpoints import hf
from keras_llama.checkpoints.presets import open_checkpoint, save_checkpoint

IDS = np.random.default_rng(3).integers(1, 61, (2, 40)).astype("int32")


def logits(model):
    return ops.convert_to_numpy(model({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


def write(directory, dtype=torch.float32, shards="5GB", **changes):
    """A tiny random checkpoint, as Transformers writes it."""
    model = reference.randomize(transformers.LlamaForCausalLM(reference.hf_config(**changes))).to(dtype)
    model.save_pretrained(directory, max_shard_size=shards)
    return model


def edit(directory, **changes):
    """Changes fields of config.json; `...` removes one."""
    path = directory / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))


def older_spelling(directory):
    """The rotary settings as files before Transformers 5 have them."""
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    edit(directory, rope_parameters=..., rope_theta=theta, rope_scaling=scaling, dtype=..., torch_dtype="float32")


@pytest.mark.parametrize("spelling", ["newer", pytest.param("older", marks=pytest.mark.plain)])
@pytest.mark.parametrize("name", list(reference.CONFIGS))
def test_logits_are_those_of_transformers(tmp_path, name, spelling):
    model = write(tmp_path, **reference.CONFIGS[name])
    if spelling == "older":
        older_spelling(tmp_path)
    found = logits(keras_llama.LlamaCausalLM.from_preset(tmp_path))
    assert np.abs(found - model(torch.tensor(IDS.astype(int))).logits.detach().numpy()).max() <= 1e-4


@pytest.mark.parametrize("shards", [pytest.param("5GB", marks=pytest.mark.plain), "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["base", *(pytest.param(x, marks=pytest.mark.plain) for x in ("tied", "llama3", "attention_bias", "yarn_mscale"))],
)
def test_in_and_out_again_is_bit_equal(tmp_path, name, dtype, shards):
    model = write(tmp_path / "in", dtype, shards, **reference.CONFIGS[name])
    lm = keras_llama.LlamaCausalLM.from_preset(tmp_path / "in")
    assert f"torch.{lm.dtype_policy.name}" == str(dtype)
    save_checkpoint(lm, tmp_path / "out", max_shard_size=20_000 if shards == "20KB" else 10**9)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    before, after = model.state_dict(), back.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    theirs, changed = model.config.to_dict(), back.config.to_dict()
    assert theirs.pop("rope_parameters").items() <= changed["rope_parameters"].items()  # defaults may be spelled out
    written = {"transformers_version", "_name_or_path", "eos_token_id", "bos_token_id"}
    assert {key for key in theirs if theirs[key] != changed[key]} <= written
    assert ((tmp_path / "out" / "model.safetensors.index.json").exists()) == (shards == "20KB")


@pytest.mark.plain
def test_other_users_may_read_what_is_written(tmp_path):
    write(tmp_path / "in", torch.bfloat16)
    save_checkpoint(keras_llama.LlamaCausalLM.from_preset(tmp_path / "in"), tmp_path / "out", max_shard_size=20_000)
    (tmp_path / "any").touch()
    allowed = (tmp_path / "any").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {allowed}


@pytest.mark.plain
def test_a_dtype_may_be_asked_for(tmp_path):
    write(tmp_path, torch.bfloat16)
    lm = keras_llama.LlamaCausalLM.from_preset(tmp_path, dtype="mixed_bfloat16")
    assert lm.weights[0].dtype == "float32"
    keras.config.set_dtype_policy("float16")
    try:
        assert keras_llama.LlamaBackbone.from_preset(tmp_path).dtype_policy.name == "float16"
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.plain
def test_nothing_is_drawn_at_random_before_the_weights_come(tmp_path, monkeypatch):
    write(tmp_path)
    for initializer in (keras.initializers.RandomNormal, keras.initializers.VarianceScaling):
        monkeypatch.setattr(initializer, "__call__", lambda *_, **__: pytest.fail("drawn"))
    keras_llama.LlamaCausalLM.from_preset(tmp_path)


def test_the_backbone_alone(tmp_path):
    model = write(tmp_path)
    backbone = keras_llama.LlamaBackbone.from_preset(tmp_path)
    expected = model.model(torch.tensor(IDS.astype(int))).last_hidden_state.detach().numpy()
    assert np.abs(logits(backbone) - expected).max() <= 1e-4
    model.model.save_pretrained(tmp_path / "bare")  # LlamaModel: no prefix before the names, no head
    assert np.array_equal(logits(keras_llama.LlamaBackbone.from_preset(tmp_path / "bare")), logits(backbone))
    with pytest.raises(ValueError, match=r"lm_head.weight +expected \(61, 32\), missing"):
        keras_llama.LlamaCausalLM.from_preset(tmp_path / "bare")


@pytest.mark.plain
def test_a_classifier_in_and_out(tmp_path, capsys):
    config = reference.hf_config(num_labels=3, pad_token_id=0, id2label={0: "a", 1: "b", 2: "c"})
    model = reference.randomize(transformers.LlamaForSequenceClassification(config))
    model.save_pretrained(tmp_path / "in")
    ours = keras_llama.LlamaTextClassifier.from_preset(tmp_path / "in")
    assert ours.labels == ["a", "b", "c"]
    assert not capsys.readouterr().out
    expected = model(torch.tensor(IDS.astype(int))).logits.detach().numpy()
    assert np.abs(logits(ours) - expected).max() <= 1e-4
    save_checkpoint(ours, tmp_path / "out")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    assert back.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.plain
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 5}, r"`labels` must be .*num_classes=5"),
        ({"labels": ["a", "b", "c", "d"]}, r"score.weight +expected \(4, 32\), found \(3, 32\)"),
        ({"sequence_length": 3000}, "at most the model's context of 64 tokens.*Received: sequence_length=3000"),
    ],
)
def test_what_does_not_fit_a_classifiers_checkpoint_is_refused(tmp_path, options, message):
    config = reference.hf_config(num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        keras_llama.LlamaTextClassifier.from_preset(tmp_path, **options)


@pytest.mark.plain
def test_a_classifier_starts_on_a_language_model(tmp_path, capsys):
    write(tmp_path)
    ours = keras_llama.LlamaTextClassifier.from_preset(tmp_path, labels=["no", "yes"])
    assert f"{tmp_path} has no score.weight: drawn at random" in capsys.readouterr().out
    score = ops.convert_to_numpy(ours.get_layer("score").kernel)
    assert score.shape == (32, 2)
    assert 0.5 < score.std() * 32**0.5 < 2  # drawn for 32 features, not left at zero


@pytest.mark.plain
def test_the_first_blocks_alone(tmp_path):
    model = write(tmp_path / "in", num_hidden_layers=3)
    shallow = keras_llama.LlamaCausalLM.from_preset(tmp_path / "in", num_layers=2)
    assert len(shallow.backbone.blocks) == shallow.backbone.config.num_layers == 2
    model.model.layers = model.model.layers[:2]
    expected = model(torch.tensor(IDS.astype(int)), use_cache=False).logits.detach().numpy()
    assert np.abs(logits(shallow) - expected).max() <= 1e-4
    shallow.save_to_preset(tmp_path / "out")
    assert np.array_equal(logits(keras_llama.LlamaCausalLM.from_preset(tmp_path / "out")), logits(shallow))


@pytest.mark.plain
@pytest.mark.parametrize("count", [0, 4, True, 1.0])
def test_blocks_that_a_checkpoint_does_not_have_are_refused(tmp_path, count):
    write(tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match=f"`num_layers` must be an integer from 1 to 3.*num_layers={count}"):
        keras_llama.LlamaCausalLM.from_preset(tmp_path, num_layers=count)


@pytest.mark.plain
def test_a_reader_in_and_out(tmp_path, capsys):
    model = reference.randomize(transformers.LlamaForQuestionAnswering(reference.hf_config()))
    model.save_pretrained(tmp_path / "in")
    ours = keras_llama.LlamaQuestionAnswering.from_preset(tmp_path / "in")
    assert not capsys.readouterr().out
    answer = model(torch.tensor(IDS.astype(int)))
    expected = torch.stack([answer.start_logits, answer.end_logits], dim=-1).detach().numpy()
    assert np.abs(logits(ours) - expected).max() <= 1e-4
    save_checkpoint(ours, tmp_path / "out")
    back = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {"qa_outputs.weight", "qa_outputs.bias", "transformer.norm.weight"} <= names
    keras_llama.LlamaTextClassifier.from_preset(tmp_path / "in", num_classes=2)  # any head on any checkpoint
    assert "has no score.weight" in capsys.readouterr().out


@pytest.mark.plain
def test_a_reader_starts_on_a_language_model(tmp_path, capsys):
    write(tmp_path)
    ours = keras_llama.LlamaQuestionAnswering.from_preset(tmp_path, stride=8)
    assert "has no qa_outputs.bias, qa_outputs.weight: drawn at random" in capsys.readouterr().out
    kernel, bias = map(ops.convert_to_numpy, ours.get_layer("qa_outputs").weights)
    assert 0.5 < kernel.std() * 32**0.5 < 2
    assert not bias.any()


@pytest.mark.plain
@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"causal": False}])
def test_what_other_tools_would_compute_otherwise_stays_here(tmp_path, make_backbone, options):
    backbone = make_backbone(causal=options.get("causal", True))
    ours = keras_llama.LlamaTextClassifier(backbone, num_classes=3, pooling=options.get("pooling", "last"), r_drop=0.5)
    with pytest.raises(ValueError, match="save_to_preset"):
        save_checkpoint(ours, tmp_path / "out")
    ours.save_to_preset(tmp_path / "own")
    back = keras_llama.LlamaTextClassifier.from_preset(tmp_path / "own")
    inputs = {"token_ids": IDS % 60, "padding_mask": np.ones_like(IDS)}
    assert np.array_equal(ops.convert_to_numpy(back(inputs)), ops.convert_to_numpy(ours(inputs)))
    assert (back.pooling, back.r_drop) == (ours.pooling, 0.5)
    with pytest.raises(ValueError, match="keras_llama"):  # an unknown model type
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "own")


@pytest.mark.plain
def test_the_stop_set_is_every_end_the_checkpoint_names(tmp_path):
    write(tmp_path, eos_token_id=7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11], "temperature": 0.6}))
    lm = keras_llama.LlamaCausalLM.from_preset(tmp_path)
    assert lm.stop_ids == {7, 9, 11}
    lm.save_to_preset(tmp_path / "own")
    lm.save(tmp_path / "lm.keras")
    save_checkpoint(lm, tmp_path / "out")
    again = [keras_llama.LlamaCausalLM.from_preset(tmp_path / name) for name in ("own", "out")]
    for other in [*again, keras.saving.load_model(tmp_path / "lm.keras")]:
        assert other.stop_ids == {7, 9, 11}
        assert other.generation_config["temperature"] == 0.6


@pytest.mark.plain
def test_each_stop_id_stops(tmp_path):
    write(tmp_path)
    text = keras_llama.LlamaCausalLM.from_preset(tmp_path).generate([[5, 6]], 12, stop=None, strip_prompt=True)
    for token in set(text["token_ids"][0].tolist()):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [60, token]}))
        found = keras_llama.LlamaCausalLM.from_preset(tmp_path).generate([[5, 6]], 12, strip_prompt=True)
        assert found["token_ids"][0].tolist()[-1] == token


@pytest.mark.plain
def test_a_tied_checkpoint_may_carry_its_head(tmp_path):
    write(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    expected = logits(keras_llama.LlamaCausalLM.from_preset(tmp_path))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert np.array_equal(logits(keras_llama.LlamaCausalLM.from_preset(tmp_path)), expected)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert np.array_equal(logits(keras_llama.LlamaCausalLM.from_preset(tmp_path)), expected)
    assert any("lm_head.weight differs" in str(warning.message) for warning in told)


@pytest.mark.plain
def test_missing_extra_and_misshapen_tensors_stand_in_one_table(tmp_path):
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, "float32")
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((3, 4), "float32")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, "float32")  # derived: no matter
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="3 that differ") as error:
        keras_llama.LlamaCausalLM.from_preset(tmp_path)
    message = str(error.value)
    assert "norm.weight" in message
    assert "missing" in message
    assert "layers.0.self_attn.q_norm.weight" in message
    assert "found (3, 4)" in message
    assert "inv_freq" not in message


@pytest.mark.plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 4096}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral"}, "model_type"),
        ({"attention_sink": 3}, r"unknown=\['attention_sink'\]"),
        ({"num_hidden_layers": ...}, r"missing=\['num_hidden_layers'\]"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 3, "rope_theta": 1e4}}, "beta"),
        ({"rope_theta": 7.0}, "must agree"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"num_key_value_heads": 3}, "divisible"),
    ],
)
def test_a_field_that_changes_the_maths_is_never_dropped(tmp_path, changes, message):
    write(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert "config.json" in str(error.value)


@pytest.mark.plain
def test_tensors_with_nan_are_named(tmp_path):
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"finite numbers.*layers\.1\.mlp\.up_proj\.weight"):
        keras_llama.LlamaCausalLM.from_preset(tmp_path)


def broken(kind, data):
    """The bytes of a safetensors file, broken in one way."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if kind == "data cut":
        return data[:-100]
    if kind == "header cut":
        return data[: 8 + size // 2]
    if kind == "empty":
        return b""
    if kind == "2^60 bytes of header":
        return struct.pack("<Q", 2**60) + data[8:]
    if kind == "no safetensors":
        return b"GGML" * 100
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"] = [-8, 8] if kind == "negative offset" else [0, 2**60]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


KINDS = ["data cut", "header cut", "empty", "2^60 bytes of header", "no safetensors", "negative offset", "2^60 bytes"]


@pytest.mark.plain
@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_refused(tmp_path, kind):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(broken(kind, path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a whole safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.plain
def test_pickles_are_refused_with_the_command_that_converts(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle.*pytorch_model\.bin.*save_pretrained"):
        open_checkpoint(tmp_path)


@pytest.mark.plain
@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "link.safetensors"]
)
def test_shards_stay_in_their_directory(tmp_path, name):
    directory = tmp_path / "checkpoint"
    write(directory, shards="20KB")
    shutil.copy(directory / "model-00001-of-00005.safetensors", tmp_path / "outside.safetensors")
    (directory / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected shards that are files in"):
        open_checkpoint(directory)


@pytest.mark.plain
def test_an_index_that_names_what_is_not_there(tmp_path):
    write(tmp_path, shards="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00005.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"missing=\['model\.layers\.9"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match="weight_map"):
        open_checkpoint(tmp_path)


@pytest.mark.plain
@pytest.mark.parametrize("text", ["", "{", "[1]", "nonsense"])
def test_a_config_that_is_no_json_object(tmp_path, text):
    write(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: expected"):
        open_checkpoint(tmp_path)


@pytest.mark.plain
def test_nothing_of_the_users_is_lost(tmp_path, make_backbone):
    lm = keras_llama.LlamaCausalLM(make_backbone())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="overwrite"):
        save_checkpoint(lm, tmp_path)
    save_checkpoint(lm, tmp_path, overwrite=True, max_shard_size=10_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    save_checkpoint(lm, tmp_path, overwrite=True)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"notes.txt", "config.json", "generation_config.json", "model.safetensors"}
    with pytest.raises(ValueError, match="`format` must be one of"):
        save_checkpoint(lm, tmp_path / "x", format="onnx")


@pytest.mark.plain
def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, make_backbone, monkeypatch):
    lm = keras_llama.LlamaCausalLM(make_backbone())
    save_checkpoint(lm, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(hf, "_GENERATION", None)  # fails after the weights were written
    with pytest.raises(TypeError):
        save_checkpoint(lm, tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
