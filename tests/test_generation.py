"""The token loop: the ids of Transformers' `generate`, alone and in batches; stops, beams, compilations."""

import warnings
from collections import Counter

import keras
import numpy as np
import pytest
import reference
import torch

import keras_llama
from keras_llama import backend, generation
from keras_llama import cache as kv_cache
from keras_llama.backend import packing
from keras_llama.projections import KernelCopies
from keras_llama.samplers import Settings

PROMPTS = [np.random.default_rng(n).integers(1, 61, n).tolist() for n in (3, 9, 14)]


@pytest.fixture(scope="module")
def models():
    return reference.pair()


def theirs(model, prompts, new, **options):
    """Transformers' continuations, without what follows the first stop token."""
    stops = options.get("eos_token_id") or []
    length = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), length), int)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :], mask[i, length - len(prompt) :] = prompt, 1
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    rows = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)[:, length:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), new) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def ours(lm, prompts, new, **options):
    found = lm.generate(prompts, new, strip_prompt=True, **options)
    return [ids[mask > 0].tolist() for ids, mask in zip(*found.values(), strict=True)]


@pytest.mark.parametrize("stops", [None, [7], [7, 9, 11, 44]])
@pytest.mark.parametrize("beams", [1, 4])
def test_ids_are_those_of_transformers(models, stops, beams):
    reference_model, lm = models
    expected = theirs(reference_model, PROMPTS, 20, num_beams=beams, eos_token_id=stops)
    assert ours(lm, PROMPTS, 20, num_beams=beams, stop_token_ids=stops) == expected
    if stops and len(stops) > 1:
        assert min(map(len, expected)) < 20  # a stop token was met


@pytest.mark.parametrize("length_penalty", [0.0, 3.0])
def test_a_length_penalty_is_transformers(models, length_penalty):
    reference_model, lm = models
    stops = [7, 9, 11, 44]
    options = {"num_beams": 4, "length_penalty": length_penalty}
    expected = theirs(reference_model, PROMPTS, 20, eos_token_id=stops, **options)
    assert ours(lm, PROMPTS, 20, stop_token_ids=stops, **options) == expected


def test_a_prompt_alone_is_as_in_a_batch(models):
    _, lm = models
    together = ours(lm, PROMPTS, 12)
    assert [ours(lm, [prompt], 12)[0] for prompt in PROMPTS] == together
    assert [ours(lm, [prompt], 12, batch_size=1)[0] for prompt in PROMPTS] == together


def test_padding_on_either_side_changes_nothing(models):
    _, lm = models
    ids, mask = np.zeros((2, 3, 16), "int32")
    for i, prompt in enumerate(PROMPTS):
        ids[i, : len(prompt)], mask[i, : len(prompt)] = prompt, 1
    right = ours(lm, {"token_ids": ids, "padding_mask": mask}, 12)
    left = ours(lm, {"token_ids": ids[:, ::-1], "padding_mask": mask[:, ::-1]}, 12)
    assert right == ours(lm, PROMPTS, 12)
    assert left == ours(lm, [prompt[::-1] for prompt in PROMPTS], 12)


def test_without_a_cache_the_ids_are_the_same(models):
    """Each token from a whole forward over the text so far."""
    _, lm = models
    start = len(PROMPTS[1])
    ids = np.array([[*PROMPTS[1], *[0] * 10]], "int32")  # one length: JAX compiles each operation for each length
    for end in range(start, start + 10):
        mask = (np.arange(start + 10)[None] < end).astype("int32")
        logits = keras.ops.convert_to_numpy(lm({"token_ids": ids, "padding_mask": mask}))
        ids[0, end] = logits[0, end - 1].argmax()
    assert ours(lm, [PROMPTS[1]], 10)[0] == ids[0, start:].tolist()


def test_a_repetition_penalty_is_transformers(models):
    reference_model, lm = models
    for beams in (1, 3):
        expected = theirs(reference_model, [PROMPTS[1]], 15, repetition_penalty=1.4, num_beams=beams)
        assert ours(lm, [PROMPTS[1]], 15, repetition_penalty=1.4, num_beams=beams) == expected


