"""Images inside a graph, as `images.read_images` has them in Python: bytes of JPEG or PNG files -> pixels.

Shapes: B images, h x w pixels.
"""

from keras_llama.images import MAX_PIXELS

_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 2**16  # bytes of a file in which its orientation is looked for: EXIF comes first
# Tag 0x0112, type 3, one value: its bytes in a file of either order; the value is behind it.
_ORIENTATION = {"little": b"\x12\x01\x03\x00\x01\x00\x00\x00", "big": b"\x01\x12\x00\x03\x00\x00\x00\x01"}


def read(files, size: tuple[int, int]):
    """Bytes of JPEG or PNG files, strings (B,) -> uint8 (B, h, w, 3).

    What is no such file, is broken, or has more than `MAX_PIXELS` pixels is TensorFlow's InvalidArgumentError.
    """
    import tensorflow as tf

    def pixels(file):
        with tf.control_dependencies([_check_size(file)]):
            # Pillow's arithmetic; the operation reads PNG files, too.
            image = tf.io.decode_jpeg(file, channels=3, dct_method="INTEGER_ACCURATE")
        image = tf.image.resize(_upright(image, _orientation(file)), size, antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    return tf.map_fn(pixels, files, fn_output_signature=tf.TensorSpec((*size, 3), tf.uint8))


def _check_size(file):
    """An assertion on what the file's header says, before anything is decoded."""
    import tensorflow as tf

    def of_png():  # width and height stand at bytes 16 to 23
        sides = tf.io.decode_raw(tf.strings.substr(tf.strings.join([file, b"\x00" * 24]), 16, 8), tf.int32, False)
        return tf.where(tf.strings.substr(file, 0, len(_PNG)) == _PNG, sides, 0)

    sides = tf.cond(tf.io.is_jpeg(file), lambda: tf.io.extract_jpeg_shape(file)[:2], of_png)
    pixels = tf.reduce_prod(tf.cast(sides, tf.int64))
    message = f"expected a JPEG or PNG image of at most {MAX_PIXELS:,} pixels"
    return tf.debugging.Assert((tf.reduce_min(sides) > 0) & (pixels <= MAX_PIXELS), [message, sides])


def _orientation(file):
    """The orientation that EXIF names, int32 from 1 to 8; 1 without EXIF."""
    import tensorflow as tf

    head = tf.cast(tf.io.decode_raw(tf.strings.substr(file, 0, _HEAD), tf.uint8), tf.int32)
    found = tf.constant(1)
    for order, tag in _ORIENTATION.items():
        places = tf.maximum(tf.size(head) - len(tag) - 1, 0)
        same = tf.reduce_all(tf.stack([head[i : places + i] == byte for i, byte in enumerate(tag)]), axis=0)
        values = tf.boolean_mask(head[len(tag) + (order == "big") :][:places], same)
        found = tf.where(tf.size(values) > 0, tf.concat([values, [1]], 0)[0], found)
    return tf.where((found >= 1) & (found <= 8), found, 1)


def _upright(image, orientation):
    """The image (h, w, 3) with one of EXIF's eight orientations taken back."""
    import tensorflow as tf

    def turned(mirrored, quarters):
        return lambda: tf.image.rot90(tf.reverse(image, [1]) if mirrored else image, quarters)

    ways = [(False, 0), (True, 0), (False, 2), (True, 2), (True, 1), (False, 3), (True, 3), (False, 1)]
    return tf.switch_case(orientation - 1, [turned(*way) for way in ways])
