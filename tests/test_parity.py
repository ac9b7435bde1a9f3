"""The same numbers as Transformers: hidden states, logits, loss and gradients, each field varied on its own."""

import keras
import numpy as np
import pytest
import reference
import torch
from keras import ops

from keras_llama.losses import TokenCrossentropy
from keras_llama.preprocessing import next_token_targets

LAYER, MODEL = 1e-5, 1e-4  # largest absolute difference in float32


@pytest.fixture(scope="module", params=list(reference.CONFIGS))
def models(request):
    return reference.pair(**reference.CONFIGS[request.param])


@pytest.fixture(params=["none", "left", "right"])
def inputs(request):
    """40 tokens, longer than the 16 that the scaled configurations were made for, padded or not."""
    ids = np.random.default_rng(3).integers(1, 61, (2, 40)).astype("int32")
    mask = np.ones_like(ids)
    if request.param != "none":
        mask[1, :7] = 0
        mask = mask if request.param == "left" else mask[:, ::-1].copy()
    return {"token_ids": ids, "padding_mask": mask}


def hf_inputs(inputs):
    return {
        "input_ids": torch.tensor(inputs["token_ids"], dtype=torch.long),
        "attention_mask": torch.tensor(inputs["padding_mask"]),
        "position_ids": reference.positions(inputs["padding_mask"]),
    }


def assert_near(ours, theirs, mask, tolerance):
    ours, theirs = ops.convert_to_numpy(ours), theirs.detach().numpy()
    assert np.abs(ours - theirs)[mask > 0].max() <= tolerance


def test_hidden_states_and_logits(models, inputs):
    theirs, ours = models
    mask = inputs["padding_mask"]
    with torch.no_grad():
        answer = theirs(**hf_inputs(inputs), output_hidden_states=True)
    assert_near(ours.backbone(inputs), answer.hidden_states[-1], mask, MODEL)
    assert_near(ours(inputs), answer.logits, mask, MODEL)


def test_each_block(models, inputs):
    """Every block on the input that the reference gives its own."""
    theirs, ours = models
    mask = inputs["padding_mask"]
    states = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: states.append((args[0], out))) for layer in theirs.model.layers
    ]
    with torch.no_grad():
        theirs(**hf_inputs(inputs))
    for hook in hooks:
        hook.remove()
    angles = ours.backbone.get_layer("positions")(inputs["token_ids"], mask)
    for block, (before, after) in zip(ours.backbone.blocks, states, strict=True):
        found, _ = block(ops.convert_to_tensor(before.numpy()), *angles)
        assert_near(found, after, mask, LAYER)


def test_loss_and_gradients(models):
    theirs, ours = models
    ids = np.random.default_rng(4).integers(1, 61, (2, 24)).astype("int32")
    mask = np.ones_like(ids)
    mask[1, 15:] = 0
    inputs = {"token_ids": ids, "padding_mask": mask}
    theirs.zero_grad()
    labels = torch.tensor(np.where(mask > 0, ids, -100), dtype=torch.long)
    expected = theirs(**hf_inputs(inputs), labels=labels).loss
    expected.backward()
    wanted = reference.in_our_layout({name: weight.grad for name, weight in theirs.named_parameters()})
    targets, weights = next_token_targets(ids, mask)
    value, found = reference.gradients(ours, inputs, lambda logits: TokenCrossentropy()(targets, logits, weights))
    assert abs(value - expected.item()) <= LAYER
    assert set(found) == set(wanted)
    worst = {path: np.abs(found[path] - wanted[path]).max() for path in wanted}
    assert max(worst.values()) <= LAYER, worst
    assert all(np.abs(value).max() > 100 * LAYER for value in wanted.values())  # the comparison can fail


def test_classifier_logits_as_transformers():
    """`LlamaForSequenceClassification` finds the last token by its pad id: no real token equals it here."""
    import transformers

    import keras_llama

    config = reference.hf_config(num_labels=3, pad_token_id=0)
    theirs = reference.randomize(transformers.LlamaForSequenceClassification(config))
    backbone = keras_llama.LlamaBackbone(**reference.our_config(config))
    ours = keras_llama.LlamaTextClassifier(backbone, num_classes=3)
    reference.copy_weights(theirs, ours)
    ids = np.random.default_rng(5).integers(1, 61, (3, 20)).astype("int32")
    mask = np.ones_like(ids)
    mask[1, 13:] = 0
    mask[2, :6] = 0
    ids = ids * mask
    inputs = {"token_ids": ids, "padding_mask": mask}
    with torch.no_grad():
        expected = theirs(**hf_inputs(inputs)).logits.numpy()
    assert np.abs(keras.ops.convert_to_numpy(ours(inputs)) - expected).max() <= MODEL


@pytest.mark.parametrize("changes", ["base", "heads_one_kv", "head_dim", "llama3", "attention_bias"])
def test_question_answering_logits_as_transformers(inputs, changes):
    import transformers

    import keras_llama

    config = reference.hf_config(**reference.CONFIGS[changes])
    theirs = reference.randomize(transformers.LlamaForQuestionAnswering(config))
    ours = keras_llama.LlamaQuestionAnswering(keras_llama.LlamaBackbone(**reference.our_config(config)))
    reference.copy_weights(theirs, ours)
    with torch.no_grad():
        answer = theirs(**hf_inputs(inputs))
    expected = torch.stack([answer.start_logits, answer.end_logits], dim=-1)
    assert_near(ours(inputs), expected, inputs["padding_mask"], MODEL)
