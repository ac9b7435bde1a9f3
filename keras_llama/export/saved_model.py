"""TensorFlow SavedModels with the tokenizer inside: strings in, probabilities out."""

import os
import pathlib
import shutil

import keras

from keras_llama import backend
from keras_llama.config import invalid


def export_classifier(task, filepath):
    """Writes a text classifier as a SavedModel; see `LlamaTextClassifier.export`."""
    if backend.name() != "tensorflow":
        raise invalid(
            "A SavedModel is written on the TensorFlow backend.",
            "Save the task as .keras, and load and export it in a process with KERAS_BACKEND=tensorflow.",
            backend=backend.name(),
        )
    if task.preprocessor is None:
        raise invalid("`export` needs a task with a preprocessor, to take strings.", preprocessor=None)
    if task.preprocessor.tokenizer.proto is None:
        raise invalid(
            "`export` needs a tokenizer with a SentencePiece model: byte-pair encoding is not in the graph yet.",
            "Save the task as .keras instead.",
            tokenizer=type(task.preprocessor.tokenizer).__name__,
        )
    path = pathlib.Path(filepath)
    if path.exists():
        raise invalid("`filepath` must not exist yet.", "Remove it or choose another name.", filepath=str(path))
    import tensorflow as tf

    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        module = _module(task)
        tf.saved_model.save(module, str(unfinished), signatures={"serving_default": module.classify})
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _module(task):
    """The task as a `tf.Module`: raw variables, stored once, and one function from texts to answers.

    A Keras model as attribute would put every variable into the graph twice, and session loaders
    (TensorFlow Serving) would not find them.
    """
    import tensorflow as tf
    import tensorflow_text

    text = task.preprocessor
    specials = int(text.add_bos) + int(text.add_eos)
    tokenizer = tensorflow_text.SentencepieceTokenizer(model=text.tokenizer.proto)
    names = task.labels or [str(i) for i in range(task.num_classes)]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")], autograph=False)
    def classify(texts):
        rows = tokenizer.tokenize(texts)[:, : text.sequence_length - specials]  # ragged (B, T_i)
        if text.add_bos:
            rows = tf.concat([tf.fill([rows.nrows(), 1], text.tokenizer.bos_id), rows], axis=1)
        if text.add_eos:
            rows = tf.concat([rows, tf.fill([rows.nrows(), 1], text.tokenizer.eos_id)], axis=1)
        inputs = {
            "token_ids": rows.to_tensor(text.tokenizer.pad_id),
            "padding_mask": tf.ones_like(rows).to_tensor(0),
        }
        probabilities = task.probabilities(keras.Model.__call__(task, inputs, training=False))
        outputs = {"probabilities": probabilities}
        if task.problem_type == "single":
            outputs["label"] = tf.gather(names, tf.argmax(probabilities, axis=-1))
        return outputs

    module = tf.Module()
    module.variables_once = [variable.value for variable in task.variables]
    module.tokenizer = tokenizer
    module.classify = classify
    return module
