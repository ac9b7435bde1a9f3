"""A SentencePiece model inside a TensorFlow graph, run by tensorflow_text: for models that are no plain byte pairs."""

from keras_llama.export.graph_tokenizer import as_utf8
from keras_llama.subword import SentencePieceTokenizer
from keras_llama.tokenizer_files import MODEL


class GraphSentencePiece:
    """`encode` and `decode` as `GraphTokenizer` has them; whoever loads the SavedModel must import tensorflow_text.

    >>> trained = keras_llama.SentencePieceTokenizer.train(["good film", "bad film"] * 9, vocabulary_size=280)
    >>> GraphSentencePiece(trained).encode(["a good film"]).to_list() == trained.encode(["a good film"])
    True
    """

    needs = ("tensorflow_text",)

    def __init__(self, tokenizer: SentencePieceTokenizer):
        import tensorflow as tf
        import tensorflow_text

        # The library's own resource, which a SavedModel has to hold.
        self.resources = (tensorflow_text.SentencepieceTokenizer(tokenizer.files[MODEL]),)
        special = set(tokenizer.special_tokens.values())
        self._written = tf.constant([i not in special for i in range(tokenizer.vocabulary_size)])

    def encode(self, texts, most=None):
        """Strings (B,) -> ids, ragged int32 (B, None), `most` or more of each text; what is no UTF-8 is U+FFFD."""
        return self.resources[0].tokenize(as_utf8(texts))

    def decode(self, ids):
        """Ids, ragged int32 (B, None) -> strings (B,), control tokens and ids beyond the vocabulary left out."""
        import tensorflow as tf

        known = tf.ragged.boolean_mask(ids, ids < tf.size(self._written))
        return self.resources[0].detokenize(tf.ragged.boolean_mask(known, tf.gather(self._written, known)))
