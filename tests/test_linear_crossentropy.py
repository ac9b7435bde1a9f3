"""`linear_crossentropy` in `fit` and `evaluate` is the dense `TokenCrossentropy`: values, gradients and metrics."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama import backend, losses
from keras_llama.losses import Perplexity, TokenAccuracy, TokenCrossentropy, linear_crossentropy


def batch(rng, rows=5, length=9):
    mask = (np.arange(length) < rng.integers(2, length + 1, (rows, 1))).astype("int32")
    return {"token_ids": rng.integers(0, 60, (rows, length)), "padding_mask": mask}


def step(make_backbone, inputs, dense=False, tied=True, smoothing=0.0, dtype="float32", **options):
    """Loss and metrics of one step of gradient descent, and by how much each weight moved."""
    keras.utils.set_random_seed(0)
    model = keras_llama.LlamaCausalLM(make_backbone(num_layers=1, tie_word_embeddings=tied, dtype=dtype))
    start = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(1.0), TokenCrossentropy(smoothing), **options)
    assert model.chunked
    model.chunked = not dense
    weights = np.arange(1.0, 1 + len(inputs["token_ids"]))
    history = model.fit(inputs, sample_weight=weights, batch_size=64, shuffle=False, verbose=0).history
    moved = [ops.convert_to_numpy(v) - old for v, old in zip(model.trainable_variables, start, strict=True)]
    evaluated = model.evaluate(inputs, sample_weight=weights, verbose=0, return_dict=True)
    return {name: values[0] for name, values in history.items()}, evaluated, moved


# Chunks of 7 tokens leave a rest; one of 10,000 holds all.
JIT = keras.config.backend() != "torch"  # which compiles nothing here
CASES = [
    pytest.param(10_000, {}, marks=pytest.mark.plain),
    (7, {"tied": False, "smoothing": 0.2}),
    (7, {"jit_compile": JIT}),
]


@pytest.mark.parametrize(("rows", "options"), CASES, ids=str)
def test_it_is_the_dense_loss_with_its_gradients(make_backbone, rng, monkeypatch, rows, options):
    monkeypatch.setattr(losses, "rows_of_chunk", lambda vocabulary: rows)
    inputs = batch(rng)
    found, expected = (step(make_backbone, inputs, dense, **options) for dense in (False, True))
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert set(one) == {"loss", "perplexity", "accuracy"}
        assert one == pytest.approx(other, rel=1e-5)
    for one, other in zip(found[2], expected[2], strict=True):
        assert np.abs(other).max() > 1e-3
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.plain
def test_so_it_is_of_an_encoder_decoder(rng, monkeypatch):
    """With weights of rows, padding on both sides and label smoothing."""
    monkeypatch.setattr(losses, "rows_of_chunk", lambda vocabulary: 7)
    source, target = batch(rng, length=6), batch(rng)
    sides = {"encoder": source, "decoder": target}
    inputs = {f"{side}_{name}": array for side, arrays in sides.items() for name, array in arrays.items()}
    weights = np.arange(1.0, 6.0)
    found = []
    for dense in (False, True):
        keras.utils.set_random_seed(0)
        backbone = keras_llama.LlamaSeq2SeqBackbone(
            vocabulary_size=60, **{**keras_llama.size("tiny"), "num_layers": 1}, tie_word_embeddings=True
        )
        model = keras_llama.LlamaSeq2SeqLM(backbone, label_smoothing=0.1)
        start = [ops.convert_to_numpy(v) for v in model.trainable_variables]
        model.compile(keras.optimizers.SGD(1.0))
        assert model.chunked
        model.chunked = not dense
        history = model.fit(inputs, sample_weight=weights, batch_size=64, shuffle=False, verbose=0).history
        moved = [ops.convert_to_numpy(v) - old for v, old in zip(model.trainable_variables, start, strict=True)]
        found.append((history, moved))
    (one, moved), (other, expected) = found
    assert one == {name: pytest.approx(values, rel=1e-5) for name, values in other.items()}
    for change, wanted in zip(moved, expected, strict=True):
        np.testing.assert_allclose(change, wanted, rtol=0, atol=1e-5)
    assert max(np.abs(wanted).max() for wanted in expected) > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_frozen_head_no_gradient_is_computed(make_backbone, rng, monkeypatch, tied):
    computed, given = [], losses.backend.with_gradients
    spied = lambda loss, arrays, gradients: computed.append(len(gradients)) or given(loss, arrays, gradients)  # noqa: E731
    monkeypatch.setattr(losses.backend, "with_gradients", spied)
    moved = {}
    for dense in (False, True):
        keras.utils.set_random_seed(0)
        lm = keras_llama.LlamaCausalLM(make_backbone(num_layers=1, tie_word_embeddings=tied))
        (lm.backbone.token_embedding if tied else lm.get_layer("lm_head")).trainable = False
        start = [ops.convert_to_numpy(v) for v in lm.weights]
        lm.compile(keras.optimizers.SGD(1.0))
        lm.chunked = not dense
        lm.fit(batch(np.random.default_rng(4)), batch_size=64, verbose=0)
        moved[dense] = [ops.convert_to_numpy(v) - old for v, old in zip(lm.weights, start, strict=True)]
    assert set(computed) == {1}
    for one, other in zip(moved[False], moved[True], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert sum(not array.any() for array in moved[False]) == 1  # the head's


def test_in_bfloat16_the_products_are_rounded_and_the_loss_is_not(make_backbone, rng):
    inputs = batch(rng)
    found, expected = (step(make_backbone, inputs, dense, dtype="mixed_bfloat16") for dense in (False, True))
    for metrics in (found[0], expected[0]):
        metrics["perplexity"] = np.log(metrics["perplexity"])  # whose relative error would be absolute in the logits
    assert found[0] == pytest.approx(expected[0], rel=5e-3)  # a logit has 8 bits, and XLA rounds it where it likes
    for one, other in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=np.abs(other).max() / 20)


@pytest.mark.parametrize("rows", [2, 7])
def test_tokens_of_weight_0_are_not_computed(rows, monkeypatch):
    """Rows that hold no number would show."""
    monkeypatch.setattr(losses, "rows_of_chunk", lambda vocabulary: rows)
    hidden = np.ones((2, 14, 3), "float32")
    hidden[1] = np.nan
    weights = np.zeros((2, 14), "float32")
    weights[0] = 1
    for training in (True, False):
        arrays = (hidden, np.eye(4, 3, dtype="float32"), np.zeros((2, 14), "int32"), weights)
        _, entropy, _ = linear_crossentropy(*map(ops.convert_to_tensor, arrays), training=training)
        np.testing.assert_allclose(entropy[0], np.log(3 + np.exp(-1)), rtol=1e-6)
        assert not ops.convert_to_numpy(entropy)[1].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_by_logits_is_the_formula(rng, dtype):
    """Of a vocabulary of which torch computes four rows at a time, on a CPU."""
    logits = rng.normal(size=(10, 2**18)).astype("float32")
    targets, weights, smoothing = rng.integers(0, 2**18, 10), np.linspace(0.1, 1, 10, dtype="float32"), 0.2
    targets[3] = logits[3].argmax()
    given = ops.cast(ops.convert_to_tensor(logits), dtype)
    logits = ops.convert_to_numpy(ops.cast(given, "float32")).astype("float64")  # torch writes over what is given
    entropy, error, hits = backend.softmax_error(
        given, ops.cast(targets, "int32"), ops.cast(weights, dtype="float32"), smoothing
    )
    assert keras.backend.standardize_dtype(error.dtype) == dtype
    logarithms = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(entropy, -logarithms[np.arange(10), targets], rtol=1e-5)
    assert ops.convert_to_numpy(hits).tolist() == (logits.argmax(-1) == targets).tolist()
    expected = np.exp(logarithms) - smoothing / 2**18
    expected[np.arange(10), targets] -= 1 - smoothing
    found = ops.convert_to_numpy(ops.cast(error, "float32"))
    np.testing.assert_allclose(
        found, expected * weights[:, None], rtol={"float32": 1e-4, "bfloat16": 2**-8}[dtype], atol=1e-9
    )


def test_a_smoothing_may_be_an_integer():
    hidden, kernel = ops.ones((1, 2, 3)), ops.ones((5, 3))
    loss, *_ = linear_crossentropy(hidden, kernel, ops.ones((1, 2), "int32"), ops.ones((1, 2)), label_smoothing=0)
    assert float(loss) == pytest.approx(np.log(5))


def test_nothing_but_padding_has_no_loss(make_backbone):
    nothing = {"token_ids": np.ones((2, 3), int), "padding_mask": np.zeros((2, 3), int)}
    found, _, moved = step(make_backbone, nothing)
    assert found["loss"] == 0
    assert not any(np.any(change) for change in moved)


class Doubled(TokenCrossentropy):
    def call(self, y_true, y_pred):
        return 2 * super().call(y_true, y_pred)


OTHER = [
    {"metrics": [keras.metrics.SparseCategoricalAccuracy()]},
    {"weighted_metrics": [keras.metrics.SparseCategoricalCrossentropy(from_logits=True)]},
    {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
    {"loss_weights": 0.5},
    {"loss": Doubled()},
]


@pytest.mark.plain
@pytest.mark.parametrize("options", OTHER, ids=lambda options: next(iter(options)))
def test_what_needs_logits_gets_them(make_backbone, rng, options):
    model = keras_llama.LlamaCausalLM(make_backbone())
    model.compile(**options)
    assert not model.chunked
    history = model.fit(batch(rng), verbose=0).history
    assert all(np.isfinite(values).all() for values in history.values())


@pytest.mark.plain
@pytest.mark.parametrize("chosen", [{"weighted_metrics": ["perplexity"]}, {"metrics": ["perplexity"]}], ids=str)
def test_metrics_by_name_need_no_logits_and_count_what_the_loss_counts(make_backbone, rng, chosen):
    """Keras gives `metrics` no weights: they would count padding."""
    model = keras_llama.LlamaCausalLM(make_backbone())
    model.compile(loss="sparse_categorical_crossentropy", **{"weighted_metrics": None, **chosen})
    assert model.chunked
    found = model.evaluate(batch(rng), verbose=0, return_dict=True)
    assert found == {"loss": found["loss"], "perplexity": pytest.approx(np.exp(found["loss"]), rel=1e-5)}


@pytest.mark.plain
def test_metrics_of_tokens_take_the_place_of_the_default(make_backbone):
    model, other = keras_llama.LlamaCausalLM(make_backbone()), keras.metrics.SparseCategoricalAccuracy()
    mine = TokenAccuracy()
    model.compile(metrics=[other, mine])
    default = model.compile_options["weighted_metrics"][0]
    assert model.compile_options["metrics"] == [other]
    assert model.compile_options["weighted_metrics"] == [default, mine]
    assert default.name == "perplexity"


@pytest.mark.plain
def test_a_batch_of_ones_own_needs_no_weights(make_backbone, rng):
    inputs = {name: rng.integers(1, 60, (2, 5)) if name == "token_ids" else np.ones((2, 5)) for name in batch(rng)}
    model, targets = keras_llama.LlamaCausalLM(make_backbone()), rng.integers(1, 60, (2, 5))
    model.compile("sgd")
    chunked = model.test_on_batch(inputs, targets, return_dict=True)
    model.compile("sgd", loss_weights=1.0)
    assert chunked == pytest.approx(model.test_on_batch(inputs, targets, return_dict=True), rel=1e-5)


@pytest.mark.plain
def test_predict_gives_logits_after_fit(make_backbone, rng):
    model = keras_llama.LlamaCausalLM(make_backbone())
    model.compile()
    model.fit(batch(rng), verbose=0)
    assert model.predict(batch(rng), verbose=0).shape == (5, 9, 60)
    assert tuple(model(batch(rng)).shape) == (5, 9, 60)


def test_metrics_of_logits_are_those_of_the_chunks(rng):
    logits, targets = rng.normal(size=(2, 3, 5)).astype("float32"), rng.integers(0, 5, (2, 3))
    weights = np.array([[1, 1, 0], [0.5, 0, 0]], "float32")
    hidden, kernel = ops.convert_to_tensor(logits), ops.convert_to_tensor(np.eye(5, dtype="float32"))
    _, *scores = linear_crossentropy(hidden, kernel, targets, weights, training=False)
    for kind in (Perplexity, TokenAccuracy):
        dense, chunked = kind(), kind()
        dense.update_state(targets, logits, weights)
        chunked.add(*scores, weights)
        assert float(chunked.result()) == pytest.approx(float(dense.result()), rel=1e-5)


def test_the_gradient_of_a_scaled_loss_is_scaled(make_backbone, rng):
    """float16 scales the loss up before it derives it; the optimiser scales back."""
    inputs = batch(rng)
    plain, scaled = (
        step(make_backbone, inputs, dtype=dtype)[2] for dtype in ("float32", "mixed_float16")
    )  # `compile` wraps the optimiser in one that scales
    for one, other in zip(scaled, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=np.abs(other).max() / 20)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the others take one turn at a time")
def test_one_chunk_is_held_at_a_time():
    import tensorflow as tf

    @tf.function
    def loss(hidden, kernel, targets, weights):
        return linear_crossentropy(hidden, kernel, targets, weights)[0]

    arrays = (np.ones((1, 5, 3), "float32"), np.eye(4, 3, dtype="float32"), np.zeros((1, 5), "int32"), np.ones((1, 5)))
    operations = loss.get_concrete_function(*map(ops.convert_to_tensor, arrays)).graph.get_operations()
    (turns,) = [op.get_attr("parallel_iterations") for op in operations if op.type in ("While", "StatelessWhile")]
    assert turns == 1


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="of TensorFlow's graphs")
def test_a_step_is_traced_once(make_backbone, rng, monkeypatch):
    """TensorFlow would trace a step that makes the optimiser's state a second time, and keep both graphs."""
    model, calls = keras_llama.LlamaCausalLM(make_backbone()), []
    monkeypatch.setattr(losses.Perplexity, "add", lambda *args: calls.append(args))
    model.compile("adam")
    model.fit(batch(rng), batch_size=5, verbose=0)
    assert len(calls) == 1
