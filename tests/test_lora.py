"""LoRA: what is trained, what is saved, and PEFT's adapters in and out."""

import json

import keras
import numpy as np
import pytest
import reference
import safetensors.torch
import torch
import transformers
from keras import ops
from safetensors.numpy import load_file, save_file

import keras_llama
from keras_llama import backend
from keras_llama.lora import LoraAdapter
from keras_llama.projections import KernelCopies

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
IDS = np.random.default_rng(3).integers(1, 60, (16, 12)).astype("int32")


def predicted(task, ids=IDS[:2]):
    return task.predict(ids, verbose=0)


def arrays(weights):
    return [ops.convert_to_numpy(weight) for weight in weights]


@pytest.fixture
def lm(make_backbone):
    return keras_llama.LlamaCausalLM(make_backbone(), generation_config={"eos_token_id": []})


def adapted(task, **options):
    """The task with an adapter that changes its numbers."""
    task.enable_lora(rank=4, **options)
    for i, weight in enumerate(task.trainable_weights):
        weight.assign(np.random.default_rng(i).normal(size=weight.shape) * 0.3)
    return task


def trained(task, *targets, **options):
    """The task after some steps of its adapter."""
    task.enable_lora(rank=4, **options)
    task.compile(keras.optimizers.Adam(3e-2))
    task.fit(IDS, *targets, epochs=2, batch_size=8, verbose=0)
    return task


