"""PEFT's adapter directories: adapter_config.json and adapter_model.safetensors.

The layout is that of https://huggingface.co/docs/peft (0.21). Shapes: D in, r rank, units out.
"""

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from keras_llama.beside import written_beside
from keras_llama.checkpoints.hf import pickled, shard_tensors
from keras_llama.config import invalid

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options that change what an adapter computes: the values under which it is plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "use_qalora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    # Others, such as "pissa" and "olora", change the base, too.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class Adapter(NamedTuple):
    """An adapter as other tools know it.

    Attributes:
        rank, alpha, dropout: its settings.
        modules: Hugging Face's names without prefix, such as layers.0.self_attn.q_proj -> A (r, D) and B (units, r).
        heads: names, such as score.weight -> whole weights that were trained beside.
    """

    rank: int
    alpha: float
    dropout: float
    modules: dict[str, tuple[np.ndarray, np.ndarray]]
    heads: dict[str, np.ndarray]


def write(
    directory: str | os.PathLike, adapter: Adapter, task_type: str | None, base: str, overwrite: bool = False
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` reads; other files in it stay.

    `base` is what Transformers puts before the names of the base model's modules.

    Raises:
        ValueError: if there is an adapter already and `overwrite` is not set.
    """
    from safetensors.numpy import save_file

    path = pathlib.Path(directory)
    if path.exists() and (not path.is_dir() or (path / _CONFIG).exists()) and not overwrite:
        raise invalid("`path` must be a directory without an adapter.", "Or pass overwrite=True.", path=str(path))
    tensors = {f"{_PREFIX}{name}": array for name, array in adapter.heads.items()}
    for name, pair in adapter.modules.items():
        for kind, array in zip("AB", pair, strict=True):
            tensors[f"{_PREFIX}{base}{name}.lora_{kind}.weight"] = array
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": _targets(adapter.modules),
        "modules_to_save": sorted({name.split(".")[0] for name in adapter.heads}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
    }
    path.mkdir(parents=True, exist_ok=True)
    with written_beside(path / _TENSORS) as unfinished:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, unfinished)
    with written_beside(path / _CONFIG) as unfinished:  # last: it makes the rest an adapter
        pathlib.Path(unfinished).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(directory: str | os.PathLike) -> Adapter:
    """Reads a directory; nothing in it is run.

    Raises:
        ValueError: for a file that is missing or broken, pickled weights, or options beyond plain LoRA, by name.
    """
    path = pathlib.Path(directory)
    if not (path / _CONFIG).is_file():
        raise invalid(f"Expected a directory with {_CONFIG}.", "PEFT's save_pretrained writes one.", path=str(path))
    try:
        config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        rank, alpha, dropout = int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout") or 0)
    except (ValueError, TypeError, KeyError) as error:
        raise invalid(
            f"{path / _CONFIG}: expected JSON with `r` and `lora_alpha`.", repr(error), path=str(path)
        ) from error
    strange = {name: config[name] for name, plain in _PLAIN.items() if name in config and config[name] not in plain}
    if strange:
        raise invalid(f"{path / _CONFIG}: expected plain LoRA.", "Merge it with PEFT and load the model.", **strange)
    if not (path / _TENSORS).is_file() and list(path.glob("adapter_model.*")):
        raise pickled(path, [file.name for file in path.glob("adapter_model.*")])
    tensors = {name: tensor.read() for name, (tensor, _) in shard_tensors(path / _TENSORS).items()}
    modules: dict[str, dict[str, np.ndarray]] = {}
    heads = {}
    for name, array in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(?:model\.|transformer\.)?(.*)\.lora_([AB])\.weight", name)
        if found:
            modules.setdefault(found[1], {})[found[2]] = array
        else:
            heads[name.removeprefix(_PREFIX)] = array
    halves = sorted(name for name, pair in modules.items() if len(pair) != 2)
    if halves or not modules:
        raise invalid(
            f"{path / _TENSORS}: expected lora_A and lora_B of each module.", modules=halves or [*tensors][:9]
        )
    return Adapter(rank, alpha, dropout, {name: (pair["A"], pair["B"]) for name, pair in modules.items()}, heads)


def _targets(modules) -> list[str]:
    """`target_modules`: the last parts of the names where every block has the same, else whole names."""
    by_block: dict[str, set[str]] = {}
    for name in modules:
        block, number, kind = re.split(r"\.(\d+)\.", name, maxsplit=1)
        by_block.setdefault(f"{block}.{number}", set()).add(kind)
    kinds = list(by_block.values())
    numbers = sorted(int(block.rsplit(".", 1)[1]) for block in by_block)
    if all(kind == kinds[0] for kind in kinds) and numbers == list(range(len(numbers))):
        return sorted({kind.rsplit(".", 1)[1] for kind in kinds[0]})
    return sorted(modules)
