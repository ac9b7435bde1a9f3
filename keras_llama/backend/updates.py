"""What is trained: weights, an optimiser's state, its update, which Keras makes otherwise on each backend."""

from keras_llama.backend.device import name


def find_weights(model):
    """Has torch find, and set back the gradients of, weights that a model got since it was built."""
    if name() == "torch":
        model._track_variables()


def build_optimizer(model):
    """Makes an optimizer's state before the first step; TensorFlow would trace that twice, and keep both graphs."""
    if name() != "tensorflow" or not model.compiled or model.optimizer is None or model.optimizer.built:
        return
    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)


def prepare_updates(optimizer, by_xla):
    """On TensorFlow sums an embedding's gradient before an update, which XLA compiles with `by_xla`.

    Its gradient comes as a row for each token. Keras squares these, and takes their norm, without adding up first
    those of one token, which gives other weights than on JAX and torch; and XLA would compile for each number of them.
    An update is a dozen passes over each weight, each with a temporary array; XLA makes them one.
    """
    if name() != "tensorflow":
        return
    prepared = hasattr(optimizer, "updates_by_xla")
    optimizer.updates_by_xla = by_xla
    if prepared:
        return
    import tensorflow as tf

    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
    inner.apply = _alone(inner.apply)
    apply = optimizer.apply

    def apply_summed(grads, trainable_variables=None):
        if tf.distribute.has_strategy():  # replicas meet inside of an update
            return apply(grads, trainable_variables)
        grads = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]
        if len({g.dtype for g in grads if g is not None}) > 1:  # a float32 head on a bfloat16 base has one norm to clip
            grads = [g if g is None else tf.cast(g, tf.float32) for g in grads]
        if tf.executing_eagerly() or not optimizer.updates_by_xla:
            return apply(grads, trainable_variables)
        if not optimizer.built:
            optimizer.build(trainable_variables)
        update = tf.function(lambda grads: apply(grads, trainable_variables), autograph=False, jit_compile=True)
        return update(grads)

    optimizer.apply = apply_summed


def _alone(apply):
    """`apply` without the sum over replicas, where there are none.

    Keras takes it in any case, by a function with a gradient of its own, which TensorFlow never forgets, nor the graph
    around it and the weights.
    """
    import tensorflow as tf

    def apply_alone(grads, trainable_variables=None):
        if tf.distribute.has_strategy():
            return apply(grads, trainable_variables)
        meet = tf.distribute.get_replica_context().merge_call
        return meet(lambda _, grads: apply(grads, trainable_variables), args=(grads,))

    return apply_alone
