"""What a context has in common with the question before it. Shapes: B rows, T tokens, D hidden_dim."""

import keras
from keras import ops

from keras_llama.layers import embedding_initializer, register

RUNS = 3  # tokens of the longest run that is looked for


@register
class QuestionOverlap(keras.layers.Layer):
    """A vector for each token: whether it is the question's, and stands there alone or in a run of two, of three.

    It is what the blocks read beside embeddings: the exact match of Chen et al., 2017
    (https://arxiv.org/abs/1704.00051, section 3.2), which blocks learn to compute only from very many questions.

    Args:
        width: D.
        separator: id of the token that ends the question. One in the first column begins a text.

    Call: token ids int (B, T) -> (B, T, D).

    >>> overlap = QuestionOverlap(8, separator=2)
    >>> keras.ops.convert_to_numpy(overlap.matches(np.array([[5, 6, 2, 9, 6, 5, 6]])))[0].astype(int).tolist()
    [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    """

    def __init__(self, width, *, separator, **kwargs):
        super().__init__(**kwargs)
        self.width, self.separator = width, separator

    def build(self, ids_shape):
        shape = (1 + RUNS, self.width)
        self.kernel = self.add_weight(shape=shape, initializer=embedding_initializer(0.5), name="kernel")

    def matches(self, token_ids):
        """Whether each token is the question's, and is matched in runs of 1, 2 and 3: bool (B, T, 4)."""
        ids = ops.cast(token_ids, "int32")
        ends = ops.pad(ops.cast(ops.equal(ids[:, 1:], self.separator), "int32"), [[0, 0], [1, 0]])
        asked = ops.equal(ops.cumsum(ends, axis=1), 0)
        same = ops.logical_and(ops.equal(ids[:, :, None], ids[:, None, :]), asked[:, None, :])
        found, run = [asked], same
        for more in range(RUNS):
            if more:  # runs that end one token later
                run = ops.logical_and(run[:, :-1, :-1], same[:, more:, more:])
            ended = ops.cast(ops.any(run, axis=2), "int32")
            inside = sum(ops.pad(ended, [[0, 0], [more - i, i]]) for i in range(more + 1))
            found.append(ops.logical_and(ops.greater(inside, 0), ops.logical_not(asked)))
        return ops.stack(found, axis=-1)

    def call(self, token_ids):
        return ops.matmul(ops.cast(self.matches(token_ids), self.compute_dtype), self.kernel)

    def get_config(self):
        return {**super().get_config(), "width": self.width, "separator": self.separator}
