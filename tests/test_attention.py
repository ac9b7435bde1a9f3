"""Masks, positions and attention against the formulas written out in NumPy."""

import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama import backend
from keras_llama.attention import attend, attend_to_first, not_later, positions, same_segment

RIGHT, LEFT, PACKED, FULL = [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 2, 2, 2], [1, 1, 1, 1, 1]
torch_alone = pytest.mark.skipif(keras.config.backend() != "torch", reason="a kernel of torch's")


def seen_by(mask, index=0, length=None):
    mask = np.array(mask)
    columns = np.arange(mask.shape[1])
    queries = slice(index, None if length is None else index + length)
    return ops.logical_and(same_segment(mask[:, queries], mask), not_later(columns[queries], columns))


def test_positions_count_within_the_segment():
    found = ops.convert_to_numpy(positions(seen_by([RIGHT, LEFT, PACKED])))
    assert found[0, :3].tolist() == [0, 1, 2]
    assert found[1, 2:].tolist() == [0, 1, 2]
    assert found[2].tolist() == [0, 1, 0, 1, 2]


def test_positions_of_a_cached_step():
    assert ops.convert_to_numpy(positions(seen_by([LEFT, PACKED], index=4, length=1))).tolist() == [[2], [2]]


def test_no_query_is_left_without_a_key():
    assert ops.convert_to_numpy(seen_by([RIGHT, LEFT, [0] * 5])).any(axis=-1).all()


def test_real_tokens_see_no_padding_and_no_other_segment():
    seen = ops.convert_to_numpy(seen_by([RIGHT, LEFT, PACKED]))
    assert not seen[0, :3, 3:].any()
    assert not seen[1, 2:, :2].any()
    assert not seen[2, 2:, :2].any()


def numpy_attention(query, key, value, mask):
    """softmax(q k^T / sqrt(H)) v with query head n on key/value head n // (N / K)."""
    groups = query.shape[2] // key.shape[1]
    key, value = key.repeat(groups, axis=1), value.repeat(groups, axis=1)
    scores = np.einsum("btnh,bnsh->bnts", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bnsh->btnh", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", [[RIGHT, LEFT], [PACKED, RIGHT], [FULL, FULL]])
def test_attention_is_the_formula(rng, kv_heads, mask):
    query = rng.normal(size=(2, 5, 4, 8)).astype("float32")
    key, value = rng.normal(size=(2, 2, kv_heads, 5, 8)).astype("float32")
    mask = ops.convert_to_numpy(seen_by(mask))
    found = attend(*(ops.convert_to_tensor(x) for x in (query, key, value, mask)))
    np.testing.assert_allclose(ops.convert_to_numpy(found), numpy_attention(query, key, value, mask), atol=1e-5)


@torch_alone
@pytest.mark.parametrize("threads", [1, 50])
@pytest.mark.parametrize("mask", [[RIGHT, LEFT], [FULL, FULL]])
def test_on_torch_keys_are_repeated_where_there_are_too_few_for_its_threads(rng, monkeypatch, threads, mask):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = calls_of_the_kernel(monkeypatch)
    query = rng.normal(size=(2, 5, 4, 8)).astype("float32")
    key, value = rng.normal(size=(2, 2, 2, 5, 8)).astype("float32")
    mask = ops.convert_to_numpy(seen_by(mask))
    arrays = [torch.tensor(x, requires_grad=True) for x in (query, key, value)]
    found = attend(*arrays, ops.convert_to_tensor(mask))
    assert calls[0]["enable_gqa"] == (threads == 1)
    np.testing.assert_allclose(found.detach(), numpy_attention(query, key, value, mask), atol=1e-5)

    scores = torch.einsum("btnh,bnsh->bnts", arrays[0], arrays[1].repeat_interleave(2, dim=1)) / 8**0.5
    shares = torch.softmax(scores.masked_fill(~torch.tensor(mask)[:, None], -torch.inf), dim=-1)
    expected = torch.einsum("bnts,bnsh->btnh", shares, arrays[2].repeat_interleave(2, dim=1))
    weights = torch.tensor(rng.normal(size=query.shape), dtype=torch.float32)
    pairs = zip(*(torch.autograd.grad((x * weights).sum(), arrays) for x in (found, expected)), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=1e-5)