def test_one_prompt_of_one_token_generates_one_token(models):
    reference_model, lm = models
    assert ours(lm, [[5]], 1) == theirs(reference_model, [[5]], 1)
    assert ours(lm, [[5]], 1, num_beams=4) == theirs(reference_model, [[5]], 1, num_beams=4)


def test_the_seed_decides_what_is_sampled(models):
    _, lm = models
    options = {"temperature": 1.5, "top_k": 30}
    first = ours(lm, PROMPTS, 12, seed=1, **options)
    assert ours(lm, PROMPTS, 12, seed=1, **options) == first
    assert ours(lm, PROMPTS, 12, seed=1, batch_size=1, **options) == first
    assert ours(lm, PROMPTS, 12, seed=2, **options) != first
    assert ours(lm, PROMPTS, 12, **options) != ours(lm, PROMPTS, 12, **options)
    keras.utils.set_random_seed(3)
    drawn = ours(lm, PROMPTS, 12, **options)
    keras.utils.set_random_seed(3)
    assert ours(lm, PROMPTS, 12, **options) == drawn


@pytest.mark.xla
def test_a_seed_gives_the_same_ids_on_every_backend(make_backbone):
    lm = keras_llama.LlamaCausalLM(make_backbone(tie_word_embeddings=True))
    found = ours(lm, [[5, 8, 2]], 10, temperature=1.0, top_k=20, top_p=0.9, seed=7)
    assert found == [[59, 31, 24, 55, 44, 59, 59, 46, 10, 24]]


def test_no_setting_and_few_lengths_compile_anew(models):
    _, lm = models
    rng = np.random.default_rng(0)
    for length in (1, 9, 17, 25, 33):  # one of each bucket up to 50
        lm.generate([rng.integers(1, 61, length).tolist()], 5)
    traces = lm._loop.traces
    assert traces > 0
    for length in range(1, 49):
        prompt = [rng.integers(1, 61, length).tolist()]
        options = {"temperature": length / 50, "top_p": 1 - length / 100, "top_k": length, "seed": length}
        options["stop"] = ("auto", None, 5, [5, 6, 7])[length % 4]
        lm.generate(prompt, 1 + length % 8, min_p=0.01, repetition_penalty=1 + length / 50, **options)
    assert lm._loop.traces == traces


def test_a_beam_search_is_one_loop_that_no_setting_compiles_anew(models, monkeypatch):
    _, lm = models
    run, counts = backend.CompiledLoop.__call__, []

    def counted(self, state, count, *args):
        counts.append(count)
        return run(self, state, count, *args)

    monkeypatch.setattr(backend.CompiledLoop, "__call__", counted)
    ours(lm, PROMPTS, 20, num_beams=3, stop_token_ids=None)
    traces = lm._loop.traces
    other = {"length_penalty": 2.0, "repetition_penalty": 1.5}
    ours(lm, [prompt[::-1] for prompt in PROMPTS], 17, num_beams=3, stop_token_ids=None, **other)
    assert lm._loop.traces == traces
    assert counts == [19, 16]  # the first token is the prompts'


@pytest.fixture
def narrow(monkeypatch):
    """Lets arrays begin with 32 columns instead of 1,024; their columns, in the order in which they are made."""
    made = []

    def watched(function):
        def call(*args, **kwargs):
            cache = function(*args, **kwargs)
            made.append(cache[0][0].shape[2])
            return cache

        return call

    monkeypatch.setattr(generation, "_ROOM", 32)
    monkeypatch.setattr(kv_cache, "make", watched(kv_cache.make))
    monkeypatch.setattr(kv_cache, "grow", watched(kv_cache.grow))
    return made


