"""TensorFlow SavedModels with the tokenizer inside: strings in, probabilities or strings out."""

import os
import pathlib
import shutil

import keras
import numpy as np

from keras_llama import backend
from keras_llama.config import invalid
from keras_llama.samplers import Settings


def export_classifier(task, filepath):
    """Writes a text classifier as a SavedModel; see `LlamaTextClassifier.export`."""
    _write(task, filepath, _classifier)


def export_seq2seq(task, filepath, max_new_tokens=None):
    """Writes an encoder-decoder with greedy decoding as a SavedModel; see `LlamaSeq2SeqLM.export`."""
    _write(task, filepath, _translator, max_new_tokens)


def _write(task, filepath, function, *options):
    """Checks, then writes what `function(task, tokenizer, *options)` computes from a batch of strings."""
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
    import tensorflow_text

    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        # Raw variables, stored once. A Keras model as attribute would put every variable into the graph
        # twice, and session loaders (TensorFlow Serving) would not find them.
        module = tf.Module()
        module.variables_once = [variable.value for variable in task.variables]
        module.tokenizer = tensorflow_text.SentencepieceTokenizer(model=task.preprocessor.tokenizer.proto)
        signature = [tf.TensorSpec([None], tf.string, name="text")]
        module.serve = tf.function(function(task, module.tokenizer, *options), signature, autograph=False)
        tf.saved_model.save(module, str(unfinished), signatures={"serving_default": module.serve})
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _encode(text, tokenizer, texts):
    """Strings (B,) -> token ids and padding mask int32 (B, T), as the preprocessor `text` makes them."""
    import tensorflow as tf

    specials = int(text.add_bos) + int(text.add_eos)
    rows = tokenizer.tokenize(texts)[:, : text.sequence_length - specials]  # ragged (B, T_i)
    if text.add_bos:
        rows = tf.concat([tf.fill([rows.nrows(), 1], text.tokenizer.bos_id), rows], axis=1)
    if text.add_eos:
        rows = tf.concat([rows, tf.fill([rows.nrows(), 1], text.tokenizer.eos_id)], axis=1)
    return rows.to_tensor(text.tokenizer.pad_id), tf.ones_like(rows).to_tensor(0)


def _classifier(task, tokenizer):
    import tensorflow as tf

    names = task.labels or [str(i) for i in range(task.num_classes)]

    def classify(texts):
        inputs = dict(zip(("token_ids", "padding_mask"), _encode(task.preprocessor, tokenizer, texts), strict=True))
        probabilities = task.probabilities(keras.Model.__call__(task, inputs, training=False))
        outputs = {"probabilities": probabilities}
        if task.problem_type == "single":
            outputs["label"] = tf.gather(names, tf.argmax(probabilities, axis=-1))
        return outputs

    return classify


def _translator(task, tokenizer, max_new_tokens):
    import tensorflow as tf

    loop, stops = task.token_loop, np.array(sorted(task.stop_ids) or [-1], "int32")
    longest = max_new_tokens or task.preprocessor.sequence_length - 1

    def generate(texts):
        ids, mask = _encode(task.preprocessor, tokenizer, texts)
        rows = tf.shape(ids)[0]
        prompts = tf.fill([rows, 1], tf.constant(task.start_id, tf.int32))
        context = (task.remember(ids, mask), mask)
        new = loop.greedy(prompts, longest, Settings().checked(), stops, context)
        # What follows the stop token is 0; 0, the stop tokens and ids that no text has are written as nothing.
        written = tf.reduce_all(new[..., None] != tf.constant([0, *stops.tolist()]), axis=-1)
        written &= new < tokenizer.vocab_size()
        return {"text": tokenizer.detokenize(tf.ragged.boolean_mask(new, written))}

    return generate
