"""The encoder-decoder: numbers of a NumPy reference written from the formulas, the cache, beams, packing, files."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_llama
from keras_llama import cache as kv_cache
from keras_llama.attention import record

TINY = {"num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 48}


@pytest.fixture
def make():
    """A tiny backbone whose weights are large enough to tell one computation from another."""

    def make(**changes):
        backbone = keras_llama.LlamaSeq2SeqBackbone(**{"vocabulary_size": 60, **TINY, **changes})
        generator = np.random.default_rng(1)
        for variable in backbone.weights:
            noise = generator.normal(0, 0.2, variable.shape)
            variable.assign((1 + noise) if "norm" in variable.path else noise)
        return backbone

    return make


@pytest.fixture
def inputs(rng):
    """Two pairs; the second source and the second target end in padding."""
    ids = {"encoder_token_ids": rng.integers(1, 60, (2, 5)), "decoder_token_ids": rng.integers(1, 60, (2, 6))}
    masks = {"encoder_padding_mask": np.ones((2, 5), "int32"), "decoder_padding_mask": np.ones((2, 6), "int32")}
    masks["encoder_padding_mask"][1, 3:] = 0
    masks["decoder_padding_mask"][1, 4:] = 0
    return ids | masks


def run(backbone, inputs):
    return ops.convert_to_numpy(backbone(inputs))


class Reference:
    """One row without padding, in NumPy, float64, from the formulas that the comments name."""

    def __init__(self, backbone):
        self.weights = {v.path: ops.convert_to_numpy(v.value).astype("float64") for v in backbone.weights}
        self.config = backbone.config

    def norm(self, x, name):
        """RMSNorm (Zhang and Sennrich, 2019, equation 4)."""
        scale = self.weights[f"{name}/scale"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.layer_norm_epsilon) * scale

    def rotate(self, x):
        """RoPE (Su et al., 2021, equation 34): x (T, N, H), feature i turned with i + H/2."""
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(self, x, source, name, rotary, causal):
        """softmax(Q K^T / sqrt(H)) V (Vaswani et al., 2017, equation 1), key/value heads shared by groups."""
        heads, groups = self.config.num_query_heads, self.config.num_key_value_heads

        def project(what, values, count):
            return (values @ self.weights[f"{name}/{what}/kernel"]).reshape(len(values), count, -1)

        query, key, value = project("query", x, heads), project("key", source, groups), project("value", source, groups)
        if rotary:
            query, key = self.rotate(query), self.rotate(key)
        out = np.zeros_like(query)
        for head in range(heads):
            group = head * groups // heads
            scores = query[:, head] @ key[:, group].T / np.sqrt(query.shape[-1])
            if causal:
                scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = shares / shares.sum(-1, keepdims=True) @ value[:, group]
        return out.reshape(len(x), -1) @ self.weights[f"{name}/attention_output/kernel"]

    def mlp(self, x, name):
        """SwiGLU (Shazeer, 2020, equation 6)."""
        gate, up, down = (self.weights[f"{name}/{part}/kernel"] for part in ("gate", "up", "down"))
        return (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down

    def block(self, x, name, memory=None):
        normed = self.norm(x, f"{name}/attention_norm")
        x = x + self.attention(normed, normed, f"{name}/attention", rotary=True, causal=memory is not None)
        if memory is not None:
            normed = self.norm(x, f"{name}/cross_attention_norm")
            x = x + self.attention(normed, memory, f"{name}/cross_attention", rotary=False, causal=False)
        return x + self.mlp(self.norm(x, f"{name}/mlp_norm"), f"{name}/mlp")

    def hidden(self, source, target):
        embeddings = self.weights["token_embedding/embeddings"]
        memory = embeddings[source]
        for i in range(self.config.num_encoder_layers):
            memory = self.block(memory, f"encoder_block_{i}")
        memory = self.norm(memory, "encoder_final_norm")
        x = embeddings[target]
        for i in range(self.config.num_layers):
            x = self.block(x, f"block_{i}", memory)
        return memory, self.norm(x, "final_norm")


def test_one_block_of_each_is_the_reference(make, inputs):
    backbone = make(num_layers=1)
    found, source, target = run(backbone, inputs), inputs["encoder_token_ids"][0], inputs["decoder_token_ids"][0]
    memory, hidden = Reference(backbone).hidden(source, target)
    encoded = backbone.encode(source[None], np.ones((1, 5), "int32"))
    np.testing.assert_allclose(ops.convert_to_numpy(encoded)[0], memory, atol=1e-5)
    np.testing.assert_allclose(found[0], hidden, atol=1e-5)


def test_unequal_depths_and_padding_are_the_reference(make, inputs):
    backbone = make(num_encoder_layers=3)
    found = run(backbone, inputs)
    _, hidden = Reference(backbone).hidden(inputs["encoder_token_ids"][1, :3], inputs["decoder_token_ids"][1, :4])
    np.testing.assert_allclose(found[1, :4], hidden, atol=2e-5)  # five blocks
    assert np.isfinite(found).all()


def test_padding_of_a_target_whose_source_has_none_is_finite(make, inputs):
    inputs["encoder_padding_mask"][:] = 1
    assert np.isfinite(run(make(), inputs)).all()


def test_cached_is_full(make, inputs):
    """Token by token, and a prompt of three before; keys and values of the source computed once."""
    backbone = make()
    full = run(backbone, inputs)
    target, mask, source_mask = (
        inputs[name] for name in ("decoder_token_ids", "decoder_padding_mask", "encoder_padding_mask")
    )
    memory = backbone.memory(backbone.encode(inputs["encoder_token_ids"], source_mask))
    for widths in ([1] * 6, [3, 1, 2]):
        pairs, found, index = kv_cache.make(backbone.config, 2, 6), [], 0
        for width in widths:
            ids = target[:, index : index + width]
            hidden, pairs = backbone.decode(ids, mask, memory, source_mask, pairs, index)
            found.append(ops.convert_to_numpy(hidden))
            index += width
        found = np.concatenate(found, axis=1)
        np.testing.assert_allclose(found[0], full[0], atol=1e-5)
        np.testing.assert_allclose(found[1, :4], full[1, :4], atol=1e-5)


def test_beams_of_a_source_need_one_memory(make, inputs):
    backbone, rng = make(), np.random.default_rng(3)
    targets = rng.integers(1, 60, (6, 4))  # three for each source
    mask, source_mask = np.ones((6, 4), "int32"), inputs["encoder_padding_mask"]
    encoded = backbone.encode(inputs["encoder_token_ids"], source_mask)
    together, _ = backbone.decode(targets, mask, encoded, source_mask)
    rows = np.repeat(np.arange(2), 3)
    apart, _ = backbone.decode(targets, mask, ops.take(encoded, rows, axis=0), source_mask[rows])
    np.testing.assert_allclose(ops.convert_to_numpy(together), ops.convert_to_numpy(apart), atol=1e-5)


def test_packed_pairs_do_not_see_each_other(make, inputs):
    backbone = make()
    sources, targets = inputs["encoder_token_ids"], inputs["decoder_token_ids"]
    packed = {
        "encoder_token_ids": sources.reshape(1, -1),
        "encoder_padding_mask": np.repeat([[1, 2]], 5, axis=1),
        "decoder_token_ids": targets.reshape(1, -1),
        "decoder_padding_mask": np.repeat([[1, 2]], 6, axis=1),
    }
    alone = {**inputs, **{name: np.ones_like(value) for name, value in inputs.items() if "mask" in name}}
    np.testing.assert_allclose(run(backbone, packed).reshape(2, 6, -1), run(backbone, alone), atol=1e-5)


def test_recorded_weights_are_those_of_attention(make, inputs):
    backbone = make(num_layers=1)
    source, target = inputs["encoder_token_ids"][:1], inputs["decoder_token_ids"][:1]
    ones = [np.ones_like(x) for x in (source, target)]
    encoded = backbone.encode(source, ones[0])
    with record() as weights:
        backbone.decode(target, ones[1], encoded, ones[0])
    own, crossing = (ops.convert_to_numpy(w) for w in weights)
    assert own.shape == (1, 4, 6, 6)
    assert crossing.shape == (1, 4, 6, 5)
    np.testing.assert_allclose(crossing.sum(-1), 1, atol=1e-5)
    assert not own[..., np.triu_indices(6, 1)[0], np.triu_indices(6, 1)[1]].any()
    with record() as nothing:
        pass
    assert nothing == []


@pytest.mark.plain
@pytest.mark.parametrize("shared", [True, False])
def test_embeddings_are_shared_or_apart(make, shared):
    backbone = make(share_embeddings=shared)
    names = [v.path for v in backbone.weights if "embedding" in v.path]
    own = [] if shared else ["encoder_token_embedding/embeddings"]
    assert sorted(names) == [*own, "token_embedding/embeddings"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.plain),
        {"share_embeddings": False, "num_encoder_layers": 1, "attention_bias": True},
    ],
)
def test_files_bring_it_back(make, inputs, tmp_path, changes):
    backbone = make(**changes)
    expected = run(backbone, inputs)
    backbone.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(run(again, inputs), expected)
    assert again.get_config() == backbone.get_config()
    backbone.save_weights(tmp_path / "model.weights.h5")
    fresh = keras_llama.LlamaSeq2SeqBackbone.from_config(backbone.get_config())
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(run(fresh, inputs), expected)


@pytest.mark.plain
@pytest.mark.parametrize("shared", [True, False])
def test_starts_from_a_decoder(make_backbone, shared):
    decoder = make_backbone()
    backbone = keras_llama.LlamaSeq2SeqBackbone.from_decoder(decoder, share_embeddings=shared, dropout=0.1)
    assert backbone.config.dropout == 0.1
    assert len(backbone.encoder_blocks) == len(backbone.blocks) == 2
    theirs = {v.path: ops.convert_to_numpy(v.value) for v in decoder.weights}
    ours = {v.path: ops.convert_to_numpy(v.value) for v in backbone.weights}
    for part in ("attention/query/kernel", "attention_norm/scale", "mlp/down/kernel"):
        for place in ("block_1", "encoder_block_1"):
            assert np.array_equal(ours[f"{place}/{part}"], theirs[f"block_1/{part}"])
    assert np.array_equal(ours["block_1/cross_attention/value/kernel"], theirs["block_1/attention/value/kernel"])
    assert np.array_equal(ours["block_0/cross_attention_norm/scale"], theirs["block_0/attention_norm/scale"])
    assert np.array_equal(ours["encoder_final_norm/scale"], theirs["final_norm/scale"])
    if not shared:
        assert np.array_equal(ours["encoder_token_embedding/embeddings"], theirs["token_embedding/embeddings"])


@pytest.mark.plain
def test_a_checkpoint_whose_heads_do_not_divide_is_refused(make_backbone, tmp_path):
    import json

    keras_llama.LlamaCausalLM(make_backbone()).save_to_preset(tmp_path / "decoder")
    path = tmp_path / "decoder" / "config.json"
    assert keras_llama.LlamaSeq2SeqBackbone.from_decoder(tmp_path / "decoder").config.num_query_heads == 4
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_key_value_heads": 3}))
    with pytest.raises(ValueError, match=r"config.json: `num_query_heads` must be divisible by `num_key_value_heads`"):
        keras_llama.LlamaSeq2SeqBackbone.from_decoder(tmp_path / "decoder")


BAD = {
    "causal": ({"causal": False}, "`causal` must be True"),
    "num_encoder_layers": ({"num_encoder_layers": 0}, "`num_encoder_layers` must be a positive integer"),
    "share_embeddings": ({"share_embeddings": 2}, "`share_embeddings` must be True or False"),
    "heads": ({"num_key_value_heads": 3}, "must be divisible"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD)
def test_refuses_bad_arguments(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        keras_llama.LlamaSeq2SeqBackbone(**{"vocabulary_size": 60, **TINY, **changes})


@pytest.mark.plain
def test_refuses_targets_that_do_not_belong_to_sources(make, inputs):
    fewer = {name: value[:1] if name.startswith("decoder") else value for name, value in inputs.items()}
    with pytest.raises(ValueError, match=r"as many targets as sources.*targets=1, sources=2"):
        make()(fewer)


def test_refuses_an_encoder_decoder_as_decoder_and_a_cache_that_does_not_fit(make, inputs):
    backbone = make()
    with pytest.raises(ValueError, match="decoder-only"):
        keras_llama.LlamaSeq2SeqBackbone.from_decoder(backbone)
    pairs = kv_cache.make(backbone.config, 2, 4)
    encoded = backbone.encode(inputs["encoder_token_ids"], inputs["encoder_padding_mask"])
    with pytest.raises(ValueError, match="must fit into the cache"):
        backbone.decode(np.ones((2, 1)), np.ones((2, 4)), encoded, inputs["encoder_padding_mask"], pairs, 4)
