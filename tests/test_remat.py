"""`remat="block"`: the same training with less memory."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama import backend

SIZES = {"num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 48}
IDS = np.random.default_rng(0).integers(1, 60, (3, 9))


def decoder(**options):
    return keras_llama.LlamaCausalLM(keras_llama.LlamaBackbone(vocabulary_size=60, **{**SIZES, **options})), IDS


def encoder_decoder(**options):
    backbone = keras_llama.LlamaSeq2SeqBackbone(vocabulary_size=60, **{**SIZES, "num_layers": 1}, **options)
    return keras_llama.LlamaSeq2SeqLM(backbone), {"encoder_token_ids": IDS, "decoder_token_ids": IDS[:, :5]}


def adapted(quantized=None, **options):
    model, inputs = decoder(num_layers=1, **options)
    if quantized:
        model.quantize(quantized)
    model.enable_lora(rank=2, targets="all-linear")
    for i, weight in enumerate(model.trainable_weights):
        weight.assign(np.random.default_rng(i).normal(0, 0.3, weight.shape))
    return model, inputs


def head_alone(**options):
    classifier = keras_llama.LlamaTextClassifier(decoder(num_layers=1, **options)[0].backbone, num_classes=2)
    classifier.freeze_base()
    return classifier, IDS, [0, 1, 1]


def one_step(make, jit_compile, **options):
    """Results of a step of gradient descent, and by how much each weight moved."""
    keras.utils.set_random_seed(0)
    model, *data = make(**options)
    start = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(1.0), jit_compile=jit_compile)
    history = model.fit(*data, verbose=0).history
    moved = [ops.convert_to_numpy(v) - old for v, old in zip(model.trainable_variables, start, strict=True)]
    return {name: values[0] for name, values in history.items()}, moved


@functools.cache
def usual_step(make, jit_compile, *options):
    """The same as one is trained without more."""
    return one_step(make, jit_compile, **dict(options))


@pytest.mark.parametrize(
    ("make", "jit_compile", "options"),
    [
        (decoder, "auto", {"attention_bias": True}),
        (decoder, "auto", {"dtype": "mixed_bfloat16"}),
        (decoder, True, {}),
        (encoder_decoder, "auto", {}),
        (adapted, "auto", {}),
        (adapted, "auto", {"quantized": "int8"}),
        (head_alone, "auto", {}),
    ],
    ids=["decoder", "bfloat16", "compiled", "encoder-decoder", "adapters", "int8 base", "frozen base"],
)
def test_gradients_are_the_same(make, jit_compile, options):
    if jit_compile is True and keras.config.backend() == "torch":
        pytest.skip("torch compiles nothing here")
    if (make is head_alone or options.get("quantized")) and keras.config.backend() != "jax":
        pytest.skip("others read a frozen weight where it is")
    again, by_again = one_step(make, jit_compile, remat="block", **options)
    kept, by_kept = usual_step(make, jit_compile, *options.items())
    half = options.get("dtype") == "mixed_bfloat16"
    assert again == pytest.approx(kept, rel=1e-2 if half else 1e-5)
    for one, other in zip(by_again, by_kept, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=np.abs(other).max() / 20 if half else 1e-5)


@pytest.mark.parametrize(
    ("make", "dtype"), [(decoder, "float32"), (decoder, "mixed_bfloat16"), (encoder_decoder, "float32")]
)
def test_what_is_cheap_is_computed_again_without_a_trace(monkeypatch, make, dtype):
    """TensorFlow's graph does so with norms and SwiGLU's product in any case."""
    again, by_again = usual_step(make, "auto", ("dtype", dtype))
    monkeypatch.setattr(backend, "remat_cheap", lambda function, variables: function)
    kept, by_kept = one_step(make, "auto", dtype=dtype)
    half = dtype == "mixed_bfloat16"
    # oneDNN's SwiGLU, which the graph uses where nobody else reads its sigmoid, rounds once and not twice.
    assert again == pytest.approx(kept, rel=1e-2 if half else 1e-6)
    for one, other in zip(by_again, by_kept, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=np.abs(other).max() / 50 if half else 1e-6)


def test_dropout_is_that_of_the_forward_pass():
    """With the gradient of other random numbers, a step against it would not lower the loss that it belongs to."""
    again, by_again = one_step(decoder, "auto", remat="block", dropout=0.5)
    kept, by_kept = one_step(decoder, "auto", dropout=0.5)
    assert again == pytest.approx(kept, rel=1e-5)
    for one, other in zip(by_again, by_kept, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_it_is_saved_may_be_set_later_and_is_checked(tmp_path):
    model, inputs = decoder(remat="block")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.backbone.remat == "block"
    assert all(block.remat for block in loaded.backbone.blocks)
    loaded.backbone.remat = None
    assert not any(block.remat for block in loaded.backbone.blocks)
    assert np.array_equal(loaded.predict(inputs, verbose=0), model.predict(inputs, verbose=0))
    with pytest.raises(ValueError, match=r'`remat` must be "block" or None'):
        loaded.backbone.remat = "full"
    loaded.enable_lora(rank=2, dropout=0.1)
    with pytest.raises(ValueError, match=r"`remat` must be None beside adapters.*Received: dropout=\{'default': 0.1\}"):
        loaded.backbone.remat = "block"
    assert loaded.backbone.remat is None
    assert not any(block.remat for block in loaded.backbone.blocks)


PROGRAM = """
import sys
import keras, keras_llama
import numpy as np

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

sizes = dict(num_layers=12, num_query_heads=2, num_key_value_heads=2, hidden_dim=256, intermediate_dim=1024)
backbone = keras_llama.LlamaBackbone(vocabulary_size=500, **sizes, remat=sys.argv[1] if sys.argv[1] else None)
lm = keras_llama.LlamaCausalLM(backbone)
lm.compile(keras.optimizers.SGD(0.1))
lm.fit(np.ones((1, 64), int), verbose=0)
before = peak()
lm.fit(np.ones((1, 2048), int), verbose=0)
print(peak() - before)
"""


@pytest.mark.long
@pytest.mark.slow
def test_what_a_long_text_needs_is_halved(run_python):
    kept, again = (float(run_python(PROGRAM, remat)) for remat in ("", "block"))
    assert again < kept / 2, (kept, again)