@pytest.mark.parametrize(
    "options", [pytest.param({"top_k": 9, "temperature": 2.0, "seed": 3}, marks=pytest.mark.xla), {"num_beams": 3}]
)
def test_the_cache_grows_as_it_fills_and_changes_nothing(make_backbone, request, options):
    lm = keras_llama.LlamaCausalLM(make_backbone(tie_word_embeddings=True))
    expected = ours(lm, PROMPTS, 70, stop_token_ids=None, **options)
    made = request.getfixturevalue("narrow")
    assert ours(lm, PROMPTS, 70, stop_token_ids=None, **options) == expected
    assert made == [32, 64, 112]
    if "seed" in options:
        assert ours(lm, PROMPTS, 8, stop_token_ids=None, **options) == [row[:8] for row in expected]
        assert made[3:] == [24]


def test_arrays_grow_within_chunks_and_not_when_all_rows_are_done(make_backbone, narrow):
    lm = keras_llama.LlamaCausalLM(make_backbone(tie_word_embeddings=True))
    whole = ours(lm, PROMPTS[:1], 70, stop_token_ids=None)[0]
    assert narrow == [32, 64, 80 + 24]  # three prompt tokens in eight columns, then 96
    chunks = [ids for ids, _ in lm._loop.generate(PROMPTS[:1], 70, Settings().checked(), set(), range(1), chunk=9)]
    assert [chunk.shape[1] for chunk in chunks] == [9] * 7 + [7]
    assert np.concatenate(chunks, 1)[0].tolist() == whole
    del narrow[:]
    stop = whole[31 - 8]  # in the last of the first columns
    assert stop not in whole[: 31 - 8]
    assert ours(lm, PROMPTS[:1], 70, stop_token_ids=[stop]) == [whole[: 32 - 8]]
    assert set(narrow) <= {32}  # nothing, where that shape is compiled already


def test_the_first_token_waits_for_no_step(make_backbone):
    loop = keras_llama.LlamaCausalLM(make_backbone())._loop
    steps, next_step = [], loop._next_step
    loop._next_step = lambda *args: steps.append(1) or next_step(*args)
    pieces = loop.generate(PROMPTS, 20, Settings(temperature=0.0).checked(), set(), range(3), chunk=1)
    first, _ = next(pieces)
    assert first.shape == (3, 1)
    assert not steps
    assert sum(piece.shape[1] for piece, _ in pieces) == 19
    assert steps
    loop._kernels.make = loop._advance = None  # it may be the last token of each row
    everything = set(range(60))
    ((only, done),) = loop.generate(PROMPTS, 20, Settings().checked(), everything, range(3))
    assert only.shape == (3, 1)
    assert done.all()


def test_the_numbers_of_a_row_are_its_own_and_below_1():
    seeds = [(7, 0), (47512, 1)]  # the second has a float64 that is 1 in float32
    assert np.float32(np.random.default_rng(seeds[1]).random(500).max()) == 1
    short, long = (generation._uniforms(seeds, first, 500) for first in (8, 48))
    np.testing.assert_array_equal(short[:, 8:], long[:, 48:])
    assert short.shape == (2, 508)
    assert short.dtype == "float32"
    assert short.max() < 1


@pytest.mark.skipif(keras.config.backend() != "torch", reason="the others compile the choice")
def test_what_is_chosen_by_is_known_without_asking_the_device(models, monkeypatch):
    _, lm = models
    asked, ask = [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: asked.append(1) or ask(tensor))
    lm.generate(PROMPTS, 25, temperature=1.0, top_k=9, top_p=0.9, stop=None)
    assert len(asked) <= 2 + 24 // 8  # at the start, and whether all rows are done at every eighth step


@pytest.mark.skipif(keras.config.backend() != "torch", reason="the others compile")
def test_a_step_is_taken_down_once_for_its_shapes(make_backbone, monkeypatch):
    taken, take = [], torch.fx.experimental.proxy_tensor.make_fx
    monkeypatch.setattr(torch.fx.experimental.proxy_tensor, "make_fx", lambda f: taken.append(f) or take(f))
    lm = keras_llama.LlamaCausalLM(make_backbone())
    for length in range(2, 7):
        lm.generate([list(range(1, length))], 2 + length % 3, temperature=length / 9, top_k=length)
    assert len(taken) == 1
    lm.generate([[1, 2], [3, 4]], 4)
    assert len(taken) == 2


