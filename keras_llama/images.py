"""Images of any kind -> arrays of one size. Shapes: B images, h x w pixels."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from PIL import ExifTags, Image

from keras_llama.config import invalid

MAX_PIXELS = 2**24  # 16 megapixels: a file of a few kilobytes may claim any number
_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# What Pillow raises of a broken file, and of one that it cannot turn into RGB: it has no exception of its own for them.
_UNREADABLE = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
# What takes each orientation of EXIF back.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image(x: Any) -> bool:
    """Whether `x` is one image: a path, the bytes of a file, a PIL image, or an array (h, w) or (h, w, C).

    >>> is_image("cat.jpg"), is_image(["cat.jpg"]), is_image(np.zeros((2, 8, 8, 3), "uint8"))
    (True, False, False)
    """
    return isinstance(x, (str, os.PathLike, bytes, Image.Image)) or (hasattr(x, "shape") and len(x.shape) in (2, 3))


def read_images(images: Any, size: tuple[int, int], argument: str = "images") -> np.ndarray:
    """Images -> uint8 (B, h, w, 3), RGB, each resized to `size` whatever its shape: nothing is cut, proportions change.

    Grey-scale, palette and CMYK become RGB, of 16 bits the upper 8 are taken, transparency is dropped, and the
    orientation that EXIF names is given back; what XMP says of it counts for nothing. Resizing is bilinear, over all
    pixels that a new one covers, in float32, rounded: the SavedModel computes the same (`export.graph_images`).

    Args:
        images: a list of paths, bytes of files, PIL images, and uint8 arrays (h, w), (h, w, 1), (h, w, 3) or
            (h, w, 4), of any sizes; or an array uint8 (B, h, w, C). What stands in a list twice is read once.
        size: h and w of the result.
        argument: what errors call them.

    Raises:
        ValueError: for what is no image, is broken or has more than `MAX_PIXELS` pixels, naming the file or the place
            in the list; the last before it is decoded.

    >>> read_images([np.zeros((30, 20), "uint8"), np.zeros((1, 1, 4), "uint8")], (8, 8)).shape
    (2, 8, 8, 3)
    """
    found, numbers = distinct_images(images, size, argument)
    return found if isinstance(found, np.ndarray) else np.stack([found[i] for i in numbers])


def distinct_images(
    images: Any, size: tuple[int, int], argument: str = "images"
) -> tuple[Sequence[np.ndarray] | np.ndarray, np.ndarray]:
    """Images as `read_images` has them, each held once however often it stands there, and which is at each place (B,).

    >>> found, numbers = distinct_images([np.zeros((2, 2), "uint8")] * 3, (8, 8))
    >>> len(found), numbers.tolist()
    (1, [0, 0, 0])
    """
    if is_image(images) or not (isinstance(images, (list, tuple)) or hasattr(images, "shape")):
        hint = "Put a single image into a list."
        raise invalid(f"`{argument}` must be a list of images or an array (B, h, w, C).", hint, type=type(images))
    if not len(images):
        raise invalid(f"`{argument}` must hold at least one image.", images=len(images))
    if isinstance(images, np.ndarray) and images.dtype == "uint8" and images.shape[1:] == (*size, 3):
        return images, np.arange(len(images))
    found: list[np.ndarray] = []
    known: dict[Any, int] = {}
    numbers = []
    images = list(images)  # holds what an array gives out, whose ids would be used again
    for i, image in enumerate(images):
        key = image if isinstance(image, (str, os.PathLike, bytes)) else id(image)
        numbers.append(known.setdefault(key, len(found)))
        if numbers[-1] == len(found):
            found.append(_read_image(image, size, f"{argument}[{i}]"))
    return found, np.array(numbers)


def _read_image(source: Any, size: tuple[int, int], place: str) -> np.ndarray:
    """One image as uint8 (h, w, 3); an array that is one already as it is."""
    if isinstance(source, (str, os.PathLike, bytes)):
        place = place if isinstance(source, bytes) else os.fspath(source)
        with _told(place):
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with opened:  # Pillow closes no file by itself that may hold more images
            return _pixels(opened, size, place)
    if isinstance(source, Image.Image):
        return _pixels(source, size, place)
    image = _of_array(source, place)
    whole = isinstance(source, np.ndarray) and source.shape == (*size, 3)
    return source if whole else _pixels(image, size, place)


def _pixels(image: Image.Image, size: tuple[int, int], place: str) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise invalid(
            f"{place}: expected an image of at most {MAX_PIXELS:,} pixels.",
            "Make it smaller: it is resized anyway.",
            pixels=image.width * image.height,
        )
    with _told(place):
        return _resized(_rgb(_upright(image)), size)


@contextlib.contextmanager
def _told(place: str) -> Iterator[None]:
    """Makes a `ValueError` with the name of the image of what Pillow raises of one that it cannot read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            yield
    except Image.DecompressionBombError as error:
        raise invalid(f"{place}: expected an image of at most {MAX_PIXELS:,} pixels.", str(error)) from error
    except _UNREADABLE as error:
        hint = "Is the file whole? Else save it anew, as JPEG or PNG."
        raise invalid(f"{place}: expected an image.", hint, error=str(error)) from error


