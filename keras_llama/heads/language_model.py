"""LanguageModel: what the heads over the vocabulary share, which is logits, loss, and the defaults of `generate`.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

import contextvars
import functools

import keras
from keras import ops

from keras_llama.accumulation import weigh_steps, weighing
from keras_llama.config import invalid
from keras_llama.export.graph_loop import continued
from keras_llama.export.saved_model import INTEGER, NUMBER
from keras_llama.generation import TokenLoop
from keras_llama.heads.plan import make_plan
from keras_llama.heads.task import Task
from keras_llama.layers import kernel_initializer
from keras_llama.lora import Projection
from keras_llama.losses import (
    Perplexity,
    TokenAccuracy,
    TokenCrossentropy,
    TokenMetric,
    linear_crossentropy,
    token_metrics,
)
from keras_llama.projections import project

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAMPLING = {"max_new_tokens": INTEGER, "temperature": NUMBER, "top_k": INTEGER, "top_p": NUMBER, "seed": INTEGER}

_at_hidden = contextvars.ContextVar("at_hidden", default=False)  # of a thread: TensorFlow has one for each replica


def _without_logits(step):
    """A step of `fit` or `evaluate` in which the model ends at its hidden states, where loss and metrics allow it."""

    @functools.wraps(step)
    def run(self, *args):
        token = _at_hidden.set(self.chunked and not self.quantized)  # whose head has no kernel of floats
        weights = keras.utils.unpack_x_y_sample_weight(args[-1])[2]
        try:
            with weighing(None if weights is None else ops.sum(ops.cast(weights, "float32"))):
                return step(self, *args)
        finally:
            _at_hidden.reset(token)

    return run


class LanguageModel(Task):
    """A task whose outputs are logits of each next token, float32 (B, T, V), trained on the tokens of its input.

    With a `TokenCrossentropy` and `TokenMetric`s, which are the defaults, `fit` and `evaluate` take head, loss and
    metrics as one step, `linear_crossentropy`, and never hold the logits; with others they compute all of them.

    Args:
        backbone: gives hidden states (B, T, D); its `tie_word_embeddings` decides whether the head is its embedding
            in reverse or a layer `lm_head` of its own.
        preprocessor: a `TextPreprocessor` or `None`.
        generation_config: defaults of `generate` in the words of `generation_config.json`.
        inputs, hidden: of the graph, where a head reads more than the backbone: then `hidden_states` says what.
    """

    head = "lm_head"
    packs = True

    def __init__(self, backbone, preprocessor, generation_config, inputs=None, hidden=None, **kwargs):
        if backbone.config.tie_word_embeddings:
            to_logits = backbone.token_embedding
        else:
            to_logits = Projection(
                backbone.config.vocabulary_size,
                use_bias=False,
                kernel_initializer=kernel_initializer(),
                dtype=backbone.dtype_policy,
                name=self.head,
            )
        (logits,) = project(backbone(backbone.input) if hidden is None else hidden, to_logits)
        logits = keras.layers.Activation("linear", dtype="float32", name="logits")(logits)
        super().__init__(backbone, preprocessor, logits, inputs, **kwargs)
        self._to_logits = to_logits
        self.chunked = False
        self.generation_config = dict(generation_config or {})

    @classmethod
    def preset_options(cls, checkpoint, preprocessor):
        """A checkpoint's defaults; its stop set is joined by the tokenizer's own end and the chat template's."""
        generation = dict(checkpoint.generation)
        stops = set(generation.get("eos_token_id", ()))
        if preprocessor is not None:
            stops |= {preprocessor.tokenizer.eos_id, preprocessor.tokenizer.turn_end_id} - {-1, None}
        return {"generation_config": {**generation, "eos_token_id": sorted(stops)}}

    def fresh_weights(self, checkpoint):
        return []  # a language model with a random head would be none

    def checkpoint_settings(self):
        settings = super().checkpoint_settings()
        generation = {**self.generation_config, "eos_token_id": sorted(self.stop_ids)}
        ids = {name: generation[name] for name in _IDS if generation.get(name) not in (None, [])}
        fields = {**settings["fields"], **ids}
        return {**settings, "fields": fields, "generation": {name: v for name, v in generation.items() if v != []}}

    @property
    def stop_ids(self):
        """Token ids that end a generated text: those of `generation_config`, else the tokenizer's end."""
        given = self.generation_config.get("eos_token_id")
        if given is None:
            given = [] if self.preprocessor is None else [self.preprocessor.tokenizer.eos_id]
        return {int(i) for i in (given if isinstance(given, (list, tuple)) else [given]) if i >= 0}

    def logits_of(self, hidden):
        """Float32 logits (..., V) of hidden states (..., D)."""
        return ops.cast(project(hidden, self._to_logits)[0], "float32")

    def make_loop(self, step, start=None):
        """The `TokenLoop` over a step of this model, and what runs its prompts, unless that is a step."""
        groups = [group for block in self.backbone.blocks for group in block.step_projections]
        groups.append((self._to_logits,))
        dtype = self.dtype_policy.compute_dtype
        return TokenLoop(
            step,
            self.backbone.config,
            self.weights,
            dtype,
            groups,
            by_compiler=lambda: self.compile_options["jit_compile"] is True,
            start=start,
        )

    def generating(self, loop, text, context_length, **defaults):
        """What `serving` needs to generate: a function, its inputs after the texts, and their defaults.

        Args:
            loop: the `TokenLoop`.
            text: the `GraphText`.
            context_length: most tokens of a row.
            **defaults: of `generate`, over those of `generation_config`.

        Returns:
            A function (prompts, context, max_new_tokens, temperature, top_k, top_p, seed) -> new rows, and why each
            ended; the last five as inputs of a `Signature`, and their defaults.
        """
        plan = make_plan(
            {**defaults, **self.generation_config},
            [1],
            context_length,
            max_new_tokens=None,
            num_beams=1,
            length_penalty=None,
            seed=0,
            stops=(self.stop_ids, ()),
        )
        own = plan.settings

        def generated(prompts, context, max_new_tokens, temperature, top_k, top_p, seed):
            settings = own._replace(temperature=temperature, top_k=ops.cast(top_k, "float32"), top_p=top_p)
            limits = (context_length, max_new_tokens, settings, seed)
            return continued(text, loop, prompts, *limits, context, self.stop_ids)

        return generated, _SAMPLING, (plan.max_new_tokens, own.temperature, int(own.top_k), own.top_p, 0)

    def default_loss(self):
        return TokenCrossentropy()

    def losses_by_name(self):
        return {"sparse_categorical_crossentropy": TokenCrossentropy()}

    def default_metrics(self):
        return {"metrics": None, "weighted_metrics": token_metrics()}

    def metrics_by_name(self):
        return {"accuracy": TokenAccuracy(), "perplexity": Perplexity()}

    def place_metrics(self, metrics, weighted_metrics):
        """Those of tokens become weighted ones: Keras tells no others which tokens count."""
        named = {metric.name: metric for metric in metrics or () if isinstance(metric, TokenMetric)}
        if not named:
            return metrics, weighted_metrics
        others = [metric for metric in metrics if not isinstance(metric, TokenMetric)]
        placed = [named.pop(getattr(metric, "name", None), metric) for metric in weighted_metrics or ()]
        return others, [*placed, *named.values()]

    def choose_step(self, metrics, weighted_metrics, loss_weights=None, **_):
        known = all(isinstance(metric, TokenMetric) for metric in weighted_metrics or ())
        # A loss of the user's own may be another one, though it is derived from this.
        self.chunked = type(self.loss) is TokenCrossentropy and known and not metrics and loss_weights is None
        if isinstance(self.loss, TokenCrossentropy):
            weigh_steps(self.optimizer)
        for group in self._metric_groups() if self.chunked else ():
            # Keras builds them with the first logits, and there will be none.
            group.build(ops.zeros((1, 1)), ops.zeros((1, 1, 2)))

    train_step = _without_logits(Task.train_step)
    test_step = _without_logits(Task.test_step)

    def call(self, inputs, training=None, mask=None):
        if _at_hidden.get():
            return self.hidden_states(inputs, training)
        return super().call(inputs, training=training, mask=mask)

    def hidden_states(self, inputs, training=None):
        """What the head reads (B, T, D)."""
        return self.backbone.call(inputs, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not _at_hidden.get():
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        weights = ops.ones_like(y, "float32") if sample_weight is None else sample_weight
        smoothing = self.loss.label_smoothing
        options = {"training": training, "frozen": not self._to_logits.trainable_variables}
        loss, entropy, right = linear_crossentropy(y_pred, self._head_kernel(), y, weights, smoothing, **options)
        for group in self._metric_groups():
            for metric in group.metrics:
                metric.add(entropy, right, weights)
        return sum((ops.sum(other) for other in self.losses), loss)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return self.get_metrics_result() if _at_hidden.get() else super().compute_metrics(x, y, y_pred, sample_weight)

    def _metric_groups(self):
        """What Keras made of the lists of metrics."""
        return [group for group in self.metrics if hasattr(group, "metrics")]

    def _head_kernel(self):
        """The head's weights (V, D)."""
        if self.backbone.config.tie_word_embeddings:
            return ops.convert_to_tensor(self.backbone.token_embedding.embeddings)
        return ops.transpose(self.get_layer(self.head).kernel)

    def check_targets(self, y, rows, training=False):
        if y is not None:
            raise invalid("`y` must be None where `x` holds the targets already.", y=type(y))
        return

    def get_config(self):
        return {**super().get_config(), "generation_config": self.generation_config}