def test_it_starts_as_the_base_and_trains_nothing_of_it(lm, capsys):
    before = predicted(lm)
    frozen = arrays(lm.weights)
    total = sum(array.size for array in frozen)
    lm.enable_lora(rank=4, targets="query|value")
    np.testing.assert_array_equal(predicted(lm), before)
    added = 2 * 2 * 4 * 32 + 2 * 4 * (32 + 16)  # two blocks: A of query and value, B of each
    assert f"trainable parameters: {added:,} of {total + added:,}" in capsys.readouterr().out
    lm.compile(keras.optimizers.Adam(3e-2))
    losses = lm.fit(IDS, epochs=4, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.1
    kept = [weight for weight in lm.weights if not weight.trainable]
    assert [weight.shape for weight in lm.trainable_weights] == [(32, 4), (4, 32), (32, 4), (4, 16)] * 2
    for old, new in zip(frozen, arrays(kept), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.plain
@pytest.mark.parametrize(("targets", "count"), [("attention", 8), ("all-linear", 14), (r"block_1/mlp/(gate|up)$", 2)])
def test_targets(lm, targets, count):
    lm.enable_lora(rank=2, targets=targets)
    assert len(lm.trainable_weights) == 2 * count


def test_outputs_and_gradients_are_those_of_the_formula(rng):
    """(alpha / r) dropout(x) A B, without and with dropout; dA = (alpha / r) x^T g B^T, dB = (alpha / r) (x A)^T g."""
    adapter = LoraAdapter(6, rank=2, alpha=3.0, rate=0.5)
    x, g = (rng.normal(size=(4, 500, size)).astype("float32") for size in (8, 6))
    adapter(x)
    adapter.b.assign(rng.normal(size=(2, 6)))
    a, b = arrays((adapter.a, adapter.b))
    np.testing.assert_allclose(ops.convert_to_numpy(adapter(x)), 1.5 * x @ a @ b, atol=1e-5)
    _, found = reference.gradients(adapter, x, lambda outputs: ops.sum(ops.multiply(outputs, g)))
    rows, upstream = x.reshape(-1, 8), g.reshape(-1, 6)
    expected = (1.5 * rows.T @ upstream @ b.T, 1.5 * (rows @ a).T @ upstream)
    for gradient, wanted in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max())
    dropped = ops.convert_to_numpy(adapter(x, training=True))
    assert np.abs(dropped - 1.5 * x @ a @ b).max() > 0.1
    np.testing.assert_allclose(dropped.mean((0, 1)), (1.5 * x @ a @ b).mean((0, 1)), atol=0.2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_step_moves_adapters_by_their_gradient(make_backbone, monkeypatch, dropout):
    """TensorFlow's graph computes a part of the MLP twice, where dropout must not differ: see `backend.remat_cheap`."""

    def moved():
        keras.utils.set_random_seed(0)
        lm = adapted(keras_llama.LlamaCausalLM(make_backbone(num_layers=1)), targets="down", dropout=dropout)
        before = arrays(lm.trainable_weights)
        lm.compile(keras.optimizers.SGD(0.1))
        lm.fit(IDS, batch_size=16, verbose=0)
        return [new - old for new, old in zip(arrays(lm.trainable_weights), before, strict=True)]

    found = moved()
    monkeypatch.setattr(backend, "remat_cheap", lambda function, variables: function)
    for one, other in zip(found, moved(), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_merged_and_saved_it_is_the_same(lm, tmp_path):
    base = predicted(lm)
    trained(lm, targets="all-linear")
    after = predicted(lm)
    assert np.abs(after - base).max() > 0.1
    texts = lm.generate(IDS[:2, :5], max_new_tokens=40)["token_ids"]  # enough for copies of kernels
    lm.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predicted(loaded), after)
    assert [w.path for w in loaded.trainable_weights] == [w.path for w in lm.trainable_weights]
    resumed = [task.fit(IDS, batch_size=8, shuffle=False, verbose=0).history["loss"] for task in (lm, loaded)]
    np.testing.assert_allclose(*resumed, rtol=1e-5)
    for task in (lm, loaded):
        after = predicted(task)
        task.merge_lora()
        np.testing.assert_allclose(predicted(task), after, atol=1e-5)
    assert len(lm.weights) == len(lm.trainable_weights) == 1 + 9 * 2 + 2
    assert texts.shape == (2, 45)
    keras_llama.save_checkpoint(lm, tmp_path / "hf")
    again = keras_llama.LlamaCausalLM.from_preset(tmp_path / "hf")
    np.testing.assert_allclose(predicted(again), predicted(lm), atol=1e-5)


def test_decoding_is_that_of_the_merged_model(lm):
    adapted(lm, targets="all-linear")
    prompts = IDS[:2, :5]
    found = [lm.generate(prompts, max_new_tokens=n)["token_ids"] for n in (3, 40)]
    lm.merge_lora()
    for tokens, n in zip(found, (3, 40), strict=True):
        np.testing.assert_array_equal(tokens, lm.generate(prompts, max_new_tokens=n)["token_ids"])


@pytest.mark.plain
def test_a_list_of_ngrams_is_not_trained_after_merging(make_backbone):
    task = adapted(keras_llama.LlamaTextClassifier(make_backbone(num_ngrams=4), num_classes=2))
    task.merge_lora()
    assert {weight.dtype for weight in task.trainable_weights} == {"float32"}
    assert {weight.dtype for weight in task.non_trainable_weights} == {"int32"}


def test_adapters_are_switched_by_name(lm):
    base = predicted(lm)
    adapted(lm, name="one")
    one = predicted(lm)
    adapted(lm, name="two", targets="mlp")
    two = predicted(lm)
    assert np.abs(one - two).max() > 0.1
    for name, expected in (("one", one), (None, base), ("two", two)):
        lm.set_adapter(name)
        np.testing.assert_array_equal(predicted(lm), expected)
        assert len(lm.trainable_weights) == (0 if name is None else 16 if name == "one" else 12)
    lm.set_adapter("one")
    lm.compile()
    lm.fit(IDS, batch_size=8, verbose=0)
    lm.set_adapter("two")
    np.testing.assert_array_equal(predicted(lm), two)


@pytest.mark.plain
def test_tasks_that_share_a_backbone_share_its_adapters(lm, tmp_path):
    adapted(lm)
    classifier = keras_llama.LlamaTextClassifier(lm.backbone, num_classes=2)
    with pytest.raises(ValueError, match="that no adapter has yet"):
        classifier.enable_lora(rank=2)
    before = predicted(classifier)
    classifier.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(predicted(keras.saving.load_model(tmp_path / "model.keras")), before)


def test_a_task_compiled_anew_reads_what_another_has_trained(lm):
    classifier, other = (keras_llama.LlamaTextClassifier(lm.backbone, num_classes=2) for _ in range(2))
    likely = lm.score(IDS[:1])[0]["log_probs"]
    vectors, tokens = other.features(IDS[:1]), lm.generate(IDS[:8], max_new_tokens=1)["token_ids"]
    adapted(classifier)
    for task in (lm, other):
        task.compile()
    logits = predicted(lm, IDS[:8])
    shares = ops.convert_to_numpy(ops.log_softmax(logits[0]))[np.arange(11), IDS[0, 1:]]
    found = lm.score(IDS[:1])[0]["log_probs"]
    assert np.abs(np.subtract(found, likely)).max() > 0.1
    np.testing.assert_allclose(found, shares, atol=1e-4)
    found = lm.generate(IDS[:8], max_new_tokens=1)["token_ids"]
    assert not np.array_equal(found, tokens)
    np.testing.assert_array_equal(found[:, -1], logits[:, -1].argmax(-1))
    assert np.abs(other.features(IDS[:1]) - vectors).max() > 0.1
    np.testing.assert_array_equal(other.features(IDS[:1]), classifier.features(IDS[:1]))


def test_a_half_precision_kernel_takes_an_adapter_in_by_one_rounding(make_backbone):
    lm = adapted(keras_llama.LlamaCausalLM(make_backbone(num_layers=1, dtype="bfloat16")))
    block = lm.backbone.blocks[0]
    exact = [ops.cast(layer.kernel, "float32") + layer.adapter.delta() for layer in block.projections[0]]
    copies = KernelCopies(block.projections, lm.weights).make(rows=1, steps=48)
    if keras.config.backend() != "torch":  # XLA widens a kernel before it multiplies
        np.testing.assert_array_equal(*arrays((copies[0][0], ops.concatenate(exact, axis=-1))))
    lm.merge_lora()
    for layer, kernel in zip(block.projections[0], exact, strict=True):
        expected = ops.cast(ops.cast(kernel, "bfloat16"), "float32")
        np.testing.assert_array_equal(*arrays((ops.cast(layer.kernel, "float32"), expected)))


def test_a_half_precision_base_has_full_precision_adapters(make_backbone):
    backbone = keras_llama.LlamaBackbone.from_config({**make_backbone().get_config(), "dtype": "bfloat16"})
    lm = adapted(keras_llama.LlamaCausalLM(backbone))
    lm.compile()
    lm.optimizer.build(lm.trainable_variables)
    assert {weight.dtype for weight in lm.trainable_weights} == {"float32"}
    assert {weight.dtype for weight in lm.non_trainable_weights} >= {"bfloat16"}
    state = [variable for variable in lm.optimizer.variables if variable.ndim == 2]
    assert {variable.dtype for variable in state} == {"float32"}


def peft_model(kind=transformers.LlamaForCausalLM, changes=(), **options):
    """A random Transformers model with a random adapter, and ours with the same base."""
    base = reference.randomize(kind(reference.hf_config(**dict(changes))))
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return theirs.eval()


def logits_of(theirs, ids=IDS):
    return theirs(torch.tensor(ids.astype(int))).logits.detach().numpy()


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", ["layers.1.self_attn.v_proj"]])
def test_an_adapter_of_peft(tmp_path, targets):
    theirs = peft_model(target_modules=targets)
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        theirs.unload().save_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    ours = keras_llama.LlamaCausalLM.from_preset(tmp_path / "base")
    ours.load_adapter(tmp_path / "adapter")
    assert ours.active_adapter == "adapter"
    np.testing.assert_allclose(predicted(ours, IDS), logits_of(theirs), atol=1e-4)


@pytest.mark.plain
def test_an_adapter_of_half_precision(lm, tmp_path):
    adapted(lm)
    expected = predicted(lm)
    keras_llama.save_checkpoint(lm, tmp_path / "a", format="peft")
    path = tmp_path / "a" / "adapter_model.safetensors"
    halves = {name: torch.from_numpy(array).bfloat16() for name, array in load_file(path).items()}
    safetensors.torch.save_file(halves, path)
    lm.load_adapter(tmp_path / "a", "halves")
    np.testing.assert_allclose(predicted(lm), expected, atol=0.3)
    assert np.abs(predicted(lm) - expected).max() > 1e-4


@pytest.mark.parametrize("targets", ["attention", "all-linear", "block_1/attention/value"])
def test_an_adapter_for_peft(tmp_path, targets):
    base = reference.randomize(transformers.LlamaForCausalLM(reference.hf_config()))
    base.save_pretrained(tmp_path / "base")
    ours = adapted(keras_llama.LlamaCausalLM.from_preset(tmp_path / "base"), targets=targets)
    keras_llama.save_checkpoint(ours, tmp_path / "adapter", format="peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(predicted(ours, IDS), logits_of(theirs), atol=1e-4)
    size, path = sum(array.nbytes for array in arrays(ours.trainable_weights)), tmp_path / "adapter"
    assert (path / "adapter_model.safetensors").stat().st_size < size + 2**16
    stored = load_file(path / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stored)
    assert sum(array.nbytes for array in stored.values()) == size


HEADS = {
    "SEQ_CLS": (
        transformers.LlamaForSequenceClassification,
        keras_llama.LlamaTextClassifier,
        {"num_labels": 3, "pad_token_id": 0},
    ),
    "QUESTION_ANS": (transformers.LlamaForQuestionAnswering, keras_llama.LlamaQuestionAnswering, {}),
}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HEADS)
def test_an_adapter_of_peft_with_its_head(tmp_path, kind, half):
    theirs, ours, changes = HEADS[kind]
    reference.randomize(theirs(reference.hf_config(**changes))).save_pretrained(tmp_path / "base")
    model = peft_model(theirs, changes, task_type=kind)
    if half:
        for name, weight in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.data = weight.data.bfloat16().float()
    model.save_pretrained(tmp_path / "adapter")
    if half:
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        safetensors.torch.save_file({k: torch.from_numpy(v).bfloat16() for k, v in load_file(path).items()}, path)
    task = ours.from_preset(tmp_path / "base")
    task.load_adapter(tmp_path / "adapter")
    answer = model(torch.tensor(IDS.astype(int)))
    expected = answer.logits if kind == "SEQ_CLS" else torch.stack([answer.start_logits, answer.end_logits], dim=-1)
    np.testing.assert_allclose(predicted(task, IDS), expected.detach().numpy(), atol=1e-4)


@pytest.mark.plain
def test_a_classifier_takes_its_head_along(tmp_path):
    base = reference.randomize(
        transformers.LlamaForSequenceClassification(reference.hf_config(num_labels=3, pad_token_id=0))
    )
    base.save_pretrained(tmp_path / "base")
    ours = keras_llama.LlamaTextClassifier.from_preset(tmp_path / "base")
    score = arrays([ours.get_layer("score").kernel])[0]
    trained(ours, np.arange(16) % 3)
    assert len(ours.trainable_weights) == 1 + 16
    assert np.abs(arrays([ours.get_layer("score").kernel])[0] - score).max() > 1e-3
    keras_llama.save_checkpoint(ours, tmp_path / "adapter", format="peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(predicted(ours, IDS), logits_of(theirs), atol=1e-4)
    again = keras_llama.LlamaTextClassifier.from_preset(tmp_path / "base")
    again.load_adapter(tmp_path / "adapter", "news")
    np.testing.assert_allclose(predicted(again), predicted(ours), atol=1e-5)


@pytest.mark.plain
def test_a_reader_takes_its_head_along(tmp_path):
    base = reference.randomize(transformers.LlamaForQuestionAnswering(reference.hf_config()))
    base.save_pretrained(tmp_path / "base")
    ours = keras_llama.LlamaQuestionAnswering.from_preset(tmp_path / "base")
    kernel = arrays([ours.get_layer("qa_outputs").kernel])[0]
    trained(ours, np.stack([np.arange(16) % 3, np.arange(16) % 3 + 1], axis=1))
    assert len(ours.trainable_weights) == 2 + 16
    assert np.abs(arrays([ours.get_layer("qa_outputs").kernel])[0] - kernel).max() > 1e-3
    keras_llama.save_checkpoint(ours, tmp_path / "adapter", format="peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    answer = theirs(torch.tensor(IDS.astype(int)))
    expected = torch.stack([answer.start_logits, answer.end_logits], dim=-1).detach().numpy()
    np.testing.assert_allclose(predicted(ours, IDS), expected, atol=1e-4)
    again = keras_llama.LlamaQuestionAnswering.from_preset(tmp_path / "base")
    again.load_adapter(tmp_path / "adapter", "squad")
    np.testing.assert_allclose(predicted(again), predicted(ours), atol=1e-5)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be an integer from 1 to 16"),
        ({"rank": 17}, "least side of a kernel"),
        ({"rank": 2.0}, "`rank` must be an integer"),
        ({"targets": "qury"}, "must match some of .*block_0/attention/query"),
        ({"dropout": 1.0}, r"must lie in \[0, 1\)"),
        ({"alpha": 0}, "`alpha` be above 0"),
        ({"alpha": "16"}, "`alpha` be above 0.*Received: .*alpha='16'"),
        ({"rank": True}, "`rank` must be an integer"),
        ({"targets": "(query"}, "or a regular expression"),
        ({"name": ""}, "`name` must be a string"),
        ({"name": "v1.0"}, "`name` must be a string.*part the paths"),
    ],
)
def test_settings_that_are_refused(lm, options, message):
    before = [weight.path for weight in lm.trainable_weights]
    with pytest.raises(ValueError, match=message):
        lm.enable_lora(**options)
    assert [weight.path for weight in lm.trainable_weights] == before


@pytest.mark.plain
def test_orders_that_are_refused(lm, make_backbone, tmp_path):
    before = predicted(lm)
    with pytest.raises(ValueError, match="in use to be merged"):
        lm.merge_lora()
    np.testing.assert_array_equal(predicted(lm), before)
    with pytest.raises(ValueError, match="in use to be written"):
        keras_llama.save_checkpoint(lm, tmp_path / "a", format="peft")
    with pytest.raises(ValueError, match="`name` must be of an adapter"):
        lm.set_adapter("other")
    lm.enable_lora(rank=2)
    with pytest.raises(ValueError, match="that no adapter has yet"):
        lm.enable_lora(rank=2)
    with pytest.raises(ValueError, match=r"has adapters beside them.*merge_lora"):
        lm.save_to_preset(tmp_path / "b")
    again = keras_llama.LlamaCausalLM(make_backbone(remat="block"))
    with pytest.raises(ValueError, match="`dropout` must be 0"):
        again.enable_lora(rank=2, dropout=0.1)
    keras_llama.save_checkpoint(lm, tmp_path / "c", format="peft")
    edited(tmp_path / "c", lora_dropout=0.1)
    with pytest.raises(ValueError, match="`dropout` must be 0"):
        again.load_adapter(tmp_path / "c")
    assert not again.adapters


def edited(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "plain LoRA.*use_dora=True"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"r": "many"}, "JSON with `r`"),
        ({"r": 3}, r"layers\.0\.self_attn.*must fit a kernel .*rank=3"),
    ],
)
def test_adapters_that_are_refused(lm, tmp_path, changes, message):
    adapted(lm, name="mine")
    keras_llama.save_checkpoint(lm, tmp_path / "adapter", format="peft")
    before = predicted(lm)
    edited(tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=message):
        lm.load_adapter(tmp_path / "adapter")
    assert lm.active_adapter == "mine"
    np.testing.assert_array_equal(predicted(lm), before)