@pytest.mark.skipif(keras.config.backend() != "torch", reason="the others always compile")
@pytest.mark.parametrize("works", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_step_by_torch_compile_gives_the_same_ids(make_backbone, monkeypatch, works):
    lm = keras_llama.LlamaCausalLM(make_backbone())
    expected = ours(lm, PROMPTS, 40)  # by copies of kernels
    lm.compile(jit_compile=True)
    if works:
        assert ours(lm, PROMPTS, 40) == expected
        return

    def fail(*_):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(torch, "compile", lambda listed, dynamic: fail)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert ours(lm, PROMPTS, 40) == expected
    assert any("goes on without it" in str(warning.message) for warning in said)


@pytest.mark.skipif(keras.config.backend() != "torch", reason="the others have no list")
def test_a_list_of_operations_shares_and_overwrites_only_what_it_may():
    def function(x, cache, new):
        one, same = x + 1, x + 1
        changed = (x + 1).add_(5)
        return one + same, changed, backend.write(cache, new, 1), backend.write(x, new, 0)

    x, cache, new = torch.ones(2, 3), torch.zeros(2, 3), torch.full((2, 1), 9.0)
    doubled, changed, written, copied = backend.Flattened(function, [])(x, cache, new)
    assert (doubled == 4).all()
    assert (changed == 7).all()
    assert written.data_ptr() == cache.data_ptr()
    assert cache.tolist() == [[0, 9, 0]] * 2
    assert copied.tolist() == [[9, 1, 1]] * 2
    assert (x == 1).all()


@pytest.mark.skipif(keras.config.backend() != "torch", reason="the others have no list")
def test_the_list_of_a_step_has_nothing_twice_and_nothing_for_nothing():
    """Numbers that Python wrote down are one, unused results are gone, and transpositions join."""

    def function(x):
        masked = [keras.ops.where(x > 0, 1.5, -1.5) for _ in range(2)]
        keras.ops.exp(x)
        there_and_back = keras.ops.transpose(keras.ops.transpose(x, (2, 0, 1)), (1, 2, 0))
        elsewhere = keras.ops.transpose(torch.transpose(there_and_back, 0, -1), (2, 1, 0)) + 1
        return sum(masked), there_and_back, elsewhere, keras.ops.transpose(keras.ops.transpose(x, (2, 0, 1)), (0, 2, 1))

    flattened = backend.Flattened(function, [])
    x = keras.ops.convert_to_tensor(np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32"))
    for found, expected in zip(flattened(x), function(x), strict=True):
        np.testing.assert_array_equal(found, expected)
    (listed,) = flattened._lists.values()
    calls = Counter(str(node.target) for node in listed.graph.nodes if node.op.startswith("call"))
    assert calls["aten.where.self"] == 1
    assert "aten.exp.default" not in calls
    assert calls["permute"] + calls["transpose"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24)])
def test_a_packed_kernel_multiplies_as_it_did(rng, monkeypatch, dtype, shape):
    monkeypatch.setattr(packing, "_is_intel", lambda: False)
    x, kernel = (keras.ops.convert_to_tensor(rng.normal(size=s), dtype) for s in (shape, (40, 24)))
    kernel = keras.ops.transpose(kernel)
    packed = backend.packed(kernel, dtype)
    found, expected = (
        keras.ops.convert_to_numpy(keras.ops.cast(backend.multiply(x, k), "float32")) for k in (packed, kernel)
    )
    if keras.config.backend() == "torch":
        packs = {"float32": True, "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported(), "float16": False}
        assert packed.is_mkldnn == packs[dtype]  # a CPU without AVX-512 has no products of bfloat16
    else:
        assert keras.backend.standardize_dtype(packed.dtype) == "float32"
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == "float32" else 2e-2, atol=1e-5)


