"""The networks that the classifier is measured beside, and batches for them."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from keras_llama.losses import PassDivergence
from keras_llama.ngrams import NgramEmbedding


@dataclasses.dataclass(frozen=True)
class Peer:
    """A network that is not this project's, with its settings.

    `build` is given this project's classifier, whose vocabulary it shares, and the number of classes.
    """

    build: Callable
    learning_rate: float
    padded: bool = False


class TwoPasses(keras.Model):
    """A network that is trained with R-Drop, as this project's classifier is."""

    r_drop = 0.0

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not (training and self.r_drop):
            return loss
        again = self(x, training=True)
        both = loss + super().compute_loss(x, y, again, sample_weight, training)
        return both / 2 + self.r_drop * PassDivergence(keras.ops.softmax, keras.ops.sum)(again, y_pred)


def masked_mean(hidden, mask):
    real = keras.ops.expand_dims(keras.ops.cast(mask, "float32"), -1)
    return keras.ops.sum(hidden * real, axis=1) / keras.ops.maximum(keras.ops.sum(real, axis=1), 1.0)


def _vocabulary(classifier) -> int:
    return classifier.preprocessor.tokenizer.vocabulary_size


def inputs():
    return {name: keras.Input((None,), dtype="int32", name=name) for name in ("token_ids", "padding_mask")}


def lstm(classifier, classes: int):
    """The article's model: an embedding, three LSTMs, a dense layer."""
    given = inputs()
    real = keras.ops.cast(given["padding_mask"], "bool")
    x = keras.layers.Dropout(0.3)(keras.layers.Embedding(_vocabulary(classifier), 64)(given["token_ids"]))
    for last in (False, False, True):
        x = keras.layers.LSTM(128, return_sequences=not last)(x, mask=real)
    return keras.Model(given, keras.layers.Dense(classes)(keras.layers.Dropout(0.4)(x)))


def keras_hub(classifier, classes: int):
    import keras_hub

    import keras_llama

    given = inputs()
    same = {name: getattr(classifier.backbone.config, name) for name in keras_llama.size("tiny")}
    backbone = keras_hub.models.Llama3Backbone(vocabulary_size=_vocabulary(classifier), dropout=0.1, **same)
    pooled = masked_mean(backbone(given), given["padding_mask"])
    return keras.Model(given, keras.layers.Dense(classes)(keras.layers.Dropout(0.4)(pooled)))


def embeddings(classifier, classes: int):
    """This project's inputs, n-grams included, without blocks; its R-Drop, too."""
    given = inputs()
    known, size = classifier.backbone.ngram_embedding, _vocabulary(classifier)
    ngrams = NgramEmbedding(vocabulary_size=size, length=known.length, width=known.width, dropout=0.5)
    x = keras.layers.Dropout(0.5)(keras.layers.Embedding(size, known.width)(given["token_ids"]))
    x += ngrams(given["token_ids"], given["padding_mask"])
    ngrams.know(known.codes, known.characters)
    pooled = masked_mean(x, given["padding_mask"])
    model = TwoPasses(given, keras.layers.Dense(classes)(keras.layers.Dropout(0.4)(pooled)))
    model.r_drop = classifier.r_drop
    return model


PEERS = {
    "lstm": Peer(lstm, 4e-3),
    "keras_hub": Peer(keras_hub, 1e-3, padded=True),
    "embeddings": Peer(embeddings, 2e-3),
}


def batches(preprocessor, rows, labels, batch_size, seed=None, length=None):
    """Token ids with one-hot rows, in the buckets of this project or padded to `length`."""
    from keras_llama import backend
    from keras_llama.batches import Batches

    ids = preprocessor.encode([row[0] for row in rows])
    ids = [row[:length] for row in ids]
    targets = np.eye(len(labels), dtype="float32")[[labels.index(row[1]) for row in rows]]

    def padded(chosen):
        chosen = [ids[i] for i in chosen]
        return preprocessor.pad({"token_ids": chosen}, length or max(map(len, chosen)))

    def finish(x, y, _):
        return x, y

    return backend.stream(
        Batches(padded, [len(row) for row in ids], finish, targets, batch_size=batch_size, shuffle_seed=seed)
    )


def percentile(preprocessor, rows) -> int:
    return int(np.percentile([len(row) for row in preprocessor.encode([row[0] for row in rows])], 99))
