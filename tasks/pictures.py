"""Images with captions, drawn here or of a file and a folder of images; and how captions are scored."""

import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tasks.common import DataError
from tasks.data import _lines

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 220, 50),
    "purple": (130, 50, 170),
    "orange": (245, 140, 30),
    "cyan": (60, 200, 220),
    "black": (20, 20, 20),
}
# Corners of each shape in a square from -1 to 1; `None` is a circle.
SHAPES: dict[str, list[tuple[float, float]] | None] = {
    "circle": None,
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "cross": [
        (x * a, y * b) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1)) for a, b in ((0.3, 1), (0.3, 0.3), (1, 0.3))
    ],
    "star": [(r * np.sin(i * np.pi / 5), -r * np.cos(i * np.pi / 5)) for i in range(10) for r in [0.4 if i % 2 else 1]],
}
SIZES = {"small": 5, "medium": 8, "large": 11}  # pixels from the middle to the edge
PLACES = {
    "at the top left": (0, 0),
    "at the top": (1, 0),
    "at the top right": (2, 0),
    "on the left": (0, 1),
    "in the middle": (1, 1),
    "on the right": (2, 1),
    "at the bottom left": (0, 2),
    "at the bottom": (1, 2),
    "at the bottom right": (2, 2),
}
SIDE = 64
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')  # as CSV has it; others begin and end with a quotation mark, too


class Picture(NamedTuple):
    """An image with one of its captions.

    Attributes:
        key: what tells images apart: the name that a file has in the folder, or the combination of a drawing.
        caption: in words.
        image: a path, or a PIL image.
    """

    key: str
    caption: str
    image: Any


def shapes(variants: int) -> list[Picture]:
    """Each combination of shape, colour, size and place, drawn so many times, always the same.

    Of one combination middle, shade and background differ from drawing to drawing.
    """
    generator = np.random.default_rng(0)
    pictures = []
    for size, colour, shape, place in itertools.product(SIZES, COLOURS, SHAPES, PLACES):
        caption = f"a {size} {colour} {shape} {place}"
        pictures += [Picture(caption, caption, _drawn(generator, size, colour, shape, place)) for _ in range(variants)]
    return pictures


def _drawn(generator, size, colour, shape, place):
    from PIL import Image, ImageDraw

    zoom = 4  # drawn larger and made smaller, so that edges are smooth
    background = tuple(generator.integers(170, 240, 3).tolist())
    image = Image.new("RGB", (SIDE * zoom, SIDE * zoom), background)
    middle = (np.array(PLACES[place]) * 2 + 1) * SIDE / 6 + generator.uniform(-1, 1, 2)
    shade = tuple(np.clip(np.array(COLOURS[colour]) + generator.integers(-15, 16), 0, 255).tolist())
    radius, corners = SIZES[size] * zoom, SHAPES[shape]
    x, y = middle * zoom
    if corners is None:
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    else:
        ImageDraw.Draw(image).polygon([(x + a * radius, y + b * radius) for a, b in corners], fill=shade)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def captions_file(path: str, folder: str | None, skip_missing: bool = False) -> list[Picture]:
    """The rows of a file with the header `image,caption`; a caption may hold commas, quoted or not.

    Args:
        path: of the file.
        folder: of the images; "images" beside the file unless given.
        skip_missing: leave rows out whose image is missing, and say how many, instead of refusing the file.

    Raises:
        DataError: naming file and line.
    """
    images = pathlib.Path(folder) if folder else pathlib.Path(path).parent / "images"
    lines = _lines(path)
    if not lines or lines[0].strip() != "image,caption":
        raise DataError(f"{path}:1: expected the header image,caption. Received: {lines[:1]}.")
    pictures, missing = [], 0
    for number, line in enumerate(lines[1:], 2):
        name, _, caption = (part.strip() for part in line.partition(","))
        if quoted := _QUOTED.fullmatch(caption):
            caption = quoted[1].replace('""', '"').strip()
        if not name or not caption:
            raise DataError(f"{path}:{number}: expected image,caption. Received: {line!r}.")
        file = images / name
        if file.is_file():
            pictures.append(Picture(pathlib.PurePath(name).as_posix(), caption, str(file)))
        elif skip_missing:
            missing += 1
        else:
            raise DataError(f"{path}:{number}: there is no image {file}. --skip-missing leaves such rows out.")
    if missing:
        print(f"{path}: {missing} of {missing + len(pictures)} rows left out, whose image is missing")
    if not pictures:
        raise DataError(f"{path}: expected at least one row with an image in {images}.")
    return pictures


def split(pictures: list[Picture], listed: Sequence[str]) -> list[list[Picture]]:
    """Those whose image each of these files names, one a line, as the data do, with or without its ending.

    Raises:
        DataError: for a file that names none, or one that an earlier file names.
    """
    parts: list[list[Picture]] = []
    places: dict[str, int] = {}
    for number, file in enumerate(listed):
        names = {pathlib.PurePath(line.strip()).as_posix() for line in _lines(file)}
        parts.append([picture for picture in pictures if {picture.key, _without_ending(picture.key)} & names])
        if not parts[-1]:
            raise DataError(f"{file}: expected names of images, one a line. Received: none that --data has.")
        for picture in parts[-1]:
            other = places.setdefault(picture.key, number)
            if other != number:
                raise DataError(
                    f"{file}: expected no image of another part. Received: {picture.key}, of {listed[other]}, too."
                )
    return parts


def _without_ending(name: str) -> str:
    return pathlib.PurePath(name).with_suffix("").as_posix()


def read(pictures: list[Picture], size: tuple[int, int]) -> list[Picture]:
    """The same with pixels uint8 (h, w, 3) for images, one array for all captions of an image."""
    from keras_llama.images import distinct_images

    found, numbers = distinct_images([picture.image for picture in pictures], size)
    return [picture._replace(image=found[i]) for picture, i in zip(pictures, numbers, strict=True)]


def by_image(pictures: list[Picture]) -> tuple[np.ndarray, list[list[str]]]:
    """Of pictures that are read each image once, uint8 (B, h, w, 3), and all its captions."""
    found: dict[int, tuple[np.ndarray, list[str]]] = {}
    for picture in pictures:
        found.setdefault(id(picture.image), (picture.image, []))[1].append(picture.caption)
    images, captions = zip(*found.values(), strict=True)
    return np.stack(images), list(captions)


def files(images: np.ndarray, folder: pathlib.Path) -> list[str]:
    """Paths of PNG files of these images, which a server reads whatever the kind of the file that they came from."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = [str((folder / f"{i}.png").resolve()) for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def words(text: str) -> str:
    """A text as BLEU and CIDEr count it: lower case, no punctuation, words and Chinese characters apart by spaces."""
    return " ".join(re.findall(r"[㐀-鿿]|[^\W㐀-鿿]+", text.lower()))


def scores(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU-4, CIDEr-D and the share of captions that are one of their references, each times 100."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    found = {i: [words(caption)] for i, caption in enumerate(captions)}
    truth = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    exact = np.mean([found[i][0] in truth[i] for i in found])
    bleu, cider = Bleu(4).compute_score(truth, found, verbose=0)[0][3], Cider().compute_score(truth, found)[0]
    return {name: 100 * float(x) for name, x in {"bleu": bleu, "cider": cider, "exact_match": exact}.items()}