def model_of_random_weights(make_backbone, policy, biased):
    lm = keras_llama.LlamaCausalLM(make_backbone(dtype=policy, attention_bias=biased, mlp_bias=biased))
    generator = np.random.default_rng(3)
    for variable in lm.weights:  # biases start at 0
        variable.assign(generator.normal(0, 0.5, variable.shape))
    return lm


@pytest.mark.xla
@pytest.mark.parametrize("biased", [False, True])
def test_copies_of_kernels_give_the_same_ids(make_backbone, monkeypatch, biased):
    lm = model_of_random_weights(make_backbone, "float32", biased)
    copied, made = [], KernelCopies.make
    monkeypatch.setattr(KernelCopies, "make", lambda *args: copied.append(made(*args)) or copied[-1])
    found = {}
    for pays in (True, False):
        monkeypatch.setattr(backend, "copies_pay", lambda *_, pays=pays: pays)
        found[pays] = ours(lm, PROMPTS[:1], 20, stop=None)
    assert found[True] == found[False]
    # All groups: two of attention and two of SwiGLU in each block, and the head.
    assert [len(copies) for copies in copied] == [4 * lm.backbone.config.num_layers + 1, 0]


@pytest.mark.xla
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
def test_copies_of_kernels_are_exact_in_half_precision(make_backbone, monkeypatch, policy, biased):
    """Ids need not be the same: XLA leaves out roundings between a product and what follows it where it may."""
    ids = np.array([PROMPTS[2]], "int32")
    mask = np.ones_like(ids)

    def logits(lm, pays):
        monkeypatch.setattr(backend, "copies_pay", lambda *_: pays)
        loop = lm._loop
        copies = loop._kernels.make(1, 64)
        needed = pays or lm.backbone.dtype_policy.variable_dtype != lm.backbone.dtype_policy.compute_dtype
        assert len(copies) == (len(loop._kernels.groups) if needed else 0)

        def step(ids, copies):
            with loop._kernels.used(copies):
                return loop.step(ids, mask, kv_cache.make(lm.backbone.config, *mask.shape, loop.dtype), 0)

        return keras.ops.convert_to_numpy(backend.Compiled(step, lm.variables)(ids, copies)[0])

    lm = model_of_random_weights(make_backbone, policy, biased)
    exact_lm = model_of_random_weights(make_backbone, "float32", biased)
    for variable, half in zip(exact_lm.weights, lm.weights, strict=True):
        variable.assign(keras.ops.cast(half, "bfloat16"))
    exact = logits(exact_lm, False)
    for pays in (True, False):  # 8 bits: a dozen roundings of 0.4 % one after another
        np.testing.assert_allclose(logits(lm, pays), exact, rtol=0, atol=np.abs(exact).max() / 50)


@pytest.mark.parametrize("replaced", [False, True])
def test_new_weights_are_used(make_backbone, replaced):
    models = [keras_llama.LlamaCausalLM(make_backbone(tie_word_embeddings=True)) for _ in range(2)]
    before = ours(models[0], [[5, 8, 2]], 40)  # enough for copies of kernels
    for lm in models:
        generator = np.random.default_rng(8)
        for variable in lm.weights:
            value = generator.normal(0, 0.5, variable.shape).astype("float32")
            if replaced and keras.config.backend() == "torch":
                variable._value = torch.nn.Parameter(torch.tensor(value))
            else:
                variable.assign(value)
    changed, fresh = (ours(lm, [[5, 8, 2]], 40) for lm in models)
    assert changed == fresh != before


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_reduced_precision_generates(make_backbone, policy):
    lm = keras_llama.LlamaCausalLM(make_backbone(dtype=policy))
    assert len(ours(lm, PROMPTS, 6)[0]) == 6
    assert len(ours(lm, PROMPTS, 6, num_beams=2, stop=None)[0]) == 6
