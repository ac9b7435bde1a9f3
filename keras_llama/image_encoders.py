"""Small image encoders of plain Keras layers, and the projector behind any encoder.

An image encoder is a Keras model: pixels from 0 to 255, (B, h, w, 3), -> features (B, h', w', C) or (B, P, C).
Shapes: B images, h x w pixels, P patches, C features, D hidden_dim of the decoder.
"""

import math
from collections.abc import Sequence

import keras
from keras import ops

from keras_llama import backend
from keras_llama.config import invalid
from keras_llama.layers import embedding_initializer, kernel_initializer, register


def convolutional_encoder(image_size: int = 64, widths: Sequence[int] = (32, 64, 128, 128), name="image_encoder"):
    """n convolutions of stride 2 with batch normalisation: (B, h, w, 3) -> (B, h / 2**n, w / 2**n, C).

    Args:
        image_size: h and w, a multiple of 2**n.
        widths: channels of the n convolutions; the last is C.

    Raises:
        ValueError: if the convolutions do not divide the image.

    >>> convolutional_encoder(32, (8, 16)).output_shape
    (None, 8, 8, 16)
    """
    if image_size % 2 ** len(widths):
        raise invalid(f"`image_size` must be a multiple of {2 ** len(widths)}.", image_size=image_size)
    layers: list = [keras.Input((image_size, image_size, 3)), keras.layers.Rescaling(1 / 127.5, -1)]
    for i, width in enumerate(widths):
        layers += [
            keras.layers.Conv2D(width, 3 if i else 5, strides=2, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),  # Keras' 0.99 is for trainings of many thousand steps
            keras.layers.Activation("relu"),
        ]
    return keras.Sequential(layers, name=name)


def vit_encoder(
    image_size: int = 64,
    patch_size: int = 8,
    width: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    dropout: float = 0.0,
    name="image_encoder",
):
    """A vision transformer (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929): (B, h, w, 3) -> (B, P, C).

    Args:
        image_size: h and w, a multiple of `patch_size`.
        patch_size: side of a patch, of which there are P = (image_size / patch_size) ** 2.
        width: C, a multiple of `num_heads`.
        num_layers, num_heads: of the blocks, whose MLP is 4 C wide.
        dropout: rate on each sub-layer's output while training.

    Raises:
        ValueError: if the patches do not divide the image, or the heads the width.

    >>> vit_encoder(32, 8, width=16, num_layers=1, num_heads=2).output_shape
    (None, 16, 16)
    """
    if image_size % patch_size or width % num_heads:
        raise invalid(
            "`image_size` must be a multiple of `patch_size`, and `width` of `num_heads`.",
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            num_heads=num_heads,
        )
    layers = keras.layers
    pixels = keras.Input((image_size, image_size, 3))
    x = layers.Conv2D(width, patch_size, strides=patch_size)(layers.Rescaling(1 / 127.5, -1)(pixels))
    x = LearnedPositions()(layers.Reshape((-1, width))(x))
    for _ in range(num_layers):
        normed = layers.LayerNormalization(epsilon=1e-6)(x)
        x += layers.Dropout(dropout)(layers.MultiHeadAttention(num_heads, width // num_heads)(normed, normed))
        hidden = layers.Dense(4 * width, "gelu")(layers.LayerNormalization(epsilon=1e-6)(x))
        x += layers.Dropout(dropout)(layers.Dense(width)(hidden))
    return keras.Model(pixels, layers.LayerNormalization(epsilon=1e-6)(x), name=name)


def check_encoder(image_encoder) -> tuple[tuple[int, int], int]:
    """The size (h, w) that an image encoder reads, and P; a `ValueError` unless both are fixed."""
    if not isinstance(image_encoder, keras.Model):
        raise invalid(
            "`image_encoder` must be a Keras model of images.",
            "For example keras_llama.convolutional_encoder().",
            image_encoder=image_encoder,
        )
    # A model that is not built yet has neither.
    taken, given = ([x.shape for x in getattr(image_encoder, side, ())] for side in ("inputs", "outputs"))
    good = len(taken) == len(given) == 1 and len(taken[0]) == 4 and len(given[0]) in (3, 4)
    if not good or None in (*taken[0][1:], *given[0][1:]) or taken[0][3] != 3:
        raise invalid(
            "`image_encoder` must make features (B, h', w', C) or (B, P, C) of images (B, h, w, 3), all sizes fixed.",
            "Build it without its head, with an input shape: keras.Sequential([keras.Input((224, 224, 3)), encoder]).",
            inputs=taken,
            outputs=given,
        )
    return taken[0][1:3], math.prod(given[0][1:-1])


def keep_frozen(layer) -> None:
    """Freezes what stands in a frozen layer: a file names a layer's `trainable`, not that of those it builds itself."""
    if not layer.trainable:
        layer.trainable = True  # TensorFlow takes no notice of a value that is there already
        layer.trainable = False
        return
    for part in getattr(layer, "layers", ()):
        keep_frozen(part)


@register
class LearnedPositions(keras.layers.Layer):
    """Adds a trained vector to each of P places: (B, P, C) -> (B, P, C).

    >>> tuple(LearnedPositions()(np.ones((2, 4, 8), "float32")).shape)
    (2, 4, 8)
    """

    def build(self, x_shape):
        self.embeddings = self.add_weight(shape=x_shape[1:], initializer=embedding_initializer(), name="embeddings")

    def call(self, x):
        return x + ops.cast(self.embeddings, x.dtype)


@register
class ImageProjector(keras.layers.Layer):
    """Features of images (B, h', w', C) or (B, P, C) -> embeddings (B, P, D), a map's rows one after another.

    Two layers, as LLaVA 1.5 (Liu et al., 2023, https://arxiv.org/abs/2310.03744) has them, on features of norm 1,
    for encoders give any scale, and a trained vector for each place.

    Args:
        width: D.

    >>> tuple(ImageProjector(6)(np.ones((2, 4, 4, 8), "float32")).shape)
    (2, 16, 6)
    """

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        # Beside a frozen decoder the projector is still trained.
        options = {"use_bias": False, "dtype": backend.with_float32_weights(self.dtype_policy)}
        self.linear_1, self.linear_2 = (
            keras.layers.Dense(width, kernel_initializer=kernel_initializer(), name=name, **options)
            for name in ("linear_1", "linear_2")
        )
        self.positions = LearnedPositions(dtype=options["dtype"], name="positions")

    def build(self, features_shape):
        places = math.prod(features_shape[1:-1])
        self.linear_1.build((None, places, features_shape[-1]))
        for layer in (self.linear_2, self.positions):
            layer.build((None, places, self.width))
        self.built = True

    def call(self, features):
        x = ops.reshape(features, (-1, math.prod(features.shape[1:-1]), features.shape[-1]))
        x = ops.rms_normalization(ops.cast(x, "float32"), axis=-1)
        x = backend.silu(self.linear_1(ops.cast(x, self.compute_dtype)))
        return self.positions(self.linear_2(x))

    def get_config(self):
        return {**super().get_config(), "width": self.width}
