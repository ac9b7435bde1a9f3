"""A tokenizer inside a TensorFlow graph, of core operations only: strings -> ids as the tokenizer gives them, and back.

Merging follows Sennrich et al., 2016, https://arxiv.org/abs/1508.07909: in every word the pair of the lowest rank,
the leftmost first, until there is none. Shapes: B texts, U distinct words, L symbols of all words in a row, N any.
"""

from collections.abc import Mapping

import numpy as np

from keras_llama.export.tables import Tables
from keras_llama.export.words import MARK

_NEVER = 2**31 - 1  # rank of a pair that is not merged
_LAST = 2**63 - 1


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

    # Nothing: core operations and constants.
    needs: tuple[str, ...] = ()
    resources: tuple = ()

    def __init__(self, found: Tables):
        import tensorflow as tf

        self._rules, self._strip = found.rules, found.strip
        # A last entry that nothing equals, so that a search never ends behind the table.
        self._characters = tf.constant(np.append(found.characters, _NEVER), tf.int32)
        self._character_ids = tf.constant(np.append(found.character_ids, -1), tf.int32)
        self._byte_ids = tf.constant(found.byte_ids, tf.int32)
        self._neighbours = tf.constant(np.append(found.neighbours, _LAST), tf.int64)
        self._keys = tf.constant(np.append(found.keys, _LAST), tf.int64)
        self._ranks = tf.constant(np.append(found.ranks, _NEVER), tf.int32)
        self._results = tf.constant(np.append(found.results, -1), tf.int32)
        self._pieces = tf.constant(found.pieces)
        pieces = [piece.decode("utf-8", "replace") for piece in found.pieces]
        self._longest = max(map(len, [*pieces, *(found.spelling or [])]))
        self._by_bytes = not len(found.characters)
        self._spelling = None if found.spelling is None else tf.ragged.constant(found.spelling, tf.int32)
        self._whole = _WholeWords(found.whole) if found.whole else None
        # Functions of their own: each is traced and stored once, however many signatures call it.
        strings, number = tf.TensorSpec([None], tf.string), tf.TensorSpec([], tf.int32)
        rows = tf.RaggedTensorSpec([None, None], tf.int32)
        self._encoding = tf.function(self._encode, [strings, number], autograph=False)
        self._decoding = tf.function(self._decode, [rows], autograph=False)

    def encode(self, texts, most=None):
        """Strings (B,) -> ids, ragged int32 (B, None), `most` or more of each text; what is no UTF-8 is U+FFFD."""
        # No more characters than can matter, so that a text of any size takes bounded time.
        return self._encoding(texts, _NEVER if most is None else min(most * self._longest, _NEVER))

    def decode(self, ids):
        """Ids, ragged int32 (B, None) -> strings (B,). Ids beyond the vocabulary are written as nothing."""
        return self._decoding(ids)

    def _encode(self, texts, characters):
        import tensorflow as tf

        texts = tf.strings.substr(as_utf8(texts), 0, characters, unit="UTF8_CHAR")
        words = self._words(texts)  # ragged (B, None)
        distinct, places = tf.unique(words.flat_values)
        ids = self._word_ids(distinct)
        if self._spelling is not None:
            ids = tf.gather(self._spelling, ids).merge_dims(1, 2)
        ids = tf.gather(ids, places)  # ragged, a row for each word
        return words.with_flat_values(ids).merge_dims(1, 2)

    def _decode(self, ids):
        import tensorflow as tf

        size = tf.size(self._pieces)
        known = tf.ragged.boolean_mask(ids, ids < size)
        texts = tf.strings.reduce_join(tf.gather(self._pieces, known), axis=-1)
        if self._strip:
            texts = tf.strings.regex_replace(texts, "^ ", "", replace_global=False)
        return as_utf8(texts)

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
        symbols = tf.ragged.boolean_mask(symbols, symbols >= 0)  # bytes without a token are dropped
        parts, rows = self._parts(symbols)
        parts = parts.with_flat_values(self._merge(parts.flat_values, tf.cast(parts.value_rowids(), tf.int32)))
        tokens = tf.ragged.boolean_mask(parts, parts >= 0)
        return tf.RaggedTensor.from_value_rowids(tokens, rows, symbols.nrows(), validate=False).merge_dims(1, 2)

    def _bytes(self, texts):
        """Texts (N,) -> ids of their bytes, ragged (N, None)."""
        import tensorflow as tf

        values = tf.io.decode_raw(tf.strings.reduce_join(texts), tf.uint8)
        ids = tf.gather(self._byte_ids, tf.cast(values, tf.int32))
        return tf.RaggedTensor.from_row_lengths(ids, tf.cast(tf.strings.length(texts), tf.int64), validate=False)

    def _characters_or_bytes(self, words):
        """Words (U,) -> ids of the characters, of the bytes of those without one, ragged (U, None)."""
        import tensorflow as tf

        codes = tf.strings.unicode_decode(words, "UTF-8")  # ragged (U, None)
        distinct, places = tf.unique(codes.flat_values)
        place = tf.searchsorted(self._characters, distinct)
        known, ids = tf.gather(self._characters, place) == distinct, tf.gather(self._character_ids, place)
        rows = _one_or(known, ids, self._bytes(tf.strings.unicode_encode(distinct[:, None], "UTF-8")))
        return codes.with_flat_values(tf.gather(rows, places)).merge_dims(1, 2)

    def _parts(self, symbols):
        """Symbols of words, ragged (U, None), cut where no token goes over; and the word of each part.

        Every part has -1 before it, which no pair holds.
        """
        import tensorflow as tf

        flat, words = symbols.flat_values, symbols.value_rowids()
        keys = _key(flat[:-1], flat[1:])
        joined = tf.gather(self._neighbours, tf.searchsorted(self._neighbours, keys)) == keys
        apart = tf.logical_not(joined & (words[:-1] == words[1:]))
        starts = tf.where(tf.concat([tf.ones_like(flat[:1], tf.bool), apart], 0))[:, 0]
        parts = tf.RaggedTensor.from_row_starts(flat, starts, validate=False)
        return tf.concat([tf.fill([tf.size(starts), 1], -1), parts], 1), tf.gather(words, starts)

    def _place(self, left, right):
        """Where pairs of ids (N,) stand among the merges: behind them, if they are none."""
        import tensorflow as tf

        keys = _key(left, right)
        place = tf.searchsorted(self._keys, keys)
        return tf.where(tf.gather(self._keys, place) == keys, place, tf.size(self._keys) - 1)

    def _rank(self, left, right):
        """The rank of pairs of ids (N,), `_NEVER` where they are not merged."""
        import tensorflow as tf

        return tf.gather(self._ranks, self._place(left, right))

    def _merge(self, symbols, parts):
        """Symbols (L,) of numbered parts (L,) -> tokens (L,), each where its first symbol stood, -1 elsewhere."""
        import tensorflow as tf

        count = tf.reduce_max(tf.concat([parts, [0]], 0)) + 1

        def lowest(values, parts):
            return tf.gather(tf.math.unsorted_segment_min(values, parts, count), parts)

        def candidates(ranks, least):
            """Where pairs of the lowest rank begin: every other one, where they overlap."""
            at = tf.where((ranks == least) & (least < _NEVER))[:, 0]
            begins = tf.concat([[True], at[1:] > at[:-1] + 1], 0)
            first = tf.gather(tf.boolean_mask(at, begins), tf.cumsum(tf.cast(begins, tf.int32)) - 1)
            return tf.boolean_mask(at, (at - first) % 2 == 0)

        def turn(tokens, places, ids, parts, ranks):
            """Merges in each part the pairs of the lowest rank, up to one that makes a pair not above them."""
            least = lowest(ranks, parts)
            at, ended = candidates(ranks, least), tf.concat([ids, [-1]], 0)
            token = tf.gather(self._results, self._place(tf.gather(ids, at), tf.gather(ids, at + 1)))
            merged_before = at[1:] == at[:-1] + 2
            left = tf.where(merged_before, token[:-1], tf.gather(ids, at[1:] - 1))
            left = tf.concat([tf.gather(ids, at[:1] - 1), left], 0)
            next_rank = tf.minimum(self._rank(left, token), self._rank(token, tf.gather(ended, at + 2)))
            sooner = tf.cumsum(tf.cast(next_rank <= tf.gather(ranks, at), tf.int32), exclusive=True)
            now = tf.where(sooner == lowest(sooner, tf.gather(parts, at)))[:, 0]
            at, token = tf.gather(at, now), tf.gather(token, now)

            gone = tf.gather(places, at + 1)
            tokens = _put(_put(tokens, tf.gather(places, at), token), gone, tf.fill(tf.shape(gone), -1))
            kept = _put(least < _NEVER, at + 1, tf.zeros_like(at, tf.bool))
            moved = tf.gather(tf.cumsum(tf.cast(kept, tf.int64), exclusive=True), at)
            kept = tf.where(kept)[:, 0]
            places, ids, parts, ranks = (tf.gather(x, kept) for x in (places, _put(ids, at, token), parts, ranks))
            touched, ended = tf.concat([moved - 1, moved], 0), tf.concat([ids, [-1]], 0)
            fresh = self._rank(tf.gather(ids, touched), tf.gather(ended, touched + 1))
            return tokens, places, ids, parts, _put(ranks, touched, fresh)

        state = [
            symbols,
            tf.range(tf.size(symbols)),
            symbols,
            parts,
            self._rank(symbols, tf.concat([symbols[1:], [-1]], 0)),
        ]
        return tf.while_loop(
            lambda *state: tf.reduce_any(state[-1] < _NEVER), turn, state, [tf.TensorShape([None])] * 5
        )[0]


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
        """Symbols, ragged (U, None), with the token of a whole word in its row."""
        import tensorflow as tf

        place = tf.searchsorted(self._hashes, self._hash(words))
        return _one_or(tf.gather(self._words, place) == words, tf.gather(self._ids, place), symbols)


def _one_or(known, ids, rows):
    """Rows, ragged (N, None), with -1 for everything but one of `ids` (N,) in front where `known` (N,)."""
    import tensorflow as tf

    others = rows.with_flat_values(tf.where(tf.gather(known, rows.value_rowids()), -1, rows.flat_values))
    return tf.concat([tf.where(known, ids, -1)[:, None], others], 1)


def _key(left, right):
    """Pairs of ids (N,) as one number each, as `Tables` has them."""
    import tensorflow as tf

    return tf.bitwise.left_shift(tf.cast(left, tf.int64), tf.constant(32, tf.int64)) + tf.cast(right, tf.int64)


def _put(values, at, new):
    """Values (N,) with new ones at some places."""
    import tensorflow as tf

    return tf.tensor_scatter_nd_update(values, at[:, None], new)


def as_utf8(texts):
    """Strings (N,) with U+FFFD for what is no UTF-8."""
    import tensorflow as tf

    return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace", replacement_char=0xFFFD)