def _of_array(source: Any, place: str) -> Image.Image:
    array = np.asarray(source)
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if array.dtype != "uint8" or channels not in _CHANNELS or not array.size:
        raise invalid(
            f"{place}: expected a path, bytes, a PIL image, or an array uint8 (h, w) or (h, w, C), C being 1, 3 or 4.",
            "Values go from 0 to 255." if array.dtype != "uint8" else "",
            type=type(source).__name__,
            shape=array.shape,
            dtype=str(array.dtype),
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _upright(image: Image.Image) -> Image.Image:
    """The image with the orientation that its EXIF names taken back; as it is where that cannot be read."""
    image.load()  # a PNG file may have its EXIF behind the pixels
    exif, number = Image.Exif(), 1
    with contextlib.suppress(*_UNREADABLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exif.load(image.info.get("exif", b""))
        number = exif.get(ExifTags.Base.Orientation, 1)
    return image.transpose(_TURNS[number]) if number in _TURNS else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip
        image = Image.fromarray((np.asarray(image).astype("uint32") >> 8).astype("uint8"))
    if "transparency" in image.info:  # of a palette, whose colours Pillow would warn of
        image = image.convert("RGBA")
    return image.convert("RGB")


def _resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """As `tf.image.resize` with `antialias=True`; Pillow itself would round between rows and columns."""
    height, width = size
    bands: Sequence[Image.Image] = image.split()
    if (image.height, image.width) != size:
        bands = [band.convert("F").resize((width, height), Image.Resampling.BILINEAR) for band in bands]
    return _to_bytes(np.stack([np.asarray(band) for band in bands], axis=-1))


def augment(layers: Sequence[Any], batch: tuple, seed: Sequence[int]) -> tuple:
    """A batch whose `images`, uint8 (B, h, w, 3), went through Keras layers as in training.

    Args:
        layers: from images to images, such as `keras.layers.RandomFlip`; their random states are drawn from `seed`.
        batch: inputs, and what else there is.
        seed: integers.

    Raises:
        ValueError: if the images come out in another size.
    """
    inputs, *rest = batch
    generator = np.random.default_rng(seed)
    changed = keras.ops.cast(inputs["images"], "float32")
    for layer in layers:
        for state in layer.variables:
            state.assign(generator.integers(2**31, size=state.shape))
        changed = layer(changed, training=True)
    images = _to_bytes(keras.ops.convert_to_numpy(changed))
    if images.shape != inputs["images"].shape:
        raise invalid(
            "The layers of augmentation must give images of the size that they take.",
            "Let a keras.layers.Resizing follow a crop.",
            size=images.shape[1:3],
            expected=inputs["images"].shape[1:3],
        )
    return {**inputs, "images": images}, *rest


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype("uint8")
