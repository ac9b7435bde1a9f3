"""Images of any kind -> arrays of one size. Shapes: B images, h x w pixels."""

import io
import os
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from PIL import Image, ImageOps

from keras_llama.config import invalid

MAX_PIXELS = 2**24  # 16 megapixels: a file of a few kilobytes may claim any number
_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


def is_image(x: Any) -> bool:
    """Whether `x` is one image: a path, the bytes of a file, a PIL image, or an array (h, w) or (h, w, C).

    >>> is_image("cat.jpg"), is_image(["cat.jpg"]), is_image(np.zeros((2, 8, 8, 3), "uint8"))
    (True, False, False)
    """
    return isinstance(x, (str, os.PathLike, bytes, Image.Image)) or (hasattr(x, "shape") and len(x.shape) in (2, 3))


def read_images(images: Any, size: tuple[int, int], argument: str = "images") -> np.ndarray:
    """Images -> uint8 (B, h, w, 3), RGB, each resized to `size` whatever its shape: nothing is cut, proportions change.

    Grey-scale, palette and CMYK become RGB, of 16 bits the upper 8 are taken, transparency is dropped, and the
    orientation that EXIF names is given back. Resizing is bilinear, over all pixels that a new one covers, in float32,
    rounded: the SavedModel computes the same (`export.graph_images`).

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
    if is_image(images) or not (isinstance(images, (list, tuple)) or hasattr(images, "shape")):
        hint = "Put a single image into a list."
        raise invalid(f"`{argument}` must be a list of images or an array (B, h, w, C).", hint, type=type(images))
    if not len(images):
        raise invalid(f"`{argument}` must hold at least one image.", images=len(images))
    if isinstance(images, np.ndarray) and images.dtype == "uint8" and images.shape[1:] == (*size, 3):
        return images
    rows = np.empty((len(images), *size, 3), "uint8")
    known: dict[Any, int] = {}
    for i, image in enumerate(images):
        key = image if isinstance(image, (str, os.PathLike, bytes)) else i
        first = known.setdefault(key, i)
        rows[i] = rows[first] if first < i else _read_image(image, size, f"{argument}[{i}]")
    return rows


def _read_image(source: Any, size: tuple[int, int], place: str) -> np.ndarray:
    """One image as uint8 (h, w, 3)."""
    if isinstance(source, (str, os.PathLike)):
        place = os.fspath(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = _opened(source, place)
        if image.width * image.height > MAX_PIXELS:
            raise invalid(
                f"{place}: expected an image of at most {MAX_PIXELS:,} pixels.",
                "Make it smaller: it is resized anyway.",
                pixels=image.width * image.height,
            )
        return _resized(_rgb(ImageOps.exif_transpose(image)), size)
    except Image.DecompressionBombError as error:
        raise invalid(f"{place}: expected an image of at most {MAX_PIXELS:,} pixels.", str(error)) from error
    except (OSError, SyntaxError, EOFError) as error:  # Pillow calls a broken file any of these
        raise invalid(f"{place}: expected an image.", "Is the file whole?", error=str(error)) from error


def _opened(source: Any, place: str) -> Image.Image:
    """An image whose pixels may not be decoded yet."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (str, os.PathLike)):
        return Image.open(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
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
