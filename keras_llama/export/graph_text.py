"""Text inside a graph, as a preprocessor has it in Python: strings -> padded token ids, and new ids -> strings.

Shapes: B texts, T tokens of the longest, N new tokens.
"""

from keras_llama import backend
from keras_llama.export.graph_sentencepiece import GraphSentencePiece
from keras_llama.export.graph_tokenizer import GraphTokenizer
from keras_llama.export.tables import tables
from keras_llama.preprocessing import TextPreprocessor
from keras_llama.subword import SentencePieceTokenizer
from keras_llama.tokenizer import Tokenizer

_LONGEST = 2**20  # tokens: there are buckets of lengths up to it


def graph_tokenizer(tokenizer: Tokenizer) -> GraphTokenizer | GraphSentencePiece:
    """The tokenizer as TensorFlow operations, core ones if that is possible.

    Raises:
        ValueError: for a vocabulary whose ids a graph would not give exactly.
    """
    try:
        return GraphTokenizer(tables(tokenizer))
    except ValueError:
        if isinstance(tokenizer, SentencePieceTokenizer):
            return GraphSentencePiece(tokenizer)
        raise


class GraphText:
    """What the signatures of a SavedModel do with text.

    Args:
        text: the preprocessor whose ids and limits they give.
        jit: whether XLA compiles what a model does; lengths then go up to a bucket, so that there are few.

    Raises:
        ValueError: for a vocabulary whose ids a graph would not give exactly.
    """

    def __init__(self, text: TextPreprocessor, jit: bool = False):
        self.preprocessor, self.jit = text, jit
        self._graph = graph_tokenizer(text.tokenizer)
        self.needs, self.resources = self._graph.needs, self._graph.resources

    def compiled(self, function):
        """`function` of tensors, compiled by XLA for each new set of shapes if that was asked for."""
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False) if self.jit else function

    def length(self, tokens):
        """How many columns to make for some tokens, int32 ()."""
        import tensorflow as tf

        if not self.jit:
            return tokens
        buckets = tf.constant(backend.buckets(_LONGEST))
        return tf.gather(buckets, tf.searchsorted(buckets, tokens[None])[0])

    def rows(self, texts, limit: int, add_bos: bool, add_eos: bool):
        """Strings (B,) -> ids, ragged int32 (B, None), cut to `limit` tokens: begin and end are kept."""
        import tensorflow as tf

        tokenizer = self.preprocessor.tokenizer
        bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id >= 0 else []
        eos = [tokenizer.eos_id] if add_eos and tokenizer.eos_id >= 0 else []
        room = limit - len(bos) - len(eos)
        rows = self._graph.encode(texts, room)[:, :room]
        count = rows.nrows()
        ends = [tf.fill([count, len(ids)], tf.constant(ids[0], tf.int32)) if ids else None for ids in (bos, eos)]
        return tf.concat([part for part in (ends[0], rows, ends[1]) if part is not None], axis=1)

    def encode(self, texts):
        """Strings (B,) -> ids and mask int32 (B, T), padded on the right, as `fit` and `predict` see them."""
        rows = self.rows(texts, self.preprocessor.sequence_length, self.preprocessor.add_bos, self.preprocessor.add_eos)
        return self.padded(rows), self.mask(rows)

    def padded(self, rows):
        """Ragged rows (B, None) -> int32 (B, T)."""
        return self._dense(rows, self.preprocessor.tokenizer.pad_id)

    def mask(self, rows):
        """1 for each token of ragged rows (B, None), int32 (B, T)."""
        import tensorflow as tf

        return self._dense(tf.ones_like(rows), 0)

    def _dense(self, rows, filling):
        import tensorflow as tf

        dense = rows.to_tensor(filling)
        columns = tf.shape(dense)[1]
        return tf.pad(dense, [[0, 0], [0, self.length(columns) - columns]], constant_values=filling)

    def prompts(self, texts, limit: int):
        """Strings (B,) -> rows, ragged; ids and mask int32 (B, T), padded on the left, as the token loop takes them.

        A prompt without any token becomes the vocabulary's end, which language models learn to begin after.
        """
        import tensorflow as tf

        rows = self.rows(texts, limit, self.preprocessor.add_bos, False)
        tokenizer = self.preprocessor.tokenizer
        start = tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.pad_id
        none = tf.cast(rows.row_lengths() == 0, tf.int64)
        rows = tf.concat([tf.RaggedTensor.from_row_lengths(tf.fill([tf.reduce_sum(none)], start), none), rows], 1)
        mirrored = tf.reverse(self.mask(rows), [1])
        missing = tf.maximum(1 - tf.shape(mirrored)[1], 0)  # columns of an empty batch
        mirrored = tf.pad(mirrored, [[0, 0], [missing, 0]])
        ids = tf.scatter_nd(tf.where(mirrored > 0), rows.flat_values, tf.shape(mirrored, tf.int64))
        return rows, ids, mirrored

    @staticmethod
    def starting(sources, start_id: int, count: int = 1):
        """As `prompts` gives them: a row of `count` times a token for each of `sources` (B, ...)."""
        import tensorflow as tf

        rows = tf.fill([tf.shape(sources)[0], count], tf.constant(start_id, tf.int32))
        return tf.RaggedTensor.from_tensor(rows), rows, tf.ones_like(rows)

    def decode(self, rows):
        """Ids, ragged int32 (B, None) -> strings (B,), control tokens left out."""
        return self._graph.decode(rows)

    def completion(self, before, new):
        """What ragged rows `new` add to the text of `before`: strings (B,)."""
        import tensorflow as tf

        known, whole = self.decode(before), self.decode(tf.concat([before, new], 1))
        start, size = tf.strings.length(known), tf.strings.length(whole)
        after = tf.strings.substr(whole, tf.minimum(start, size), size)
        same = (size >= start) & (tf.strings.substr(whole, tf.zeros_like(start), start) == known)
        return tf.where(same, after, self.decode(new))

    def tokenize(self, texts):
        """`token_ids` (B, T) of strings (B,), as the tokenizer gives them, and their `lengths` (B,)."""
        import tensorflow as tf

        rows = self._graph.encode(texts)
        token_ids = rows.to_tensor(self.preprocessor.tokenizer.pad_id)
        return {"token_ids": token_ids, "lengths": tf.cast(rows.row_lengths(), tf.int32)}

    def detokenize(self, token_ids, lengths):
        """`texts` (B,) of what `tokenize` gave."""
        import tensorflow as tf

        return {"texts": self.decode(tf.RaggedTensor.from_tensor(token_ids, lengths=lengths))}

    @staticmethod
    def constant(names: list[str]):
        """Names as a tensor (C,)."""
        import tensorflow as tf

        return tf.constant(names)

    @staticmethod
    def at(names, numbers):
        """The names (B,) that stand in `names` (C,) at numbers (B,)."""
        import tensorflow as tf

        return tf.gather(names, numbers)
