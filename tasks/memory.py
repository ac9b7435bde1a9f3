"""Whether the machine can hold a training, told before it begins."""

import argparse
from typing import Any

from tasks import common


def add_flag(flags: argparse.ArgumentParser) -> None:
    """The flag that `check` reads."""
    flags.add_argument("--force", action="store_true", help="train even if memory is estimated not to suffice")


def check(
    model: Any,
    args: argparse.Namespace,
    free: int | None = None,
    best: bool = False,
    trained: int = 0,
    kept: int = 0,
) -> None:
    """Prints what training will take; raises a `DataError` with the largest batch size that fits if this one does not.

    Args:
        model: as it will be trained.
        args: the recipe's.
        free: bytes that are free; asked of the machine unless given. Nothing is refused where it does not tell.
        best: whether the weights of the best epoch are kept, as `EarlyStopping` does.
        trained: models like this one that are trained before, each of which keeps its optimiser's state.
        kept: bytes of hidden states that are computed once and kept.
    """
    import keras_llama
    from keras_llama import backend

    optimizer = common.optimizer(args.optimizer, args.learning_rate, args.weight_decay, model.head)
    free = backend.free_memory() if free is None else free

    def estimated(rows):
        return keras_llama.estimate_memory(model, rows, model.preprocessor.sequence_length, optimizer)

    estimate = estimated(args.batch_size)
    held = trained * estimate.optimizer
    if not backend.has_gpu():  # beside one they are in the machine's memory
        held += kept + best * estimate.weights

    def needed(estimate):
        return estimate.peak - estimate.weights + held  # the weights are there already

    more = needed(estimate)
    parts = "the best epoch, models trained before and hidden states"
    beside = f"; beside it {held / 2**20:.0f} MiB of {parts}" if held else ""
    print(f"Memory of training, estimated: {estimate}{beside}")
    if args.force or free is None or more <= free:
        return
    fitting, too_many = 0, args.batch_size
    while too_many - fitting > 1:
        rows = (fitting + too_many) // 2
        fitting, too_many = (rows, too_many) if needed(estimated(rows)) <= free else (fitting, rows)
    smaller = f"take a smaller --size, {'fewer rows (--limit), ' if kept else ''}or LoRA"
    hint = f"--batch-size {fitting} fits" if fitting else f"Not even --batch-size 1 fits: {smaller}"
    raise common.DataError(
        f"--batch-size {args.batch_size}: training would take {more / 2**30:.2f} GiB beside the weights, and "
        f"{free / 2**30:.2f} GiB are free. {hint}; --force trains anyway."
    )
