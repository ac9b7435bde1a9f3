"""Two plain Keras translators to compare with: an LSTM encoder-decoder and KerasHub's Transformer layers.

Shapes: B batch, S source length, T target length, D width, V vocabulary.
"""

import bisect
import dataclasses
from collections.abc import Callable

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from keras import layers, ops

import keras_llama
from keras_llama import backend
from keras_llama.batches import Batches, longer_side

LONGEST_TEXT = 64
LONGEST_ANSWER = 40
FEED_FORWARD = 4  # times the width, as in "Attention is all you need"
HEADS = 8
WIDTH_MULTIPLE = 8
LARGEST_WIDTH = 1_024

Rows = list[list[int]]


def padded(rows: Rows, pad_id: int) -> np.ndarray:
    """Rows as an array (B, length of the longest) of ids."""
    out = np.full((len(rows), max(map(len, rows))), pad_id, "int32")
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def dataset(sources: Rows, targets: Rows, batch_size: int, pad_id: int, seed: int):
    """Batches ((source (B, S), target input (B, T)), target (B, T), weights (B, T)), put together as the project's."""
    sources, targets = ([row[:LONGEST_TEXT] for row in rows] for rows in (sources, targets))

    def finish(pair, *_):
        source, target = pair
        return (source, target[:, :-1]), target[:, 1:], (target[:, 1:] != pad_id).astype("float32")

    return backend.stream(
        Batches(
            inputs=lambda chosen: tuple(padded([rows[i] for i in chosen], pad_id) for rows in (sources, targets)),
            lengths=longer_side(sources, targets),
            finish=finish,
            batch_size=batch_size,
            shuffle_seed=seed,
        )
    )


def assembled(encoder: keras.Model, decoder: keras.Model, head: keras.Model) -> keras.Model:
    """(source (B, S), target input (B, T)) -> logits (B, T, V); the parts stay in reach for decoding, by name."""
    source, target = keras.Input([None], dtype="int32"), keras.Input([None], dtype="int32")
    return keras.Model([source, target], head(decoder([target, *encoder(source)])))


def lstm(vocabulary_size: int, width: int, depth: int, dropout: float, pad_id: int) -> keras.Model:
    """LSTM encoder and decoder, `depth` layers each, with attention; the decoder starts from the encoder's last states.

    The first layer of the encoder reads in both directions, with half the width each. The decoder also looks at all
    outputs of the encoder (Luong et al., 2015, https://arxiv.org/abs/1508.04025). Both languages share the
    embedding; the head has weights of its own.
    """
    embedding = layers.ReversibleEmbedding(vocabulary_size, width, tie_weights=False, name="embedding")

    source = keras.Input([None], dtype="int32")
    mask = ops.not_equal(source, pad_id)  # (B, S)
    hidden = layers.Dropout(dropout)(embedding(source))  # (B, S, D)
    states = []
    for i in range(depth):
        if i == 0:
            half = layers.LSTM(width // 2, return_sequences=True, return_state=True)
            hidden, *both = layers.Bidirectional(half)(hidden, mask=mask)
            state = [ops.concatenate(both[j::2], axis=-1) for j in range(2)]  # hidden and cell state (B, D)
        else:
            hidden, *state = layers.LSTM(width, return_sequences=True, return_state=True)(hidden, mask=mask)
        hidden = layers.Dropout(dropout)(hidden)
        states += state
    encoder = keras.Model(source, [mask, hidden, *states], name="encoder")

    target = keras.Input([None], dtype="int32")
    memory = [keras.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in encoder.outputs]
    hidden = layers.Dropout(dropout)(embedding(target))  # (B, T, D)
    for i in range(depth):
        start = memory[-2 * depth :][2 * i : 2 * i + 2]
        hidden = layers.LSTM(width, return_sequences=True)(hidden, initial_state=start)
        hidden = layers.Dropout(dropout)(hidden)
    seen = layers.Attention(use_scale=True)([hidden, memory[1]], mask=[None, memory[0]])
    hidden = layers.Dense(width, activation="tanh")(ops.concatenate([hidden, seen], axis=-1))
    hidden = layers.Dropout(dropout)(hidden)
    decoder = keras.Model([target, *memory], hidden, name="decoder")

    hidden = keras.Input([None, width])
    return assembled(encoder, decoder, keras.Model(hidden, embedding(hidden, reverse=True), name="head"))


def keras_hub_transformer(vocabulary_size: int, width: int, depth: int, dropout: float, pad_id: int) -> keras.Model:
    """KerasHub's Transformer, `depth` layers on each side, normalised first; the embedding is the head as well."""
    # With KerasHub's own start, numbers up to 0.05 and no scale, the first sublayers drown words and places: the
    # model hardly learns within minutes. Here the embedding has variance 1 going in, and so have the logits.
    embedding = keras_hub.layers.TokenAndPositionEmbedding(
        vocabulary_size,
        LONGEST_TEXT,
        width,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=width**-0.5),
    )
    scale = layers.Rescaling(width**0.5)
    settings = {
        "intermediate_dim": FEED_FORWARD * width,
        "num_heads": HEADS,
        "dropout": dropout,
        "normalize_first": True,
    }

    source = keras.Input([None], dtype="int32")
    mask = ops.not_equal(source, pad_id)  # (B, S)
    hidden = layers.Dropout(dropout)(scale(embedding(source)))  # (B, S, D)
    for _ in range(depth):
        hidden = keras_hub.layers.TransformerEncoder(**settings)(hidden, padding_mask=mask)
    hidden = layers.LayerNormalization()(hidden)
    encoder = keras.Model(source, [mask, hidden], name="encoder")

    target = keras.Input([None], dtype="int32")
    memory = [keras.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in encoder.outputs]
    hidden = layers.Dropout(dropout)(scale(embedding(target)))  # (B, T, D)
    for _ in range(depth):
        # The target needs no mask: its padding is on the right, behind all that the causal mask lets through.
        hidden = keras_hub.layers.TransformerDecoder(**settings)(hidden, memory[1], encoder_padding_mask=memory[0])
    hidden = layers.LayerNormalization()(hidden)
    decoder = keras.Model([target, *memory], hidden, name="decoder")

    hidden = keras.Input([None, width])
    head = keras.Model(hidden, embedding.token_embedding(hidden, reverse=True), name="head")
    return assembled(encoder, decoder, head)


