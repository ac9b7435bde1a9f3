"""The one table of weights: our path | Hugging Face's name | GGUF's | KerasHub's | how the arrays differ.

The Hugging Face layout is the common tongue: every format hands over and takes its tensors under
these names, kernels as (out, in). Shapes: D hidden, N heads, H head_dim.
"""

import dataclasses
import re

import numpy as np

from keras_llama.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor; `{i}` stands for the block's number.

    Attributes:
        ours: path of the variable in a model.
        hf: name in Hugging Face checkpoints, without the prefix of the base model.
        gguf: name in GGUF files of the architecture "llama", `None` if they have none.
        kerashub: path of the variable in KerasHub's LLaMA backbones, `None` if they have none.
        transposed: whether ours is (in, out) where theirs is (out, in).
        rotated: "query" or "key" where GGUF and llama2.c store the rows of a head in another order.
    """

    ours: str
    hf: str
    gguf: str | None = None
    kerashub: str | None = None
    transposed: bool = False
    rotated: str | None = None


def _scale(ours: str, hf: str, gguf: str, kerashub: str) -> Row:
    return Row(
        f"block_{{i}}/{ours}/scale",
        f"layers.{{i}}.{hf}.weight",
        f"blk.{{i}}.{gguf}.weight",
        f"transformer_layer_{{i}}/{kerashub}/scale",
    )


def _projection(ours: str, hf: str, gguf: str, kerashub: str, rotated: str | None = None) -> list[Row]:
    ours, hf, gguf = f"block_{{i}}/{ours}", f"layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}"
    kernel = f"transformer_layer_{{i}}/{kerashub}/kernel"
    return [
        Row(f"{ours}/kernel", f"{hf}.weight", f"{gguf}.weight", kernel, transposed=True, rotated=rotated),
        Row(f"{ours}/bias", f"{hf}.bias", f"{gguf}.bias", rotated=rotated),
    ]


def _cross_attention() -> list[Row]:
    """What a decoder that attends to an encoder has beside; no other format knows it."""
    block, layer = "block_{i}/cross_attention", "layers.{i}.cross_attn"
    rows = [Row(f"{block}_norm/scale", "layers.{i}.cross_attention_layernorm.weight")]
    for ours, hf in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("attention_output", "o_proj")):
        rows.append(Row(f"{block}/{ours}/kernel", f"{layer}.{hf}.weight", transposed=True))
        rows.append(Row(f"{block}/{ours}/bias", f"{layer}.{hf}.bias"))
    return rows


TABLE = [
    Row("token_embedding/embeddings", "embed_tokens.weight", "token_embd.weight", "token_embedding/embeddings"),
    *(
        Row(f"ngram_embedding/{ours}", f"embed_ngrams.{hf}")
        for ours, hf in (("embeddings", "weight"), ("codes", "codes"), ("characters", "characters"))
    ),  # ours alone
    _scale("attention_norm", "input_layernorm", "attn_norm", "self_attention_layernorm"),
    *_projection("attention/query", "self_attn.q_proj", "attn_q", "self_attention/query", rotated="query"),
    *_projection("attention/key", "self_attn.k_proj", "attn_k", "self_attention/key", rotated="key"),
    *_projection("attention/value", "self_attn.v_proj", "attn_v", "self_attention/value"),
    *_projection("attention/attention_output", "self_attn.o_proj", "attn_output", "self_attention/attention_output"),
    _scale("mlp_norm", "post_attention_layernorm", "ffn_norm", "feedforward_layernorm"),
    *_projection("mlp/gate", "mlp.gate_proj", "ffn_gate", "feedforward_gate_dense"),
    *_projection("mlp/up", "mlp.up_proj", "ffn_up", "feedforward_intermediate_dense"),
    *_projection("mlp/down", "mlp.down_proj", "ffn_down", "feedforward_output_dense"),
    *_cross_attention(),
    Row("final_norm/scale", "norm.weight", "output_norm.weight", "sequence_output_layernorm/scale"),
    Row("lm_head/kernel", "lm_head.weight", "output.weight", "token_embedding/reverse_embeddings", transposed=True),
    Row("score/kernel", "score.weight", transposed=True),
    Row("qa_outputs/kernel", "qa_outputs.weight", transposed=True),
    Row("qa_outputs/bias", "qa_outputs.bias"),
    Row("question_overlap/kernel", "question_overlap.weight", transposed=True),  # ours alone
    *(  # as LLaVA calls them
        Row(f"projector/linear_{i}/kernel", f"multi_modal_projector.linear_{i}.weight", transposed=True) for i in (1, 2)
    ),
    Row("projector/positions/embeddings", "multi_modal_projector.positions.weight"),
]
# An encoder-decoder is ours alone: its decoder has the names above, its encoder the same with a prefix.
TABLE += [
    Row(f"encoder_{row.ours}", f"encoder.{row.hf}", transposed=row.transposed)
    for row in TABLE
    if row.ours.startswith(("token_embedding/", "block_{i}/", "final_norm/")) and "cross" not in row.ours
]
# Tensors that belong to a task, not to the backbone.
HEADS = ("lm_head.", "score.", "qa_outputs.", "question_overlap.", "multi_modal_projector.")
# Derived from the configuration; old checkpoints carry it.
IGNORED = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

_BY_OURS, _BY_HF, _BY_GGUF, _BY_KERASHUB = (
    {getattr(row, column): row for row in TABLE} for column in ("ours", "hf", "gguf", "kerashub")
)


def _find(rows: dict, name: str) -> tuple[Row, str] | None:
    """The row of a name and the number of its block ("" outside the blocks)."""
    number = re.search(r"(?<=block_)\d+|(?<=layers\.)\d+|(?<=blk\.)\d+|(?<=transformer_layer_)\d+", name)
    generic = name if number is None else f"{name[: number.start()]}{{i}}{name[number.end() :]}"
    row = rows.get(generic)
    return None if row is None else (row, "" if number is None else number.group())


def from_ours(path: str) -> tuple[Row, str]:
    """The row of our variable and its Hugging Face name, for example of `block_0/mlp/up/kernel`.

    >>> from_ours("block_3/mlp/up/kernel")[1]
    'layers.3.mlp.up_proj.weight'
    """
    found = _find(_BY_OURS, path)
    if found is None:
        raise KeyError(path)
    return found[0], found[0].hf.replace("{i}", found[1])


def block_of(name: str) -> int:
    """The number of the block of a Hugging Face name; -1 outside the blocks.

    >>> block_of("layers.3.mlp.up_proj.weight"), block_of("norm.weight")
    (3, -1)
    """
    number = re.match(r"layers\.(\d+)\.", name)
    return int(number[1]) if number else -1


def hf_to_gguf(name: str) -> tuple[Row, str | None]:
    """The row of a Hugging Face name and its GGUF name, `None` if GGUF has none."""
    found = _find(_BY_HF, name)
    if found is None:
        raise KeyError(name)
    row, number = found
    return row, None if row.gguf is None else row.gguf.replace("{i}", number)


def gguf_to_hf(name: str) -> tuple[Row, str] | None:
    """The row of a GGUF name and its Hugging Face name; `None` for a name outside the table."""
    found = _find(_BY_GGUF, name)
    return None if found is None else (found[0], found[0].hf.replace("{i}", found[1]))


def kerashub_to_hf(path: str) -> tuple[Row, str] | None:
    """The row of a variable of a KerasHub backbone and its Hugging Face name; `None` if the table has none."""
    found = _find(_BY_KERASHUB, path)
    return None if found is None else (found[0], found[0].hf.replace("{i}", found[1]))


def interleave(array: np.ndarray, row: Row, config: LlamaConfig) -> np.ndarray:
    """Hugging Face's order of a rotated tensor's rows -> GGUF's and llama2.c's; others unchanged.

    Hugging Face turns feature i with i + H/2, the others i with i + 1: within each head the rows
    (half, pair) become (pair, half). The heads are those of the queries, or of the keys.
    """
    return _swap(array, row, config, 2, -1)


def deinterleave(array: np.ndarray, row: Row, config: LlamaConfig) -> np.ndarray:
    """The inverse of `interleave`."""
    return _swap(array, row, config, -1, 2)


def _swap(array: np.ndarray, row: Row, config: LlamaConfig, first: int, second: int) -> np.ndarray:
    if row.rotated is None:
        return array
    heads = config.num_query_heads if row.rotated == "query" else config.num_key_value_heads
    halves = array.reshape(heads, first, second, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
