"""LlamaBackbone: cache, padding, packing, precision, dropout, and the round trip of its configuration."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama import cache as kv_cache

TOLERANCE = 1e-5


def run(backbone, ids, mask=None):
    ids = np.array(ids, "int32")
    mask = np.ones_like(ids) if mask is None else np.array(mask, "int32")
    return ops.convert_to_numpy(backbone({"token_ids": ids, "padding_mask": mask}))


# Each length of a prompt once with each architecture and with each padding.
PREFILLS = [
    (changes, padding, [1, 7, 12][(i + j) % 3])
    for i, changes in enumerate([{}, {"num_key_value_heads": 1}, {"head_dim": 12, "attention_bias": True}])
    for j, padding in enumerate(["none", "left", "right"])
]


@pytest.mark.parametrize(("changes", "padding", "prefill"), PREFILLS)
def test_prefill_and_steps_equal_the_full_forward(make_backbone, rng, changes, padding, prefill):
    backbone = make_backbone(**changes)
    ids = rng.integers(1, 60, (2, 12)).astype("int32")
    mask = np.ones((2, 12), "int32")
    if padding != "none":
        mask[1, :3] = 0
        mask = mask if padding == "left" else mask[:, ::-1].copy()
    full = run(backbone, ids, mask)
    longer = np.pad(mask, ((0, 0), (0, 4)))  # a cache may be longer than the text
    cache = kv_cache.make(backbone.config, 2, 16)
    hidden, cache = backbone.decode(ids[:, :prefill], longer, cache, 0)
    parts = [hidden]
    for i in range(prefill, 12):
        hidden, cache = backbone.decode(ids[:, i : i + 1], longer, cache, i)
        parts.append(hidden)
    steps = ops.convert_to_numpy(ops.concatenate(parts, axis=1))
    assert np.abs(steps - full)[mask > 0].max() <= TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_weights_start_by_their_width(tied):
    options = {"num_query_heads": 2, "num_key_value_heads": 2, "hidden_dim": 64, "intermediate_dim": 96}
    backbone = keras_llama.LlamaBackbone(vocabulary_size=500, num_layers=8, tie_word_embeddings=tied, **options)
    for weight in backbone.weights:
        value, name = ops.convert_to_numpy(weight), weight.path.split("/")[-2]
        if name in ("attention_output", "down"):
            expected = (len(value) * 16) ** -0.5
        elif name == "token_embedding":
            expected = 64**-0.5 if tied else 1
        else:
            expected = 0 if value.ndim == 1 else len(value) ** -0.5
        assert value.std() == pytest.approx(expected, rel=0.05), weight.path


def test_cache_is_not_changed_in_place(make_backbone, rng):
    backbone = make_backbone()
    cache = kv_cache.make(backbone.config, 1, 4)
    backbone.decode(rng.integers(1, 60, (1, 2)), np.ones((1, 4), "int32"), cache, 0)
    assert all(not ops.convert_to_numpy(x).any() for pair in cache for x in pair)


def test_reorder_takes_rows():
    pair = (ops.reshape(ops.arange(12.0), (3, 2, 1, 2)),) * 2
    found = kv_cache.reorder((pair,), np.array([2, 0, 0]))
    np.testing.assert_array_equal(ops.convert_to_numpy(found[0][0])[:, 0, 0, 0], [8, 0, 0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_each_row_alone(make_backbone, rng, causal, side):
    backbone = make_backbone(causal=causal)
    lengths = [3, 9, 6]
    rows = [rng.integers(1, 60, n) for n in lengths]
    pads = [(9 - n, 0) if side == "left" else (0, 9 - n) for n in lengths]
    ids = np.stack([np.pad(row, pad, constant_values=33) for row, pad in zip(rows, pads, strict=True)])
    mask = np.stack([np.pad(np.ones(n, int), pad) for n, pad in zip(lengths, pads, strict=True)])
    batch = run(backbone, ids, mask)
    for row, together, keep in zip(rows, batch, mask, strict=True):
        assert np.abs(together[keep > 0] - run(backbone, [row])[0]).max() <= TOLERANCE


@pytest.mark.parametrize("causal", [True, False])
def test_packed_segments_equal_the_texts_apart(make_backbone, rng, causal):
    backbone = make_backbone(causal=causal)
    rows = [rng.integers(1, 60, n) for n in (4, 7, 2)]
    segments = np.concatenate([np.full(len(row), i + 1) for i, row in enumerate(rows)] + [np.zeros(3, int)])
    packed = run(backbone, [np.concatenate([*rows, np.zeros(3, int)])], [segments])[0]
    for i, row in enumerate(rows):
        assert np.abs(packed[segments == i + 1] - run(backbone, [row])[0]).max() <= TOLERANCE


def test_a_causal_token_does_not_see_what_follows_and_a_bidirectional_one_does(make_backbone):
    for causal in (True, False):
        backbone = make_backbone(causal=causal)
        first, second = run(backbone, [[5, 6, 7]]), run(backbone, [[5, 6, 8]])
        assert np.allclose(first[:, :2], second[:, :2], atol=1e-6) == causal


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_half_precision_survives_large_embeddings(make_backbone, rng, policy):
    """Embeddings a thousand times too large: the norms, in float32, bring them back without a NaN."""
    backbone = make_backbone(dtype=policy)
    embeddings = backbone.token_embedding.embeddings
    ids = rng.integers(1, 60, (2, 16)).astype("int32")
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    embeddings.assign(embeddings * 1000)
    hidden = backbone({"token_ids": ids, "padding_mask": mask})
    assert keras.backend.standardize_dtype(hidden.dtype) == "bfloat16"
    exact = make_backbone(dtype="float32")
    exact.token_embedding.embeddings.assign(ops.cast(embeddings, "float32"))
    found, wanted = ops.convert_to_numpy(ops.cast(hidden, "float32")), run(exact, ids, mask)
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_norm_is_computed_in_float32():
    """The mean square of 300 is 90,000, beyond float16: a norm in half precision would give zeros."""
    norm = keras.layers.RMSNormalization(epsilon=1e-5, dtype="float16")
    found = ops.convert_to_numpy(norm(ops.cast(ops.full((1, 8), 300.0), "float16")))
    np.testing.assert_allclose(found, 1.0, atol=1e-3)


@pytest.mark.parametrize("policy", ["float32", "bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_variable_and_compute_dtypes(make_backbone, policy):
    backbone = make_backbone(dtype=policy)
    expected = keras.dtype_policies.get(policy)
    assert {v.dtype for v in backbone.variables} == {expected.variable_dtype}
    assert backbone.compute_dtype == expected.compute_dtype


def test_dropout_acts_in_training_only(make_backbone):
    backbone = make_backbone(dropout=0.5)
    inputs = {"token_ids": np.array([[5, 6, 7]]), "padding_mask": np.ones((1, 3), "int32")}
    still, training = backbone(inputs, training=False), backbone(inputs, training=True)
    assert np.array_equal(ops.convert_to_numpy(still), ops.convert_to_numpy(backbone(inputs, training=False)))
    assert not np.allclose(ops.convert_to_numpy(still), ops.convert_to_numpy(training))


ROPE = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": ROPE, "dropout": 0.1, "causal": False, "dtype": "mixed_bfloat16"},
        {"head_dim": 6, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "name": "other"},
    ],
)
def test_backbone_round_trips_through_its_configuration(make_backbone, changes):
    backbone = make_backbone(**changes)
    again = keras_llama.LlamaBackbone.from_config(backbone.get_config())
    assert again.get_config() == backbone.get_config()
    assert [v.shape for v in again.variables] == [v.shape for v in backbone.variables]
    again.set_weights(backbone.get_weights())
    assert np.array_equal(run_low(again), run_low(backbone))


def run_low(backbone):
    ids = np.array([[5, 6, 7, 0]])
    hidden = backbone({"token_ids": ids, "padding_mask": (ids > 0).astype("int32")})
    return ops.convert_to_numpy(ops.cast(hidden, "float32"))


def test_a_cache_that_does_not_fit_is_refused(make_backbone):
    backbone, ids = make_backbone(), np.array([[3, 4]])
    empty = kv_cache.make(backbone.config, 1, 4)
    for index, columns in ((3, 4), (9, 4), (0, 5)):
        with pytest.raises(ValueError, match="must fit into the cache"):
            backbone.decode(ids, np.ones((1, columns), "int32"), empty, index)
    bidirectional = make_backbone(causal=False)
    with pytest.raises(ValueError, match="needs a causal backbone"):
        bidirectional.decode(ids, np.ones((1, 4), "int32"), empty, 0)