def fitting_width(build: Callable[[int], keras.Model], parameters: int) -> int:
    """The multiple of `WIDTH_MULTIPLE` with which `build(width)` comes closest to `parameters`."""
    widths = range(WIDTH_MULTIPLE, LARGEST_WIDTH + 1, WIDTH_MULTIPLE)
    above = bisect.bisect_left(widths, parameters, key=lambda width: build(width).count_params())
    near = widths[max(above - 1, 0) : above + 1]
    return min(near, key=lambda width: abs(build(width).count_params() - parameters))


def search(
    model: keras.Model,
    sources: Rows,
    tokenizer: keras_llama.SentencePieceTokenizer,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    batch_size: int = 64,
) -> Rows:
    """The best of `num_beams` answers to each source, as the project searches; 1 is greedy. Neither bos nor eos."""
    encoder, decoder, head = (model.get_layer(name) for name in ("encoder", "decoder", "head"))
    ids, size = tf.TensorSpec([None, None], "int32"), tokenizer.vocabulary_size
    remembered = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in encoder.outputs]

    @tf.function(input_signature=[ids])
    def encode(source):
        return encoder(source)

    @tf.function(input_signature=[ids, remembered, tf.TensorSpec([None, 1])])  # one trace for all lengths
    def extend(prefix, memory, scores):
        """The best continuations of prefixes (B n, T): scores and places among n V (B, 2n)."""
        logits = head(decoder([prefix, *memory])[:, -1:])[:, 0]  # only the last place goes through the head
        total = ops.log_softmax(ops.cast(logits, "float32"), axis=-1) + scores
        return tf.math.top_k(tf.reshape(total, [-1, num_beams * size]), 2 * num_beams)

    answers: Rows = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        source = padded([sources[i][:LONGEST_TEXT] for i in batch], tokenizer.pad_id)
        memory = [tf.repeat(tensor, num_beams, axis=0) for tensor in encode(tf.constant(source))]
        prefix = np.full((len(batch) * num_beams, 1), tokenizer.bos_id, "int32")
        scores = np.tile(np.array([0.0] + [-np.inf] * (num_beams - 1), "float32"), len(batch))
        ended: dict[int, list] = {i: [] for i in batch}
        for length in range(1, LONGEST_ANSWER + 1):
            found, places = (x.numpy() for x in extend(tf.constant(prefix), memory, tf.constant(scores[:, None])))
            rows = places // size + num_beams * np.arange(len(batch))[:, None]
            going, chosen = [], []
            for i, source_rows, tokens, totals in zip(batch, rows, places % size, found, strict=True):
                ends = tokens == tokenizer.eos_id
                for j in np.flatnonzero(ends[:num_beams]):
                    ended[i].append((totals[j] / length**length_penalty, prefix[source_rows[j], 1:].tolist()))
                ended[i] = sorted(ended[i], reverse=True)[:num_beams]
                on = np.flatnonzero(~ends)[:num_beams]
                beams = list(zip(source_rows[on], tokens[on], totals[on], strict=True))
                if length == LONGEST_ANSWER:
                    texts = ([*prefix[row, 1:].tolist(), int(token)] for row, token, _ in beams)
                    ended[i] += zip(totals[on] / length**length_penalty, texts, strict=True)
                elif len(ended[i]) < num_beams or ended[i][-1][0] < totals[on[0]] / length**length_penalty:
                    going.append(i)
                    chosen += beams
            if not chosen:
                break
            kept, tokens, totals = (np.array(x) for x in zip(*chosen, strict=True))
            batch, scores = going, totals
            prefix = np.concatenate([prefix[kept], tokens[:, None]], axis=1).astype("int32")
            memory = [tf.gather(tensor, kept) for tensor in memory]
        for i, found in ended.items():
            answers[i] = max(found)[1]
    return answers


@dataclasses.dataclass(frozen=True)
class Settings:
    """A peer of 2 million parameters, trained for minutes; what was tried on the validation part: RESULTS.md."""

    build: Callable[..., keras.Model]
    depth: int
    dropout: float
    learning_rate: float  # of Muon
    adam_lr_ratio: float  # the rate of AdamW's part, over it
    dtype: str


SETTINGS = {
    "lstm": Settings(lstm, 1, 0.2, 1e-2, 2.0, "float32"),
    "keras_hub": Settings(keras_hub_transformer, 2, 0.1, 8e-3, 1.0, "mixed_bfloat16"),
}
