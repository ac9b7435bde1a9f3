"""Bases in float32, bfloat16, int8 and int4, alone and under LoRA: trained, saved, loaded, generated, exported."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama import quantized

IDS = np.random.default_rng(3).integers(1, 60, (16, 12)).astype("int32")


@pytest.fixture
def make(make_backbone):
    """A language model of one block in a dtype or quantised, with an adapter or without."""

    def make(dtype, lora, tied=True):
        dtype, _, base = dtype.partition(" on ")
        computed = "bfloat16" if "bfloat16" in (dtype, base) else "float32"
        backbone = make_backbone(num_layers=1, tie_word_embeddings=tied, dtype=computed)
        lm = keras_llama.LlamaCausalLM(backbone, generation_config={"eos_token_id": []})
        if dtype.startswith("int"):
            lm.quantize(dtype)
        if lora:
            lm.enable_lora(rank=2, targets="all-linear")
        lm.compile(keras.optimizers.SGD(0.1))
        return lm

    return make


EVERYWHERE = [("int8", False), ("int4", True)]  # what is rounded to eight bits and to four, each once on each backend
DTYPES = ["float32", "bfloat16", "int8", "int4", "int8 on bfloat16", "int4 on bfloat16"]
MATRIX = [(dtype, lora) for lora in (False, True) for dtype in DTYPES if lora or "on" not in dtype]


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [pytest.param(*case, marks=() if case in EVERYWHERE else pytest.mark.plain) for case in MATRIX],
)
@pytest.mark.filterwarnings("ignore:The weights that are trained are bfloat16")
def test_trained_saved_and_loaded_it_is_the_same(make, dtype, lora, tmp_path):
    lm = make(dtype, lora)
    frozen = [(weight, ops.convert_to_numpy(ops.cast(weight, "float32"))) for weight in lm.non_trainable_weights]
    losses = lm.fit(IDS, epochs=3, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for weight, before in frozen:
        np.testing.assert_array_equal(before, ops.convert_to_numpy(ops.cast(weight, "float32")))
    lm.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.quantized == (dtype.split()[0] if dtype.startswith("int") else None)
    np.testing.assert_array_equal(*(task.predict(IDS, verbose=0) for task in (lm, loaded)))
    tokens = [task.generate(IDS[:2, :5], max_new_tokens=4)["token_ids"] for task in (lm, loaded)]
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize(("dtype", "lora"), [(dtype, lora) for dtype, lora in MATRIX if "on" not in dtype])
@pytest.mark.slow
@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="another backend rounds otherwise")
@pytest.mark.filterwarnings("ignore:The SavedModel takes token ids")
def test_exported_it_is_the_same(make, dtype, lora, tmp_path):
    import tensorflow as tf

    lm = make(dtype, lora)
    for i, weight in enumerate(lm.trainable_weights if lora else []):
        weight.assign(np.random.default_rng(i).normal(size=weight.shape) * 0.3)
    lm.export(tmp_path / "served")
    served = tf.saved_model.load(tmp_path / "served").signatures["logits"]
    found = served(token_ids=tf.constant(IDS), padding_mask=tf.ones_like(IDS))["logits"].numpy()
    expected = lm.predict(IDS, verbose=0)
    tolerance = 2**-7 if dtype == "bfloat16" else 1e-5  # one step of its 8 bits, relative to the largest
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("mode", "alike"), [("int8", 0.95), pytest.param("int4", 0.6, marks=pytest.mark.plain)])
def test_adapters_below_a_quantised_tied_head_learn_what_they_would_below_the_head(make, mode, alike):
    """The cosine between the first steps of two trainings, which was 0 while the head in int8 had no gradient."""
    steps = []
    for dtype in ("float32", mode):
        lm = make(dtype, lora=True, tied=True)
        before = [np.random.default_rng(i).normal(0, 0.1, w.shape) for i, w in enumerate(lm.trainable_weights)]
        for weight, value in zip(lm.trainable_weights, before, strict=True):
            weight.assign(value)
        lm.compile(keras.optimizers.SGD(1.0))
        lm.fit(IDS, batch_size=len(IDS), verbose=0)
        after = [ops.convert_to_numpy(weight) for weight in lm.trainable_weights]
        steps.append(np.concatenate([(a - b).ravel() for a, b in zip(after, before, strict=True)]))
    first, second = steps
    assert first @ second / (np.linalg.norm(first) * np.linalg.norm(second)) > alike


@pytest.mark.parametrize(("mode", "near", "tied"), [("int8", 0.02, True), ("int4", 0.3, False)])
def test_the_loss_of_a_quantised_model_is_near_that_of_the_model(make, mode, near, tied):
    before = make("float32", lora=False, tied=tied).evaluate(IDS, verbose=0)[0]
    found = make(mode, lora=False, tied=tied).evaluate(IDS, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(before, rel=near)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]), rel=1e-4)


@pytest.mark.plain
def test_a_classifier_keeps_its_head_to_be_trained(make_backbone, tmp_path):
    classifier = keras_llama.LlamaTextClassifier(make_backbone(num_layers=1), num_classes=3)
    classifier.quantize("int8")
    classifier.compile(keras.optimizers.Adam(1e-2))
    losses = classifier.fit_head(IDS, IDS[:, 0] % 3, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    classifier.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(*(task.predict(IDS, verbose=0) for task in (classifier, loaded)))
    with pytest.raises(ValueError, match="frozen for good"):
        loaded.unfreeze_base()


@pytest.mark.parametrize(
    ("block_size", "name"),
    [(16, "int4/16"), *(pytest.param(*case, marks=pytest.mark.plain) for case in [(None, "int4/-1"), (128, "int4")])],
)
def test_blocks_of_another_size_are_kept(make_backbone, tmp_path, block_size, name):
    lm = keras_llama.LlamaCausalLM(make_backbone(num_layers=1))
    lm.quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=block_size))
    assert lm.quantized == name
    lm.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.quantized == name
    np.testing.assert_array_equal(loaded.predict(IDS, verbose=0), lm.predict(IDS, verbose=0))


@pytest.mark.plain
def test_orders_that_are_refused(make_backbone, tmp_path):
    lm = keras_llama.LlamaCausalLM(make_backbone())
    with pytest.raises(ValueError, match=r"`mode` must be one of \['int8', 'int4'\]"):
        lm.quantize("float8")
    own = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    with pytest.raises(ValueError, match=r"Keras' own quantizers.*Received: config="):
        lm.quantize(config=own)
    lm.enable_lora(rank=2)
    with pytest.raises(ValueError, match="before it has adapters"):
        lm.quantize("int8")
    lm.merge_lora()
    lm.quantize("int8")
    before = lm.predict(IDS, verbose=0)
    with pytest.raises(ValueError, match="quantised once"):
        lm.quantize("int8")
    np.testing.assert_array_equal(lm.predict(IDS, verbose=0), before)
    with pytest.raises(ValueError, match="holds the weights before `quantize`"):
        lm.save_to_preset(tmp_path / "preset")
    lm.enable_lora(rank=2)
    with pytest.raises(ValueError, match="takes no adapter in"):
        lm.merge_lora()


CALIBRATED = {
    "gptq": lambda texts: keras.quantizers.GPTQConfig(texts, None, num_samples=16, sequence_length=12, group_size=16),
    "awq": lambda texts: keras.quantizers.AWQConfig(texts, None, num_samples=16, sequence_length=12, group_size=16),
}


def logits(lm):
    return ops.convert_to_numpy(lm({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


@pytest.mark.long
@pytest.mark.plain  # Keras' calibration compiles hundreds of small operations on JAX
@pytest.mark.parametrize("mode", CALIBRATED)
def test_calibrated_it_is_saved_and_loaded_and_takes_an_adapter(mode, make, tmp_path):
    lm, rounded = make("float32", lora=False), make("int4", lora=False)
    expected = logits(lm)
    lm.quantize(config=CALIBRATED[mode](list(IDS)))
    found = logits(lm)
    assert np.abs(found - expected).mean() < np.abs(logits(rounded) - expected).mean()
    assert lm.quantized == f"{mode}/4/16"
    lm.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(logits(loaded), found)
    tokens = [task.generate(IDS[:2, :5], max_new_tokens=4)["token_ids"] for task in (lm, loaded)]
    np.testing.assert_array_equal(*tokens)
    loaded.enable_lora(rank=2, targets="all-linear")
    loaded.compile(keras.optimizers.SGD(0.1))
    losses = loaded.fit(IDS, epochs=3, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    loaded.save(tmp_path / "adapted.keras")
    again = keras.saving.load_model(tmp_path / "adapted.keras")
    np.testing.assert_array_equal(logits(again), logits(loaded))


@pytest.mark.plain
def test_calibration_reads_texts_by_the_tokenizer_of_the_task(chat_lm, monkeypatch):
    seen = []
    monkeypatch.setattr(keras.Model, "quantize", lambda self, mode, config, filters: seen.append(config.dataset))
    chat_lm.quantize(config=CALIBRATED["gptq"](["a good film", "what is"]))
    (rows,) = seen
    wanted = chat_lm.preprocessor.tokenizer.encode(["a good film", "what is"])
    assert [row.tolist() for row in rows] == [list(row) for row in wanted]


def test_a_calibration_that_is_interrupted_leaves_the_model_as_it_was(make_backbone, monkeypatch, tmp_path):
    lm = keras_llama.LlamaCausalLM(make_backbone(num_layers=1))
    lm.compile(keras.optimizers.SGD(0.1))
    paths, expected = {weight.path for weight in lm.weights}, logits(lm)

    def interrupted(self, x):
        del self.block.mlp.up._kernel  # as Keras does with one that it has rounded
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized._Alone, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.quantize(config=CALIBRATED["gptq"](list(IDS)))
    assert lm.quantized is None
    assert {weight.path for weight in lm.weights} == {weight.path for weight in lm.trainable_weights} == paths
    np.testing.assert_array_equal(logits(lm), expected)
    lm.fit(IDS, verbose=0)
    assert np.abs(logits(lm) - expected).max() > 1e-3
    lm.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(logits(keras.saving.load_model(tmp_path / "model.keras")), logits(lm))
    lm.quantize("int8")


@pytest.mark.plain
@pytest.mark.parametrize("texts", [None, [], ["a text"], [[5, 60]]])
def test_calibration_without_a_dataset_is_refused(make, texts):
    lm = make("float32", lora=False)
    with pytest.raises(ValueError, match=r"`dataset` must hold.*Received"):
        lm.quantize(config=CALIBRATED["gptq"](texts))
    assert lm.quantized is None
    assert {layer.quantization_mode for _, layer in lm._projections()} == {None}
    with pytest.raises(ValueError, match="GPTQConfig"):
        lm.quantize("gptq")


@pytest.mark.plain
@pytest.mark.skipif(keras.config.backend() != "torch", reason="only torch remembers what no tape is told of")
@pytest.mark.parametrize("mode", CALIBRATED)
def test_a_calibration_remembers_nothing_for_a_gradient(mode, make, monkeypatch):
    lm, call, seen = make("float32", lora=False), quantized._Alone.call, []

    def watched(self, x):
        seen.append(call(self, x))
        return seen[-1]

    monkeypatch.setattr(quantized._Alone, "call", watched)
    lm.quantize(config=CALIBRATED[mode](list(IDS)))
    assert seen
    assert not any(hidden.requires_grad for hidden in seen)


@pytest.mark.plain
def test_a_calibration_goes_by_what_the_texts_put_in(make_backbone):
    models = {}
    for kind in CALIBRATED:
        models[kind] = keras_llama.LlamaCausalLM(make_backbone())
        models[kind].quantize(config=CALIBRATED[kind](list(IDS)))
    queries = {kind: model.backbone.blocks[0].attention.query for kind, model in models.items()}
    scales = keras.ops.convert_to_numpy(queries["awq"].awq_scales)
    assert np.ptp(scales) > 1e-3  # all are 1 where nothing was seen
    kernels = [keras.ops.convert_to_numpy(query.quantized_kernel) for query in queries.values()]
    assert (kernels[0] != kernels[1]).any()
