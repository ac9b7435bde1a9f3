"""What the recipes share: flags, splits, the optimiser, and the report."""

import argparse
import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "auto")
JIT: dict[str, bool | str] = {"on": True, "off": False, "auto": "auto"}
OPTIMIZERS = ("adamw", "muon")
TRAINABLE = ("all", "lora", "head")
SPLIT_SEED = 0  # the split never changes with --seed, so that scores can be compared
# Flags of which --preset has its own: any preset, and a .keras file, which is taken as it was saved.
OF_SCRATCH = (
    "size", "vocabulary_size", "ngram_count", "split_ideographs", "tokenizer", "tied", "encoder_layers", "dropout",
    "embedding_dropout",
)  # fmt: skip
OF_CHECKPOINTS = ("preset_layers", "precision", "head_dropout")


class DataError(ValueError):
    """Bad data or a bad argument; a recipe prints it and leaves with exit code 2."""


class Flags(argparse.ArgumentParser):
    """A parser whose result names in `asked` the flags that the command line has, whatever their values."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found = super().parse_args(args, namespace)
        given = super().parse_args(args, argparse.Namespace(**dict.fromkeys(vars(found))))  # which takes no defaults
        found.asked = [name for name, value in vars(given).items() if value is not None]
        return found


def parser(task: str, description: str, files: str | None = None, **defaults: Any) -> Flags:
    """The flags that every recipe takes; with `files="+"` data may be several files."""
    flags = Flags(prog=f"python -m tasks.{task}", description=description)
    flags.add_argument("--data", nargs=files, help="training data; see the formats in docs/tasks.md")
    flags.add_argument("--test-data", nargs=files, help="test data; without it, a share of the data by distinct text")
    flags.add_argument("--preset", help="start from a saved .keras model or a checkpoint instead of from scratch")
    flags.add_argument("--preset-layers", type=positive, help="take so many of the first blocks of --preset alone")
    flags.add_argument("--trainable", choices=TRAINABLE, default=TRAINABLE[0], help="of --preset; docs/tasks.md")
    flags.add_argument("--lora-rank", type=positive, default=8)
    flags.add_argument("--lora-targets", default="all-linear", help="attention, all-linear or a regular expression")
    flags.add_argument("--size", help="size of the blocks, 0.1m ... 1b, tiny, small, base")
    flags.add_argument("--epochs", type=positive)
    flags.add_argument("--batch-size", type=positive)
    flags.add_argument("--learning-rate", type=above_zero)
    flags.add_argument("--optimizer", choices=OPTIMIZERS, default=OPTIMIZERS[0])
    flags.add_argument("--precision", choices=PRECISIONS, default="float32")
    flags.add_argument("--jit", choices=JIT, default="auto")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--limit", type=positive, help="use this many rows only, for a quick trial")
    flags.add_argument("--output-dir", default=f"saved_models/{task}")
    flags.add_argument("--profile", action="store_true", help="write a trace of a few steps to OUTPUT_DIR/profile")
    flags.add_argument("--report", help="where to write the JSON report; default OUTPUT_DIR/metrics.json")
    flags.set_defaults(**defaults)
    return flags


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, received {text}")
    return value


def flag(name: str) -> str:
    """A flag as it is written: `preset_layers` -> `--preset-layers`."""
    return f"--{name.replace('_', '-')}"


def natural(text: str) -> int:
    """An integer of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, received {text}")
    return value


def above_zero(text: str) -> float:
    """A number above 0, for argparse."""
    return _number(text, 0 < float(text) < math.inf, "must be a number above 0")


def not_negative(text: str) -> float:
    """A number of at least 0, for argparse."""
    return _number(text, 0 <= float(text) < math.inf, "must be a number of at least 0")


def share(text: str) -> float:
    """A number from 0 to below 1, for argparse."""
    return _number(text, 0 <= float(text) < 1, "must lie in [0, 1)")


def exponent(text: str) -> float:
    """A number that `length_penalty` may be, for argparse."""
    return _number(text, -9 < float(text) < 9, "must lie in (-9, 9)")


def _number(text: str, good: bool, expected: str) -> float:
    if not good:
        raise argparse.ArgumentTypeError(f"{expected}, received {text}")
    return float(text)


def prepare_output(args: argparse.Namespace, *more: str | None) -> None:
    """Makes the places that results, in --report and `more` files, and the state of --resume go to, before training."""
    files = [pathlib.Path(file) for file in (args.report, *more) if file]
    folders = [pathlib.Path(folder) for folder in (args.output_dir, getattr(args, "resume", None)) if folder]
    for path in (*folders, *(file.parent for file in files)):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be made a directory ({error.strerror}).") from error
    for file in files:
        if file.is_dir():
            raise DataError(f"{file}: expected a file to write to. Received: a directory.")


