"""TokenEmbedding: a vector for each token id, and the tied head in reverse. Shapes: V vocabulary, D hidden."""

import keras
from keras import ops

from keras_llama.layers import register


@register
class TokenEmbedding(keras.layers.ReversibleEmbedding):
    """Keras' `ReversibleEmbedding`, whose head in int8 has a gradient.

    Keras (3.15) gives `Dense` one, but rounded hidden states before this head none, so that an adapter below it would
    learn noise. It is that of the product with the kernel as it is rounded (Bengio et al., 2013, the straight-through
    estimator, https://arxiv.org/abs/1308.3432).

    Args, shapes and errors: those of `keras.layers.ReversibleEmbedding`, with `tie_weights=True`.

    >>> embedding = TokenEmbedding(9, 4, tie_weights=True)
    >>> tuple(embedding(embedding(np.array([[5, 6, 7]])), reverse=True).shape)
    (1, 3, 9)
    """

    def quantize(self, mode=None, type_check=True, config=None):
        """Keras' for a `ReversibleEmbedding`, which this is."""
        super().quantize(mode, type_check=False, config=config)

    def _int8_call(self, inputs, reverse=False):
        if not reverse:
            return super()._int8_call(inputs)

        @ops.custom_gradient
        def head(hidden, embeddings, scale):
            def gradient(*args, upstream=None):
                (upstream,) = args if upstream is None else (upstream,)
                rounded = ops.cast(embeddings, self.compute_dtype) / ops.expand_dims(scale, -1)
                return ops.matmul(upstream, ops.cast(rounded, upstream.dtype)), None, None

            hidden, hidden_scale = self.inputs_quantizer(hidden)
            logits = ops.cast(ops.matmul(hidden, ops.transpose(embeddings)), self.compute_dtype)
            return logits / (hidden_scale * scale), gradient

        return head(inputs, ops.convert_to_tensor(self._embeddings), ops.convert_to_tensor(self.embeddings_scale))