@pytest.mark.plain
def test_an_adapter_of_another_base_is_named_by_its_first_mismatch(lm, make_backbone, tmp_path):
    other = keras_llama.LlamaCausalLM(make_backbone(num_layers=3))
    other.enable_lora(rank=2)
    keras_llama.save_checkpoint(other, tmp_path / "deep", format="peft")
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn.*no such module"):
        lm.load_adapter(tmp_path / "deep")
    wide = keras_llama.LlamaCausalLM(make_backbone(hidden_dim=64))
    wide.enable_lora(rank=2)
    keras_llama.save_checkpoint(wide, tmp_path / "wide", format="peft")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn.*must fit a kernel"):
        lm.load_adapter(tmp_path / "wide")
    assert not lm.adapters
    assert len(lm.trainable_weights) == len(lm.weights)


@pytest.mark.plain
def test_broken_files_are_refused_and_nothing_is_overwritten(lm, tmp_path):
    lm.enable_lora(rank=2)
    keras_llama.save_checkpoint(lm, tmp_path / "a", format="peft")
    with pytest.raises(ValueError, match="directory without an adapter"):
        keras_llama.save_checkpoint(lm, tmp_path / "a", format="peft")
    with pytest.raises(ValueError, match="directory with adapter_config"):
        lm.load_adapter(tmp_path, "b")
    path = tmp_path / "a" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="whole safetensors file"):
        lm.load_adapter(tmp_path / "a", "b")
    path.write_bytes(whole)
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, path)
    with pytest.raises(ValueError, match="lora_A and lora_B of each"):
        lm.load_adapter(tmp_path / "a", "b")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ValueError, match="pickle"):
        lm.load_adapter(tmp_path / "a", "b")
