"""The token loop inside a graph: how far each row may go, and why it ended. Shapes: B rows, T prompt, N new tokens."""

from keras_llama.export.graph_text import GraphText
from keras_llama.generation import TokenLoop


def continued(
    text: GraphText,
    loop: TokenLoop,
    prompts,
    context_length: int,
    max_new_tokens,
    settings,
    seed,
    context=(),
    stop_ids=(),
):
    """What a `TokenLoop` adds to prompts, ragged rows (B, None), and why each ended, int32 (B,).

    Args:
        text: says whether XLA compiles the loop, with which lengths.
        loop: of the model.
        prompts: rows, ids and mask as `GraphText.prompts` gives them.
        context_length: most tokens of a row, old and new.
        max_new_tokens, seed: int32 scalars.
        settings: `samplers.Settings` of scalars.
        context: as the loop takes it.
        stop_ids: ids that end a row; they are left out.

    Returns:
        The new tokens, and 0 where `max_new_tokens`, 1 where a stop token, 2 where `context_length` ended a row.
    """
    import tensorflow as tf

    rows, ids, mask = prompts
    wanted = tf.maximum(max_new_tokens, 1)
    room = tf.minimum(wanted, context_length - tf.cast(rows.row_lengths(), tf.int32))  # (B,)
    most = tf.reduce_max(tf.concat([room, [1]], 0))
    places = tf.stack([tf.cast(rows.value_rowids(), tf.int32), rows.flat_values], 1)
    seen = tf.scatter_nd(places, tf.ones_like(rows.flat_values), [tf.shape(ids)[0], loop.config.vocabulary_size]) > 0
    mask = tf.pad(mask, [[0, 0], [0, text.length(most)]])
    uniforms = tf.random.stateless_uniform(tf.shape(mask), tf.stack([seed, 0]))

    def grown(ids, mask, seen, most, settings, uniforms, context):
        return loop.in_graph(ids, mask, seen, most, settings, stop_ids, uniforms, context)

    new = text.compiled(grown)(ids, mask, seen, most, settings, uniforms, context)
    columns = tf.range(tf.shape(new)[1])[None, :]
    stops = tf.reduce_any(new[..., None] == tf.constant(sorted(stop_ids) or [-1], tf.int32), -1)
    stops &= columns < room[:, None]
    stopped = tf.reduce_any(stops, axis=1)
    end = tf.where(stopped, tf.argmax(stops, axis=1, output_type=tf.int32), room)
    reason = tf.where(stopped, 1, tf.where(room < wanted, 2, 0))
    return tf.ragged.boolean_mask(new, columns < end[:, None]), reason
