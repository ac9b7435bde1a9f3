"""Datasets in the form in which each backend's `fit` takes them."""

import weakref
from typing import Any

import keras
import numpy as np

from keras_llama.backend.device import name
from keras_llama.config import invalid


def stream(dataset: keras.utils.PyDataset) -> Any:
    """A `PyDataset` of ragged batches in the form in which this backend's `fit` takes it.

    Keras fixes TensorFlow's shapes by the first two batches of a `PyDataset`, and later batches of
    another length fail; so TensorFlow gets a `tf.data.Dataset` whose sizes are all open.
    """
    if name() != "tensorflow":
        return dataset
    import tensorflow as tf

    size, signature = (
        len(dataset),
        keras.tree.map_structure(lambda x: tf.TensorSpec([None] * x.ndim, x.dtype), dataset[0]),
    )
    specs = keras.tree.flatten(signature)
    # TensorFlow keeps every function that it calls back, for good; the data and its model must not hang on one.
    reference = weakref.ref(dataset)

    def batch(index):
        dataset = reference()
        assert dataset is not None
        if index == 0:
            dataset.on_epoch_begin()
            if len(dataset) != size:
                raise invalid("A dataset must keep its number of batches.", first=size, now=len(dataset))
        # Copies: `on_epoch_end` may shuffle what the batch is a view of.
        arrays = [
            np.array(x, spec.dtype.as_numpy_dtype)
            for x, spec in zip(keras.tree.flatten(dataset[int(index)]), specs, strict=True)
        ]
        if index == size - 1:
            dataset.on_epoch_end()
        return arrays

    def tensors(index):
        flat = tf.numpy_function(batch, [index], [spec.dtype for spec in specs])
        for tensor, spec in zip(flat, specs, strict=True):
            tensor.set_shape(spec.shape)
        return keras.tree.pack_sequence_as(signature, flat)

    # Not `from_generator`: with it every freed block of memory over 128 kB goes back to the system at once (TensorFlow
    # 2.21, generator_dataset_op.cc), for the rest of the process; a training step of 99 ms took 124.
    options = tf.data.Options()
    # There is nothing to tune here, and an iterator that ends may wait for the tuner (TensorFlow 2.21), who sleeps for
    # 10 ms and then for twice as long each time: epochs of 4.1 seconds often took 5.1.
    options.autotune.enabled = False
    streamed = tf.data.Dataset.range(size).map(tensors).prefetch(2).with_options(options)
    streamed.source = dataset  # as long as there is somebody to read it
    return streamed


def source_of(data: Any) -> Any:
    """The `PyDataset` that `stream` gave in this form; `None` for a `tf.data.Dataset` of the user's own."""
    return getattr(data, "source", None) if is_stream(data) else data


def is_stream(data: Any) -> bool:
    """Whether `data` is a `tf.data.Dataset`, as `stream` returns on TensorFlow, or one of the user's."""
    if name() != "tensorflow":
        return False
    import tensorflow as tf

    return isinstance(data, tf.data.Dataset)