def prepare_backend(args: argparse.Namespace) -> None:
    """Settles what --precision and --jit leave open and prints it; before the first computation."""
    import keras_llama
    from keras_llama import backend

    keras_llama.set_memory_growth()
    if is_file(args.preset):
        leave(args, "precision")
    if args.precision == "auto":
        args.precision = backend.fastest_precision()
    precision = args.precision or f"the precision of {args.preset}"
    compiled = "compiled" if backend.resolve_jit(JIT[args.jit]) else "not compiled"
    print(f"{backend.name()} on {', '.join(backend.devices())}: {precision}, training steps {compiled}")


def split(rows: list, held: float) -> tuple[list, list]:
    """Two parts of `rows`, the second with `held` distinct texts, a share or a number; equal texts stay together."""
    texts = sorted({row[0] for row in rows})
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
    first = int(len(texts) * (1 - held)) if held < 1 else len(texts) - int(held)
    chosen = {texts[i] for i in order[first:]}
    return [row for row in rows if row[0] not in chosen], [row for row in rows if row[0] in chosen]


def sample(rows: list, limit: int | None) -> list:
    """All rows, or `limit` of them, always the same ones."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(SPLIT_SEED).permutation(len(rows))[:limit]
    return [rows[i] for i in sorted(chosen)]


def write_report(path: str | os.PathLike, report: dict[str, Any]) -> None:
    """Writes the report as JSON, beside and then renamed."""
    from keras_llama.beside import written_beside

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as unfinished:
        unfinished.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def optimizer(name: str, rate: Any, weight_decay: float, head: str, adam_lr_ratio: float = 2.0) -> Any:
    """One of `OPTIMIZERS`, gradients clipped; Muon leaves vectors, embeddings and layer `head` to AdamW.

    `adam_lr_ratio` times `rate` is the rate of that AdamW.
    """
    import keras

    if name == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=weight_decay, global_clipnorm=1.0)
    adam = {"adam_weight_decay": weight_decay, "adam_lr_ratio": adam_lr_ratio, "adam_beta_2": 0.98}
    return keras.optimizers.Muon(
        rate, **adam, weight_decay=weight_decay, ns_steps=3, exclude_layers=[head], global_clipnorm=1.0
    )


def compile_options(model: Any, args: argparse.Namespace, rows: int, epochs: int | None = None) -> dict[str, Any]:
    """`--optimizer` with a warm-up over a tenth of the steps and a cosine decay, and `--jit`, for `compile`."""
    import keras

    steps = (epochs or args.epochs) * -(-rows // args.batch_size)
    warming = max(1, steps // 10)
    rate = keras.optimizers.schedules.CosineDecay(
        args.learning_rate / (warming + 1),  # not 0, by which the first step, and so a single one, would change nothing
        decay_steps=max(1, steps - warming),  # counted from the end of the warm-up
        alpha=0.05,
        warmup_target=args.learning_rate,
        warmup_steps=warming,
    )
    return {
        "optimizer": optimizer(args.optimizer, rate, args.weight_decay, model.head),
        "jit_compile": JIT[args.jit],
    }


def is_file(preset: str | None) -> bool:
    """Whether a preset is a model in a .keras file, in place of a checkpoint."""
    return (preset or "").endswith(".keras")


def leave(args: argparse.Namespace, *names: str) -> None:
    """What was not asked for of these flags is left, as `None`, as --preset has it."""
    vars(args).update({name: None for name in names if name not in args.asked})


def kept(args: argparse.Namespace, *names: str, why: str | None = None) -> None:
    """Refuses what was asked for of these flags: it would change nothing. Of the others no value remains."""
    if asked := [flag(name) for name in names if name in args.asked]:
        raise DataError(f"Leave out {', '.join(asked)}: {why or f'--preset {args.preset} has its own'}.")
    leave(args, *(name for name in names if name in vars(args)))


def settle(args: argparse.Namespace, model: Any, *names: str, own: bool = True) -> None:
    """Makes these flags and attributes of the model one: what was asked for counts, else what the model has.

    With `own=False` it has none yet, and the flags' defaults count.
    """
    for name in names:
        if own and name not in args.asked:
            setattr(args, name, getattr(model, name))
        else:
            setattr(model, name, getattr(args, name))


def from_preset(args: argparse.Namespace, cls: Any, read: tuple[str, ...] = (), **options: Any) -> Any:
    """The task of `--preset`: as a recipe saved it in a .keras file, or from a checkpoint with `options`.

    What was asked for and cannot be had of it is refused, but for the flags that the recipe will `read`. What was not
    asked for is in `args` afterwards as the model has it.
    """
    file = is_file(args.preset)
    kept(args, *(name for name in (*OF_SCRATCH, *(OF_CHECKPOINTS if file else ())) if name not in read))
    model = _saved(args, cls) if file else _opened(args, cls, options)
    if model.preprocessor is None:
        raise DataError(f"--preset {args.preset}: expected a model with a tokenizer.")
    args.sequence_length = model.preprocessor.sequence_length
    args.precision = model.dtype_policy.name
    return model


def _saved(args: argparse.Namespace, cls: Any) -> Any:
    """The model of a .keras file, for texts as long as is asked for."""
    import keras

    import keras_llama

    try:
        model = keras.saving.load_model(args.preset)
    except (OSError, ValueError) as error:
        raise DataError(f"--preset {args.preset}: cannot be loaded ({error}).") from error
    if not isinstance(model, cls):
        raise DataError(f"--preset {args.preset}: expected a {cls.__name__}. Received: a {type(model).__name__}.")
    text, context = model.preprocessor, model.backbone.config.context_length
    if text and "sequence_length" in args.asked:
        length = args.sequence_length
        before = model.prompt_tokens - 1  # in front of a text, as an image's patches
        if context and before + length > context:
            raise DataError(
                f"--sequence-length must be at most the model's context of {context} tokens"
                f"{f', {before} of them taken' if before else ''}. Received: {length}."
            )
        model.preprocessor = keras_llama.TextPreprocessor(text.tokenizer, length, text.add_bos, text.add_eos)
    return model


def _opened(args: argparse.Namespace, cls: Any, options: dict[str, Any]) -> Any:
    """The model of a checkpoint; a length that was not asked for gives way to its context."""
    from keras_llama.checkpoints.presets import open_checkpoint

    length = args.sequence_length
    if length and "sequence_length" not in args.asked:
        length = min(length, open_checkpoint(args.preset).config.context_length or length)
    options |= {"dtype": args.precision, "sequence_length": length, "num_layers": args.preset_layers}
    return cls.from_preset(args.preset, **options)


@contextlib.contextmanager
def told(flags: argparse.ArgumentParser) -> Iterator[None]:
    """What only the run shows to be wrong with data, or a disk that is full, ends with a line and code 2, too."""
    try:
        yield
    except (DataError, OSError) as error:
        flags.error(str(error))


def profiled(args: argparse.Namespace, number: int = 0) -> contextlib.AbstractContextManager[list]:
    """The callbacks of --profile for the `fit` of the first model; none for the others and without it."""
    if number or not args.profile:
        return contextlib.nullcontext([])
    from tasks import profiling  # starts Keras

    return profiling.profiled(pathlib.Path(args.output_dir, "profile"))


def fit(args: argparse.Namespace, model: Any, name: str, *data: Any, **options: Any) -> Any:
    """`fit` or `fit_head` that keeps its state in the directory `name` of --resume, and goes on from what is there."""
    train = model.fit_head if args.trainable == "head" else model.fit
    if not args.resume:
        return train(*data, **options)
    try:
        return train(*data, resume=pathlib.Path(args.resume, name), **options)
    except ValueError as error:
        raise DataError(f"--resume {args.resume}: {error}") from error


def choose_trainable(model: Any, args: argparse.Namespace) -> None:
    """What of the model of --preset is trained, as --trainable says."""
    if args.trainable != "all" and not args.preset:
        raise DataError(f"--trainable {args.trainable} needs --preset: it trains little of a model trained before.")
    if args.preset_layers and not args.preset:
        raise DataError("--preset-layers needs --preset: blocks of a model trained before. See --size for a new one.")
    if args.trainable != "lora":
        if model.adapters or model.quantized:
            raise DataError(f"--preset {args.preset}: is adapted or quantised, which takes --trainable lora.")
        kept(args, "lora_rank", "lora_targets", why=f"--trainable {args.trainable} has no adapters")
    if args.trainable == "head":
        try:
            model.freeze_base()
        except ValueError as error:
            raise DataError(f"--trainable head: {error}") from error
    elif args.trainable == "all":
        model.unfreeze_base()
    elif not model.adapters:
        model.enable_lora(args.lora_rank, targets=args.lora_targets)
    elif model.active_adapter is None:
        raise DataError(f"--preset {args.preset}: has {[*model.adapters]}, none in use. Save it after `set_adapter`.")
    else:  # which goes on
        kept(args, "lora_rank", "lora_targets")
