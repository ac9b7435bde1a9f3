"""Pictures of a training and of what came out of it."""

import contextlib
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # how matplotlib calls the collection that holds all of them
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Microsoft YaHei",
    "SimHei",
)


def training(path: str | os.PathLike, history: dict[str, Sequence[float]]) -> None:
    """A picture of each metric over the epochs, training and validation, if there is any, in one frame."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in history if f"val_{name}" in history] or list(history)
    figure, frames = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 3.5), squeeze=False)
    for frame, name in zip(frames[0], names, strict=True):
        epochs = range(1, len(history[name]) + 1)
        frame.plot(epochs, history[name], marker="o", label="training")
        if f"val_{name}" in history:
            frame.plot(epochs, history[f"val_{name}"], marker="o", label="validation")
        frame.set(xlabel="epoch", title=name)
        frame.xaxis.get_major_locator().set_params(integer=True)
        frame.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def alignment(path: str | os.PathLike, source: list[str], target: list[str], weights: np.ndarray) -> None:
    """A heat map of how much each target token looks at each source token: weights (T, S)."""
    with _figure(path, (1.5 + 0.5 * len(source), 1.5 + 0.4 * len(target))) as (frame, shown):
        frame.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        frame.set_xticks(range(len(source)), shown(source), rotation=90)
        frame.set_yticks(range(len(target)), shown(target))
        frame.set(xlabel="source", ylabel="target")


def confusion(path: str | os.PathLike, labels: list[str], counts: np.ndarray) -> None:
    """How many texts of each class (row) were taken for each class (column): counts (C, C)."""
    side = 2 + 0.6 * len(labels)
    with _figure(path, (side, side)) as (frame, shown):
        frame.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if count > counts[row].sum() / 2 else "black"
            frame.text(column, row, str(count), ha="center", va="center", color=color)
        frame.set_xticks(range(len(labels)), shown(labels), rotation=90)
        frame.set_yticks(range(len(labels)), shown(labels))
        frame.set(xlabel="predicted", ylabel="true")


def captioned(path: str | os.PathLike, images: np.ndarray, captions: list[str], references: list[str]) -> None:
    """Images (B, h, w, 3) with their captions, and what people wrote below, four in a row."""
    rows = -(-len(images) // 4)
    with _figure(path, (14, 5 * rows), (rows, 4)) as (frames, shown):
        for frame in frames.ravel()[len(images) :]:
            frame.axis("off")
        texts = zip(shown(captions), shown(references), strict=True)
        for frame, image, (caption, reference) in zip(frames.ravel(), images, texts, strict=False):
            frame.imshow(image)
            frame.set_title("\n".join(textwrap.wrap(caption, 34)) or "(nothing)", fontsize=10)
            frame.set_xlabel("\n".join(textwrap.wrap(reference, 44)), fontsize=8, color="grey")
            frame.set(xticks=[], yticks=[])


@contextlib.contextmanager
def _figure(
    path: str | os.PathLike, size: tuple[float, float], shape: tuple[int, int] = (1, 1)
) -> Iterator[tuple[Any, Any]]:
    """A frame to draw in, or an array of them, and what turns texts into ones that a font here can show.

    It is written to `path` at the end.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    listed = {font.fname for font in font_manager.fontManager.ttflist}
    for file in sorted(set(font_manager.findSystemFonts()) - listed):  # installed after matplotlib made its list
        with contextlib.suppress(Exception):  # of some formats matplotlib can read none
            font_manager.fontManager.addfont(file)
    fonts = {font.name for font in font_manager.fontManager.ttflist}
    chosen = [*[name for name in CHINESE_FONTS if name in fonts][:1], "DejaVu Sans"]
    maps = [font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in chosen]

    known = set().union(*maps)

    def escaped(letter: str) -> str:  # a box says less than a number
        return letter if ord(letter) in known else letter.encode("unicode_escape").decode()

    def shown(texts: list[str]) -> list[str]:
        return ["".join(map(escaped, text)) for text in texts]

    with matplotlib.rc_context({"font.family": chosen, "text.parse_math": False}):  # a dollar is none of TeX
        figure, frame = pyplot.subplots(*shape, figsize=size)
        yield frame, shown
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
