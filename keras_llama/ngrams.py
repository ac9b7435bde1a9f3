"""NgramEmbedding: vectors of characters, pairs and triples, beside those of tokens. Shapes: B, T, D as ever."""

import keras
import numpy as np
from keras import ops

from keras_llama.config import invalid
from keras_llama.layers import embedding_initializer, register

SIZES = (1, 2, 3)
_PRIME = 16_777_619  # of the hash of Fowler, Noll and Vo, http://www.isthe.com/chongo/tech/comp/fnv/


def codes(characters, padding_mask):
    """A number for the n characters that end at each, n = 1, 2 and 3: int32 (B, T, 3).

    Where fewer stand before it in its segment, those missing count as -1: none reaches into another text.
    """
    ids, segments = ops.cast(characters, "int32"), ops.cast(padding_mask, "int32")
    # int32 goes round at 2 ** 31 on every backend.
    code = ids * _PRIME + 1
    found = [code]
    for before in range(1, max(SIZES)):
        widths = [[0, 0], [before, 0]]
        earlier, of_segment = (ops.pad(x, widths)[:, : ops.shape(ids)[1]] for x in (ids + 1, segments))
        code = code * _PRIME + ops.where(ops.equal(of_segment, segments), earlier, 0)
        found.append(code)
    return ops.stack(found, axis=-1)


def frequent(rows, characters=None, least=3):
    """The `codes` of what texts hold at least `least` times: int32 (list,), in order.

    Args:
        rows: token ids of each text.
        characters: which id stands for the character of each token, int32 (V,); itself unless given.
        least: a number of times.

    >>> len(frequent([[5, 6, 7], [5, 6]], least=2))  # 5, 6 and 5 6, and that 5 begins a text
    6
    """
    ids = np.concatenate([np.asarray(row, "int32") for row in rows])[None]  # one row, in which each text is a segment
    ids = ids if characters is None else np.asarray(characters)[ids]
    segments = np.repeat(np.arange(len(rows), dtype="int32"), [len(row) for row in rows])[None]
    found, counts = np.unique(ops.convert_to_numpy(codes(ids, segments)), return_counts=True)
    return found[counts >= least]


@register
class NgramEmbedding(keras.layers.Layer):
    """Token ids (B, T), padding mask (B, T) -> the sum of the vectors of what ends at each token, (B, T, D).

    A token stands for a character; that character, the pair and the triple that end in it each have a vector, if they
    are on the list that `know` takes. (Joulin et al., 2017, https://arxiv.org/abs/1607.01759, let n-grams share
    vectors by hash; what training has hardly seen is noise, though, and here it has none.)

    Args:
        vocabulary_size: V, number of token ids.
        length: of the list.
        width: D.
        dropout: rate on each vector while training, apart from the others.

    Raises:
        ValueError: if `length` is not positive.

    >>> listed = frequent([[5, 6, 7], [5, 6]], least=2)
    >>> ngrams = NgramEmbedding(vocabulary_size=9, length=len(listed), width=8)
    >>> ngrams.know(listed)
    >>> tuple(ngrams(np.array([[5, 6, 7]]), np.ones((1, 3))).shape)
    (1, 3, 8)
    """

    def __init__(self, *, vocabulary_size, length, width, dropout=0.0, **kwargs):
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise invalid("`length` must be a positive integer.", length=length)
        super().__init__(**{**kwargs, "autocast": False})
        self.vocabulary_size, self.length, self.width = vocabulary_size, length, width
        self.dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy, name="dropout")

    def build(self, *shapes):
        small = embedding_initializer(0.1 * self.width**-0.5)  # what training never sees stays noise
        self.embeddings = self.add_weight(name="embeddings", shape=(self.length, self.width), initializer=small)
        fixed = {"dtype": "int32", "trainable": False}
        self.codes = self.add_weight(name="codes", shape=(self.length,), initializer="zeros", **fixed)
        self.characters = self.add_weight(
            name="characters", shape=(self.vocabulary_size,), initializer=_counting, **fixed
        )
        self.built = True

    def know(self, listed, characters=None):
        """Takes the list of `frequent`, in any order, and which id stands for the character of each token, (V,)."""
        if not self.built:
            self.build()
        self.codes.assign(np.sort(listed))
        self.characters.assign(np.arange(self.vocabulary_size) if characters is None else characters)

    def call(self, token_ids, padding_mask, training=None):
        characters = ops.take(ops.convert_to_tensor(self.characters), token_ids, axis=0)
        wanted, table = codes(characters, padding_mask), ops.convert_to_tensor(self.codes)
        place = ops.zeros_like(wanted)
        for i in reversed(range(self.length.bit_length())):  # the last entry that is no larger
            further = ops.minimum(place + (1 << i), self.length - 1)
            place = ops.where(ops.take(table, further) <= wanted, further, place)
        listed = ops.cast(ops.equal(ops.take(table, place), wanted), self.compute_dtype)
        vectors = ops.cast(ops.take(ops.convert_to_tensor(self.embeddings), place, axis=0), self.compute_dtype)
        return ops.sum(self.dropout(vectors * ops.expand_dims(listed, -1), training=training), axis=2)

    def get_config(self):
        own = {"vocabulary_size": self.vocabulary_size, "length": self.length, "width": self.width}
        return {**super().get_config(), **own, "dropout": self.dropout.rate}


def _counting(shape, dtype=None):
    """0, 1, 2 ..., (V,)."""
    return ops.arange(shape[0], dtype=dtype)
