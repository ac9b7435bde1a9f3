"""LlamaCausalLM: next-token logits on a LLaMA backbone. Shapes: B batch, T tokens, D hidden, V vocabulary."""

import keras

from keras_llama.config import invalid
from keras_llama.heads.task import Task
from keras_llama.layers import normal_initializer, register
from keras_llama.losses import Perplexity, token_loss
from keras_llama.preprocessing import next_token_targets


@register
class LlamaCausalLM(Task):
    """The language model: texts or token ids (B, T) -> logits of each next token, float32 (B, T, V).

    `fit` and `evaluate` take texts or token ids alone: the targets are the inputs, one to the left.
    The loss is the mean over real tokens, whatever the padding; perplexity and accuracy count
    the same tokens.

    Args:
        backbone: a causal `LlamaBackbone`; its `tie_word_embeddings` decides whether the head is
            the embedding matrix or weights of its own.
        preprocessor: a `TextPreprocessor`, or `None` to take token ids.

    Raises:
        ValueError: if the backbone is bidirectional: it would see the token that it has to predict.

    >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
    >>> lm = keras_llama.LlamaCausalLM(backbone)
    >>> lm.compile()
    >>> history = lm.fit(np.random.randint(1, 100, (8, 16)), epochs=1, verbose=0)
    >>> sorted(history.history)
    ['accuracy', 'loss', 'perplexity']
    """

    def __init__(self, backbone, preprocessor=None, **kwargs):
        if not backbone.config.causal:
            raise invalid("`backbone` must be causal.", "Build it with causal=True.", causal=False)
        hidden = backbone(backbone.input)
        if backbone.config.tie_word_embeddings:
            logits = backbone.token_embedding(hidden, reverse=True)
        else:
            logits = keras.layers.Dense(
                backbone.config.vocabulary_size,
                use_bias=False,
                kernel_initializer=normal_initializer(),
                dtype=backbone.dtype_policy,
                name="lm_head",
            )(hidden)
        logits = keras.layers.Activation("linear", dtype="float32", name="logits")(logits)
        super().__init__(backbone, preprocessor, logits, **kwargs)

    def default_loss(self):
        return token_loss()

    def losses_by_name(self):
        return {"sparse_categorical_crossentropy": token_loss()}

    def default_metrics(self):
        weighted = [Perplexity(), keras.metrics.SparseCategoricalAccuracy(name="accuracy", dtype="float32")]
        return {"metrics": None, "weighted_metrics": weighted}

    def check_targets(self, y, rows, training=False):
        if y is not None:
            raise invalid("`y` must be None: a language model's targets are its inputs.", y=type(y))
        return

    def finish_batch(self, inputs, y=None, sample_weight=None):
        return inputs, *next_token_targets(inputs["token_ids"], inputs["padding_mask"], sample_weight)
