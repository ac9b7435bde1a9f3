"""NgramEmbedding: vectors of pairs and triples of tokens, beside those of single tokens. Shapes: B, T, D as ever."""

import keras
from keras import ops

from keras_llama.config import invalid
from keras_llama.layers import embedding_initializer, register

_SIZES = (2, 3)
_PRIME = 16_777_619  # of the hash of Fowler, Noll and Vo, http://www.isthe.com/chongo/tech/comp/fnv/


def hashed(token_ids, padding_mask, buckets):
    """Bucket of the n tokens that end at each token, n = 2 and 3: two int32 (B, T).

    Where fewer tokens stand before it in its segment, those missing count as the id -1: none reaches into another text.
    """
    ids, segments = ops.cast(token_ids, "int32"), ops.cast(padding_mask, "int32")
    code, found = ids, []
    for before in range(1, max(_SIZES)):
        widths = [[0, 0], [before, 0]]
        earlier, of_segment = (ops.pad(x, widths)[:, : ops.shape(ids)[1]] for x in (ids + 1, segments))
        # int32 goes round at 2 ** 31 on every backend.
        code = code * _PRIME + ops.where(ops.equal(of_segment, segments), earlier, 0)
        found.append(ops.mod(code, buckets))
    return found


@register
class NgramEmbedding(keras.layers.Layer):
    """Token ids (B, T) and padding mask (B, T) -> the sum of the vectors of each token's pair and triple, (B, T, D).

    Pairs and triples share one table by hash, whose collisions training has to bear (Joulin et al., 2017,
    https://arxiv.org/abs/1607.01759).

    Args:
        buckets: rows of the table.
        width: D.

    Raises:
        ValueError: if `buckets` is not positive.

    >>> ones = np.ones((1, 3), "int32")
    >>> tuple(NgramEmbedding(buckets=50, width=8)(ones, ones).shape)
    (1, 3, 8)
    """

    def __init__(self, *, buckets, width, **kwargs):
        if isinstance(buckets, bool) or not isinstance(buckets, int) or buckets < 1:
            raise invalid("`buckets` must be a positive integer.", buckets=buckets)
        super().__init__(**{**kwargs, "autocast": False})
        self.buckets, self.width = buckets, width

    def build(self, *shapes):
        small = embedding_initializer(0.1 * self.width**-0.5)  # what training never sees stays noise
        self.embeddings = self.add_weight(name="embeddings", shape=(self.buckets, self.width), initializer=small)
        self.built = True

    def call(self, token_ids, padding_mask):
        found = ops.stack(hashed(token_ids, padding_mask, self.buckets), axis=-1)
        vectors = ops.take(ops.convert_to_tensor(self.embeddings), found, axis=0)  # (B, T, 2, D)
        return ops.cast(ops.sum(vectors, axis=2), self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "buckets": self.buckets, "width": self.width}
