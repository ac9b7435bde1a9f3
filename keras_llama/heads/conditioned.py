"""ConditionedModel: what the heads share that make a text of a source, be it a text or an image.

Shapes: B batch, T tokens.
"""

from typing import Any

from keras_llama.config import invalid
from keras_llama.heads import completion
from keras_llama.heads.language_model import LanguageModel
from keras_llama.heads.plan import make_plan, stops
from keras_llama.losses import TokenCrossentropy
from keras_llama.preprocessing import pad_rows


class ConditionedModel(LanguageModel):
    """A language model whose text begins with `start_id` alone: all else that it knows comes from a source.

    A head has a `token_loop` and overrides `prompts_of`.

    Args:
        backbone, preprocessor, generation_config, **kwargs: as `LanguageModel` takes them.
        label_smoothing: share of the target probability spread evenly, in the default loss.
    """

    def __init__(self, backbone, preprocessor, generation_config, label_smoothing=0.0, **kwargs):
        TokenCrossentropy(label_smoothing)  # checks it
        super().__init__(backbone, preprocessor, generation_config, **kwargs)
        self.label_smoothing = label_smoothing

    def prompts_of(self, sources):
        """Rows of `prompt_tokens` token ids for these sources, and the context of the token loop."""
        raise NotImplementedError

    @classmethod
    def preset_options(cls, checkpoint, preprocessor):
        smoothing = {name: checkpoint.options[name] for name in ("label_smoothing",) if name in checkpoint.options}
        return {**super().preset_options(checkpoint, preprocessor), **smoothing}

    def checkpoint_settings(self):
        settings = super().checkpoint_settings()
        settings["fields"]["architectures"] = [type(self).__name__]
        settings["options"] = {"label_smoothing": self.label_smoothing}
        return settings

    @property
    def start_id(self):
        """The token that a text begins with: the vocabulary's begin of text, or its end where it has none."""
        given = self.generation_config.get("decoder_start_token_id")
        if given is None and self.preprocessor is not None:
            tokenizer = self.preprocessor.tokenizer
            given = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id
        if given is None or given < 0:
            raise invalid(
                "A target needs a token to begin with.",
                'Name it: generation_config={"decoder_start_token_id": ...}.',
                decoder_start_token_id=given,
            )
        return given

    def default_loss(self):
        return TokenCrossentropy(self.label_smoothing)

    def whole_texts(self, texts, cut=None):
        """Token ids of texts, from the start token to the end of text, cut to `sequence_length`."""
        text = self.preprocessor
        return text.cut([[self.start_id, *row, *text.end] for row in text.tokenizer.encode(texts)], cut, text.end)

    def answers(self, sources, max_new_tokens, *, strings, alone, stream, batch_size, stop, stop_token_ids, **settings):
        """What `generate` returns for checked sources.

        Args:
            sources: rows, each with a length; those of like length run together, so that little is padded.
            strings: whether texts are wanted, or token ids.
            alone: whether the one source is to have its text, not a list.
            max_new_tokens, stream, batch_size, stop, stop_token_ids, **settings: of `generate`.
        """
        defaults = dict(self.generation_config)
        if self.preprocessor is not None:  # no text was longer in training
            defaults.setdefault("max_new_tokens", self.preprocessor.sequence_length - 1)
        plan = make_plan(
            defaults,
            [self.prompt_tokens] * len(sources),
            self.backbone.config.context_length,
            max_new_tokens=max_new_tokens,
            stops=stops(self.stop_ids, stop, stop_token_ids),
            stream=stream,
            **settings,
        )
        tokenizer = self.preprocessor.tokenizer if strings else None
        if tokenizer is None and (plan.stream or plan.stop_texts):
            raise invalid("`stream` and strings in `stop` need sources that are strings.", stream=stream, stop=stop)
        if plan.stream:
            prompts, context = self.prompts_of(sources)
            pieces = completion.stream(self.token_loop, prompts, plan, tokenizer, context)
            return (piece[0] for piece in pieces) if alone else pieces
        plan = plan._replace(rows=tuple(sorted(plan.rows, key=lambda i: -len(sources[i]))))
        complete = completion.new_ids if tokenizer is None else completion.texts
        found: dict[int, Any] = {}
        for part in plan.parts(batch_size):
            prompts, context = self.prompts_of([sources[i] for i in part.rows])
            new = complete(self.token_loop, prompts, part, tokenizer, context)
            found |= dict(zip(part.rows, new, strict=True))
        texts = [found[i] for i in range(len(sources))]
        if tokenizer is None:
            return pad_rows(texts)
        return texts[0] if alone else texts

    def get_config(self):
        return {**super().get_config(), "label_smoothing": self.label_smoothing}
