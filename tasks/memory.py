"""Whether the machine can hold a training, told before it begins."""

import argparse
from typing import Any

from tasks import common


def add_flag(flags: argparse.ArgumentParser) -> None:
    """The flag that `check` reads."""
    flags.add_argument("--force", action="store_true", help="train even if memory is estimated not to suffice")


def check(model: Any, args: argparse.Namespace, free: int | None = None) -> None:
    """Prints what training will take; raises a `DataError` with the largest batch size that fits if this one does not.

    Args:
        model: as it will be trained.
        args: the recipe's.
        free: bytes that are free; asked of the machine unless given. Nothing is refused where it does not tell.
    """
    import keras_llama
    from keras_llama import backend

    optimizer = common.optimizer(args.optimizer, args.learning_rate, args.weight_decay, model.head)
    free = backend.free_memory() if free is None else free

    def needed(rows):
        estimate = keras_llama.estimate_memory(model, rows, model.preprocessor.sequence_length, optimizer)
        return estimate, estimate.peak - estimate.weights  # the weights are there already

    estimate, more = needed(args.batch_size)
    print(f"Memory of training, estimated: {estimate}")
    if args.force or free is None or more <= free:
        return
    fitting, too_many = 0, args.batch_size
    while too_many - fitting > 1:
        rows = (fitting + too_many) // 2
        fitting, too_many = (rows, too_many) if needed(rows)[1] <= free else (fitting, rows)
    hint = f"--batch-size {fitting} fits" if fitting else "Not even --batch-size 1 fits: take a smaller --size, or LoRA"
    raise common.DataError(
        f"--batch-size {args.batch_size}: training would take {more / 2**30:.2f} GiB beside the weights, and "
        f"{free / 2**30:.2f} GiB are free. {hint}; --force trains anyway."
    )
