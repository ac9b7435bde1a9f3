"""Text inside a graph, as a preprocessor has it in Python: strings -> padded token ids, and new ids -> strings.

Shapes: B texts, T tokens of the longest, N new tokens.
"""

from keras_llama.export.graph_tokenizer import GraphTokenizer
from keras_llama.export.tables import tables
from keras_llama.preprocessing import TextPreprocessor


class GraphText:
    """What the signatures of a SavedModel do with text.

    Args:
        text: the preprocessor whose ids and limits they give.

    Raises:
        ValueError: for a vocabulary whose ids a graph would not give exactly.
    """

    def __init__(self, text: TextPreprocessor):
        found = tables(text.tokenizer)
        self._text, self._graph = text, GraphTokenizer(found)
        self._longest = max(len(piece.decode("utf-8", "replace")) for piece in found.pieces)

    def rows(self, texts, limit: int, add_bos: bool, add_eos: bool):
        """Strings (B,) -> ids, ragged int32 (B, None), cut to `limit` tokens: begin and end are kept."""
        import tensorflow as tf

        tokenizer = self._text.tokenizer
        bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id >= 0 else []
        eos = [tokenizer.eos_id] if add_eos and tokenizer.eos_id >= 0 else []
        room = limit - len(bos) - len(eos)
        # No more characters than can matter, so that a text of any size takes bounded time.
        rows = self._graph.encode(texts, room * self._longest)[:, :room]
        count = rows.nrows()
        ends = [tf.fill([count, len(ids)], tf.constant(ids[0], tf.int32)) if ids else None for ids in (bos, eos)]
        return tf.concat([part for part in (ends[0], rows, ends[1]) if part is not None], axis=1)

    def encode(self, texts):
        """Strings (B,) -> ids and mask int32 (B, T), padded on the right, as `fit` and `predict` see them."""
        rows = self.rows(texts, self._text.sequence_length, self._text.add_bos, self._text.add_eos)
        return self.padded(rows), self.mask(rows)

    def padded(self, rows):
        """Ragged rows (B, None) -> int32 (B, T)."""
        return rows.to_tensor(self._text.tokenizer.pad_id)

    @staticmethod
    def mask(rows):
        """1 for each token of ragged rows (B, None), int32 (B, T)."""
        import tensorflow as tf

        return tf.ones_like(rows).to_tensor(0)

    def prompts(self, texts, limit: int):
        """Strings (B,) -> rows, ragged; ids and mask int32 (B, T), padded on the left, as the token loop takes them.

        A prompt without any token becomes the vocabulary's end, which language models learn to begin after.
        """
        import tensorflow as tf

        rows = self.rows(texts, limit, self._text.add_bos, False)
        tokenizer = self._text.tokenizer
        start = tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.pad_id
        none = tf.cast(rows.row_lengths() == 0, tf.int64)
        rows = tf.concat([tf.RaggedTensor.from_row_lengths(tf.fill([tf.reduce_sum(none)], start), none), rows], 1)
        mirrored = tf.reverse(self.mask(rows), [1])
        missing = tf.maximum(1 - tf.shape(mirrored)[1], 0)  # columns of an empty batch
        mirrored = tf.pad(mirrored, [[0, 0], [missing, 0]])
        ids = tf.scatter_nd(tf.where(mirrored > 0), rows.flat_values, tf.shape(mirrored, tf.int64))
        return rows, ids, mirrored

    @staticmethod
    def starting(ids, start_id: int):
        """As `prompts` gives them: a row of one token for each row of `ids` (B, T)."""
        import tensorflow as tf

        rows = tf.fill([tf.shape(ids)[0], 1], tf.constant(start_id, tf.int32))
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

    def continued(self, loop, rows, ids, mask, context_length, max_new_tokens, settings, seed, context=(), stop_ids=()):
        """What a `TokenLoop` adds to rows that `prompts` gave: ragged rows, and why each ended, int32 (B,).

        Args:
            loop, rows, ids, mask: of the model and of `prompts`.
            context_length: most tokens of a row, old and new.
            max_new_tokens, seed: int32 scalars.
            settings: `samplers.Settings` of scalars.
            context: as the loop takes it.
            stop_ids: ids that end a row; they are left out.

        Returns:
            The new tokens, and 0 where `max_new_tokens`, 1 where a stop token, 2 where `context_length` ended a row.
        """
        import tensorflow as tf

        wanted = tf.maximum(max_new_tokens, 1)
        room = tf.minimum(wanted, context_length - tf.cast(rows.row_lengths(), tf.int32))  # (B,)
        most = tf.reduce_max(tf.concat([room, [1]], 0))
        count, length = tf.shape(ids)[0], tf.shape(ids)[1]
        places = tf.stack([tf.cast(rows.value_rowids(), tf.int32), rows.flat_values], 1)
        seen = tf.scatter_nd(places, tf.ones_like(rows.flat_values), [count, loop.config.vocabulary_size]) > 0
        uniforms = tf.random.stateless_uniform([count, length + most], tf.stack([seed, 0]))
        new = loop.in_graph(ids, mask, seen, most, settings, stop_ids, uniforms, context)
        columns = tf.range(tf.shape(new)[1])[None, :]
        stops = tf.reduce_any(new[..., None] == tf.constant(sorted(stop_ids) or [-1], tf.int32), -1)
        stops &= columns < room[:, None]
        stopped = tf.reduce_any(stops, axis=1)
        end = tf.where(stopped, tf.argmax(stops, axis=1, output_type=tf.int32), room)
        reason = tf.where(stopped, 1, tf.where(room < wanted, 2, 0))
        return tf.ragged.boolean_mask(new, columns < end[:, None]), reason

    def tokenize(self, texts):
        """`token_ids` (B, T) of strings (B,), as the tokenizer gives them, and their `lengths` (B,)."""
        import tensorflow as tf

        rows = self._graph.encode(texts)
        return {"token_ids": self.padded(rows), "lengths": tf.cast(rows.row_lengths(), tf.int32)}

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
