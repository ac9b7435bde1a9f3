"""On TensorFlow XLA compiles the optimiser's update: the same weights as by Keras' own."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama

pytestmark = pytest.mark.xla
IDS = np.random.default_rng(0).integers(1, 60, (4, 9))
OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, global_clipnorm=0.5),
    "accumulating": lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2),
    "muon": lambda: keras.optimizers.Muon(1e-2),
}


def trained(make, optimizer, jit_compile, **options):
    """The model after three epochs of two steps, and its weights."""
    keras.utils.set_random_seed(0)
    model = keras_llama.LlamaCausalLM(make(num_layers=1, tie_word_embeddings=False, **options))
    model.compile(optimizer, jit_compile=jit_compile)
    model.fit(IDS, batch_size=2, epochs=3, verbose=0)
    return model, [ops.convert_to_numpy(v) for v in model.weights]


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the others compile it with the step, or not at all")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_those_of_keras(make_backbone, name):
    model, weights = trained(make_backbone, OPTIMIZERS[name](), "auto")
    assert model.optimizer.updates_by_xla
    plain, expected = trained(make_backbone, OPTIMIZERS[name](), False)
    assert not plain.optimizer.updates_by_xla
    assert int(model.optimizer.iterations) == int(plain.optimizer.iterations) > 0
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_float16_scales_its_loss_and_an_optimizer_serves_two_models(make_backbone):
    optimizer = keras.optimizers.SGD(0.1)
    for dtype in ("mixed_float16", "float32"):
        model, weights = trained(make_backbone, optimizer if dtype == "float32" else "sgd", "auto", dtype=dtype)
        assert all(np.isfinite(values).all() for values in weights)
        model.compile(model.optimizer)
        model.fit(IDS, verbose=0)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the others have no sparse gradients")
def test_xla_is_given_gradients_whose_shapes_do_not_depend_on_the_batch(make_backbone):
    """A sparse one has a row for each token, and would be compiled anew for each number of them."""
    import tensorflow as tf

    kinds = []

    class Watched(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            kinds.extend(type(grad) for grad in grads)
            return super().apply(grads, trainable_variables)

    trained(make_backbone, Watched(0.1), "auto")
    assert kinds
    assert tf.IndexedSlices not in kinds


@pytest.mark.parametrize("jit_compile", ["auto", False])
def test_clipping_goes_by_the_gradients_of_tokens_that_occur_again(make_backbone, jit_compile):
    """Keras on TensorFlow takes the norm of a row for each token, before those of one token are added up."""
    keras.utils.set_random_seed(0)
    model = keras_llama.LlamaTextClassifier(make_backbone(num_layers=1), num_classes=2)
    model.compile(keras.optimizers.SGD(1.0, global_clipnorm=0.01), jit_compile=jit_compile)
    before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.fit(np.array([[5] * 8, [6] * 4 + [5] * 4]), np.array([0, 1]), verbose=0)
    after = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    moved = np.sqrt(sum(((a - b).astype("float64") ** 2).sum() for a, b in zip(after, before, strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-3)
