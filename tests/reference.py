"""Tiny random Transformers models, their weights in our layout, and gradients on the running backend."""

import keras
import numpy as np
import torch
import transformers

import keras_llama

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def _rope(kind, theta=10_000.0, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **options}}


# Each varies one field of BASE; the texts are longer than the original length of every scaling.
CONFIGS = {
    "base": {},
    "heads_all_kv": {"num_key_value_heads": 4},
    "heads_one_kv": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 12},
    "epsilon": {"rms_norm_eps": 1e-6},
    "epsilon_large": {"rms_norm_eps": 0.5},
    "theta": _rope("default", 500_000.0),
    "linear": _rope("linear", factor=4.0),
    "llama3": _rope("llama3", **LLAMA3),
    "yarn": _rope("yarn", **YARN),
    "yarn_attention_factor": _rope("yarn", **YARN, attention_factor=0.7, beta_fast=16, beta_slow=2),
    "yarn_mscale": _rope("yarn", **YARN, mscale=0.9, mscale_all_dim=0.5, truncate=False),
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "layers": {"num_hidden_layers": 1},
}


def hf_config(**changes):
    return transformers.LlamaConfig(**{**BASE, **changes})


def randomize(model):
    """Gives every weight of a torch model a value that matters to the result."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.2
            weight.copy_(noise + 1 if "norm" in name else noise)
    return model.eval()


def our_config(config):
    """The arguments of `LlamaBackbone` for a Transformers configuration."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_dim": config.hidden_size,
        "intermediate_dim": config.intermediate_size,
        "head_dim": config.head_dim,
        "rope_max_wavelength": theta,
        "rope_scaling": rope,
        "layer_norm_epsilon": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


_RENAMED = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/attention_output",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
}
_TOP = {
    "embed_tokens.weight": "token_embedding/embeddings",
    "norm.weight": "final_norm/scale",
    "lm_head.weight": "lm_head/kernel",
    "score.weight": "score/kernel",
    "qa_outputs.weight": "qa_outputs/kernel",
    "qa_outputs.bias": "qa_outputs/bias",
}


def our_path(name):
    """The path of our variable for a Transformers parameter, and whether its value is transposed."""
    name = name.removeprefix("model.").removeprefix("transformer.")
    if name in _TOP:
        return _TOP[name], _TOP[name].endswith("/kernel")
    _, index, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    leaf = "bias" if kind == "bias" else "scale" if "norm" in module else "kernel"
    return f"block_{index}/{_RENAMED[module]}/{leaf}", leaf == "kernel"


def in_our_layout(values):
    """{Transformers name: torch tensor} -> {our path: array}."""
    ours = {}
    for name, value in values.items():
        path, transposed = our_path(name)
        array = value.detach().cpu().numpy()
        ours[path] = array.T if transposed else array
    return ours


def copy_weights(reference, model):
    """Copies every parameter of a Transformers model into ours; both must be used up."""
    values = in_our_layout(dict(reference.named_parameters()))
    variables = {variable.path: variable for variable in model.variables}
    assert set(values) == set(variables), set(values) ^ set(variables)
    for path, variable in variables.items():
        variable.assign(values[path])


def pair(**changes):
    """A random `LlamaForCausalLM` and a `LlamaCausalLM` with its weights."""
    reference = randomize(transformers.LlamaForCausalLM(hf_config(**changes)))
    ours = keras_llama.LlamaCausalLM(keras_llama.LlamaBackbone(**our_config(reference.config)))
    copy_weights(reference, ours)
    return reference, ours


def positions(padding_mask):
    """Transformers' `position_ids` for padding on either side."""
    return torch.tensor(np.maximum(np.cumsum(padding_mask, axis=1) - 1, 0))


def gradients(model, inputs, loss):
    """The loss and {path: gradient} of `loss(outputs)` for every trainable weight, on the running backend."""
    backend, variables = keras.config.backend(), model.trainable_variables
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(model(inputs))
        found = tape.gradient(value, [variable.value for variable in variables])
        found = [tf.convert_to_tensor(gradient) for gradient in found]  # embeddings come as slices
    elif backend == "jax":
        import jax

        def of_weights(weights):
            outputs, _ = model.stateless_call(weights, model.non_trainable_variables, inputs)
            return loss(outputs)

        value, found = jax.jit(jax.value_and_grad(of_weights))([variable.value for variable in variables])
    else:
        for variable in variables:
            variable.value.grad = None
        value = loss(model(inputs))
        value.backward()
        found = [variable.value.grad for variable in variables]
    to_numpy = keras.ops.convert_to_numpy
    return float(to_numpy(value)), {v.path: to_numpy(g) for v, g in zip(variables, found, strict=True)}