@torch_alone
@pytest.mark.parametrize(
    ("padding_mask", "causal", "expected"),
    [
        ([FULL, FULL], True, True),
        ([FULL, FULL], False, False),
        ([FULL, RIGHT], True, False),
        ([LEFT, FULL], True, False),
        ([PACKED], True, False),
    ],
)
def test_on_torch_a_batch_without_padding_takes_the_causal_kernel(monkeypatch, padding_mask, causal, expected):
    """Which skips half of the products, and on a GPU is the fastest."""
    backbone = keras_llama.LlamaBackbone(vocabulary_size=9, **keras_llama.size("tiny"), causal=causal)
    calls = calls_of_the_kernel(monkeypatch)
    padding_mask = np.array(padding_mask)
    backbone({"token_ids": np.ones_like(padding_mask), "padding_mask": padding_mask}, training=True)
    assert [call["is_causal"] for call in calls] == [expected] * len(backbone.blocks)
    assert all((call["attn_mask"] is None) == expected for call in calls)


def calls_of_the_kernel(monkeypatch):
    import torch

    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *arrays, **options: calls.append(options) or kernel(*arrays, **options),
    )
    return calls


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_softmax_is_computed_in_float32(dtype):
    """Read off the compiled graph on TensorFlow and JAX; on torch, by scores beyond the range of float16."""
    query, key = ops.full((1, 5, 2, 8), 100.0, dtype), ops.full((1, 2, 5, 8), 100.0, dtype)
    arguments = [query, key, key, ops.ones((1, 5, 5), "bool")]
    found = attend(*arguments)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        graph = tf.function(attend).get_concrete_function(*arguments).graph
        kinds = {op.get_attr("T") for op in graph.get_operations() if "Softmax" in op.type}
        assert kinds == {tf.float32}
    elif keras.config.backend() == "jax":
        import jax

        kinds = set(re.findall(r":(\w+)\[[^]]*\] = exp ", str(jax.make_jaxpr(attend)(*arguments))))
        assert kinds == {"f32"}
    else:  # 8 x 100 x 100 = 80,000
        np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(found, "float32")), 100.0)


@pytest.mark.parametrize("count", [1, 256, 257, 511, 512, 600, 700])
def test_reading_the_filled_columns_gives_what_reading_all_does(rng, count):
    query, key, value = (
        ops.convert_to_tensor(rng.normal(size=shape), "float32")
        for shape in ((2, 1, 4, 8), (2, 2, 700, 8), (2, 2, 700, 8))
    )
    mask = np.broadcast_to(np.arange(700) < count, (2, 1, 700)) & (rng.random((2, 1, 700)) < 0.8)
    mask[:, :, 0] = True
    expected = attend(query, key, value, mask)
    step = backend.Compiled(attend_to_first, [])
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (step(query, key, value, mask, count), expected)), atol=1e-6)


@pytest.mark.skipif(keras.config.backend() == "torch", reason="its lists cannot choose")
@pytest.mark.parametrize("count", [1, 200, 256, 257, 512, 513])
def test_columns_beyond_twice_the_filled_are_not_read(rng, count):
    """A number that is none spoils every product that reads it, weighed by 0 or not."""
    query, key = (ops.convert_to_tensor(rng.normal(size=s), "float32") for s in ((1, 1, 2, 4), (1, 1, 2000, 4)))
    value = rng.normal(size=(1, 1, 2000, 4)).astype("float32")
    value[:, :, max(256, 2 * count) :] = np.nan
    mask = np.arange(2000)[None, None] < count
    step = backend.Compiled(attend_to_first, [])
    assert np.isfinite(ops.convert_to_numpy(step(query, key, ops.convert_to_tensor(value), mask, count))).all()
