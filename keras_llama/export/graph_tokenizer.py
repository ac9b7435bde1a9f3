"""A tokenizer inside a TensorFlow graph, of core operations only: strings -> ids as the tokenizer gives them, and back.

Merging follows Sennrich et al., 2016, https://arxiv.org/abs/1508.07909: in every word the pair of the lowest rank,
the leftmost first, until there is none. Shapes: B texts, U distinct words, L symbols of the longest of them.
"""

import itertools
from collections.abc import Mapping

import numpy as np

from keras_llama.export.tables import Tables
from keras_llama.export.words import MARK

_NEVER = 2**31 - 1  # rank of a pair that is not merged
_LAST = 2**63 - 1
_LENGTHS = (0, 8, 24, 96, 2**31 - 1)  # bytes: so that one long word does not make rows of all others longer


class GraphTokenizer:
    """`encode` and `decode` of `Tables` as TensorFlow operations, for use inside a `tf.function`.

    >>> trained = keras_llama.SentencePieceTokenizer.train(["good film", "bad film"] * 9, vocabulary_size=280)
    >>> from keras_llama.export.tables import tables
    >>> graph = GraphTokenizer(tables(trained))
    >>> ids = graph.encode(["a good film", ""])
    >>> ids.to_list() == trained.encode(["a good film", ""])
    True
    >>> graph.decode(ids).numpy().tolist()
    [b'a good film', b'']
    """

    def __init__(self, found: Tables):
        import tensorflow as tf

        self._rules, self._strip = found.rules, found.strip
        # A last entry that nothing equals, so that a search never ends behind the table.
        self._characters = tf.constant(np.append(found.characters, _NEVER), tf.int32)
        self._character_ids = tf.constant(np.append(found.character_ids, -1), tf.int32)
        self._byte_ids = tf.constant(found.byte_ids, tf.int32)
        self._keys = tf.constant(np.append(found.keys, _LAST), tf.int64)
        self._ranks = tf.constant(np.append(found.ranks, _NEVER), tf.int32)
        self._results = tf.constant(np.append(found.results, -1), tf.int32)
        self._pieces = tf.constant(found.pieces)
        self._by_bytes = not len(found.characters)
        self._whole = _WholeWords(found.whole) if found.whole else None
        # Functions of their own: each is traced and stored once, however many signatures call it.
        strings, number = tf.TensorSpec([None], tf.string), tf.TensorSpec([], tf.int32)
        rows = tf.RaggedTensorSpec([None, None], tf.int32)
        self._encoding = tf.function(self._encode, [strings, number], autograph=False)
        self._decoding = tf.function(self._decode, [rows], autograph=False)

    def encode(self, texts, characters: int = _NEVER):
        """Strings (B,) -> ids, ragged int32 (B, None), of at most so many characters; what is no UTF-8 is U+FFFD."""
        return self._encoding(texts, characters)

    def decode(self, ids):
        """Ids, ragged int32 (B, None) -> strings (B,). Ids beyond the vocabulary are written as nothing."""
        return self._decoding(ids)

    def _encode(self, texts, characters):
        import tensorflow as tf

        texts = tf.strings.substr(_as_utf8(texts), 0, characters, unit="UTF8_CHAR")
        words = self._words(texts)  # ragged (B, None)
        distinct, places = tf.unique(words.flat_values)
        length, rows, parts = tf.strings.length(distinct), [], []
        for shortest, longest in itertools.pairwise(_LENGTHS):
            rows.append(tf.where((length > shortest) & (length <= longest))[:, 0])
            parts.append(self._word_ids(tf.gather(distinct, rows[-1])))
        order = tf.math.invert_permutation(tf.concat(rows, 0))
        ids = tf.gather(tf.concat(parts, 0), tf.gather(order, places))  # ragged, a row for each word
        return tf.RaggedTensor.from_row_splits(ids, words.row_splits).merge_dims(1, 2)

    def _decode(self, ids):
        import tensorflow as tf

        size = tf.size(self._pieces)
        known = tf.ragged.boolean_mask(ids, ids < size)
        texts = tf.strings.reduce_join(tf.gather(self._pieces, known), axis=-1)
        if self._strip:
            texts = tf.strings.regex_replace(texts, "^ ", "", replace_global=False)
        return _as_utf8(texts)

    def _words(self, texts):
        import tensorflow as tf

        for pattern, becomes in self._rules:
            texts = tf.strings.regex_replace(texts, pattern, becomes)
        words = tf.strings.split(texts, MARK)
        return tf.ragged.boolean_mask(words, words != "")

    def _word_ids(self, words):
        """Words (U,) -> ids, ragged (U, None)."""
        import tensorflow as tf

        symbols = self._bytes(words) if self._by_bytes else self._characters_or_bytes(words)
        if self._whole is not None:
            symbols = self._whole.put(words, symbols)
        # Bytes without a token are dropped; a column more, so that no row is without one.
        symbols = tf.ragged.boolean_mask(symbols, symbols >= 0).to_tensor(-1)
        symbols = tf.pad(symbols, [[0, 0], [0, 1]], constant_values=-1)
        return tf.RaggedTensor.from_tensor(self._merge(symbols), padding=-1)

    def _bytes(self, texts):
        """Texts (N,) -> ids of their bytes (N, longest), -1 behind them."""
        import tensorflow as tf

        length = tf.strings.length(texts)
        longest = tf.reduce_max(tf.concat([length, [1]], 0))
        values = tf.cast(tf.io.decode_raw(texts, tf.uint8, fixed_length=longest), tf.int32)
        return tf.where(tf.sequence_mask(length, longest), tf.gather(self._byte_ids, values), -1)

    def _characters_or_bytes(self, words):
        """Words (U,) -> ids of the characters, of the bytes of those without one (U, L), -1 behind them."""
        import tensorflow as tf

        characters = tf.strings.unicode_split(words, "UTF-8")  # ragged (U, None)
        flat = characters.flat_values
        codes = tf.strings.unicode_decode(flat, "UTF-8").flat_values  # one for each character
        place = tf.searchsorted(self._characters, codes)
        known, spelled = tf.gather(self._characters, place) == codes, self._bytes(flat)
        own = tf.where(tf.range(tf.shape(spelled)[1]) == 0, tf.gather(self._character_ids, place)[:, None], -1)
        symbols = tf.RaggedTensor.from_tensor(tf.where(known[:, None], own, spelled), padding=-1)
        return characters.with_flat_values(symbols).merge_dims(1, 2).to_tensor(-1)

    def _place(self, left, right):
        """Where pairs of ids, of any shape, stand among the merges: behind them, if they are none. -1 is in no pair."""
        import tensorflow as tf

        keys = tf.bitwise.left_shift(tf.cast(left, tf.int64), tf.constant(32, tf.int64)) + tf.cast(right, tf.int64)
        flat = tf.reshape(keys, [-1])
        place = tf.searchsorted(self._keys, flat)
        missing = tf.size(self._keys) - 1
        return tf.reshape(tf.where(tf.gather(self._keys, place) == flat, place, missing), tf.shape(keys))

    def _rank(self, left, right):
        """The rank of pairs of ids, `_NEVER` where they are not merged."""
        import tensorflow as tf

        return tf.gather(self._ranks, self._place(left, right))

    def _merge(self, ids):
        """Symbols (U, L) -> tokens (U, L), -1 behind them.

        Each turn merges one pair of each word that is not finished. Only the two pairs around it are looked up again.
        """
        import tensorflow as tf

        def column(table, columns):
            return tf.gather(table, columns, axis=1, batch_dims=1)

        def shifted(table, filling):
            return tf.concat([table[:, 1:], tf.fill([tf.shape(table)[0], 1], filling)], 1)

        def turn(ids, ranks, rows):
            some, some_ranks = tf.gather(ids, rows), tf.gather(ranks, rows)
            at = tf.argmin(some_ranks, 1, output_type=tf.int32)  # the leftmost of equal ones
            going = column(some_ranks, at[:, None])[:, 0] < _NEVER
            rows, some, some_ranks, at = (tf.boolean_mask(x, going) for x in (rows, some, some_ranks, at[:, None]))
            last = tf.shape(ids)[1] - 1
            merged = tf.gather(self._results, self._place(column(some, at), column(some, at + 1)))
            columns = tf.range(last + 1)[None, :]
            some = tf.where(columns < at, some, tf.where(columns == at, merged, shifted(some, -1)))
            before = self._rank(column(some, tf.maximum(at - 1, 0)), merged)
            behind = self._rank(merged, column(some, tf.minimum(at + 1, last)))
            before, behind = tf.where(at > 0, before, _NEVER), tf.where(at < last, behind, _NEVER)
            some_ranks = tf.where(columns < at, some_ranks, shifted(some_ranks, _NEVER))
            some_ranks = tf.where(columns == at, behind, tf.where(columns == at - 1, before, some_ranks))
            where = rows[:, None]
            return (
                tf.tensor_scatter_nd_update(ids, where, some),
                tf.tensor_scatter_nd_update(ranks, where, some_ranks),
                rows,
            )

        rows = tf.range(tf.shape(ids)[0])
        ranks = self._rank(ids, shifted(ids, -1))
        open_shapes = [tf.TensorShape([None, None]), tf.TensorShape([None, None]), tf.TensorShape([None])]
        return tf.while_loop(lambda ids, ranks, rows: tf.size(rows) > 0, turn, [ids, ranks, rows], open_shapes)[0]


class _WholeWords:
    """Words that are tokens although no merges lead there, found by a hash and compared."""

    def __init__(self, words: Mapping[bytes, int]):
        import tensorflow as tf

        hashes = self._hash(tf.constant(list(words))).numpy()
        order = np.argsort(hashes)
        self._hashes = tf.constant(np.append(hashes[order], _LAST), tf.int64)
        self._words = tf.constant([*np.array(list(words), object)[order], b""])
        self._ids = tf.constant([*np.array(list(words.values()))[order], -1], tf.int32)

    @staticmethod
    def _hash(words):
        import tensorflow as tf

        return tf.strings.to_hash_bucket_fast(words, 2**62)

    def put(self, words, symbols):
        """Symbols (U, L) with the token of a whole word in its row."""
        import tensorflow as tf

        place = tf.searchsorted(self._hashes, self._hash(words))
        found = tf.gather(self._words, place) == words
        token = tf.where(tf.range(tf.shape(symbols)[1]) == 0, tf.gather(self._ids, place)[:, None], -1)
        return tf.where(found[:, None], token, symbols)


def _as_utf8(texts):
    import tensorflow as tf

    return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace", replacement_char=0xFFFD)
