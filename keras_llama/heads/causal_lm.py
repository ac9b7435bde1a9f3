"""LlamaCausalLM: next-token logits on a LLaMA backbone, and text generation.

Shapes: B batch, T tokens, S columns of the cache, D hidden, V vocabulary.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_llama import backend, dialogue
from keras_llama.config import invalid
from keras_llama.export.saved_model import STRINGS, Signature
from keras_llama.heads import completion
from keras_llama.heads.inputs import are_ids, rows_per_step
from keras_llama.heads.language_model import LanguageModel
from keras_llama.heads.plan import make_plan, stops
from keras_llama.layers import register
from keras_llama.preprocessing import check_texts, next_token_targets, pad_rows


@register
class LlamaCausalLM(LanguageModel):
    """The language model: texts or token ids (B, T) -> logits of each next token, float32 (B, T, V).

    `fit` and `evaluate` take texts or token ids alone: the targets are the inputs, one to the left.
    Of rows `{"prompt": ..., "response": ...}` or `{"messages": [...]}` only the responses are
    trained. The loss is the mean over trained tokens, whatever the padding; perplexity and accuracy
    count the same tokens.

    Args:
        backbone: a causal `LlamaBackbone`; its `tie_word_embeddings` decides whether the head is
            the embedding matrix or weights of its own.
        preprocessor: a `TextPreprocessor`, or `None` to take and return token ids.
        generation_config: defaults of `generate` in the words of `generation_config.json`:
            `eos_token_id` (the stop set), `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
            `repetition_penalty`, `num_beams`, `length_penalty`, `max_new_tokens`.

    Raises:
        ValueError: if the backbone is bidirectional: it would see the token that it has to predict.

    >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
    >>> lm = keras_llama.LlamaCausalLM(backbone)
    >>> lm.compile()
    >>> history = lm.fit(np.random.randint(1, 100, (8, 16)), epochs=1, verbose=0)
    >>> sorted(history.history)
    ['accuracy', 'loss', 'perplexity']
    >>> lm.generate(np.array([[5, 8, 2]]), max_new_tokens=4)["token_ids"].shape
    (1, 7)
    """

    def __init__(self, backbone, preprocessor=None, generation_config=None, **kwargs):
        if not backbone.config.causal:
            raise invalid("`backbone` must be causal.", "Build it with causal=True.", causal=False)
        super().__init__(backbone, preprocessor, generation_config, **kwargs)

    def checkpoint_settings(self):
        settings = super().checkpoint_settings()
        settings["fields"]["architectures"] = ["LlamaForCausalLM"]
        return settings

    def encode(self, x, argument="x", cut=None, predicting=False):
        rows = dialogue.dialogues(x, argument)
        if rows is not None:
            return dialogue.encode(rows, self.preprocessor, cut)
        add_eos = False if predicting else None
        return {"token_ids": self.preprocessor.encode(check_texts(x, argument), cut, add_eos)}

    def finish_batch(self, inputs, y=None, sample_weight=None):
        trained = inputs.pop("trained", None)
        targets, weights = next_token_targets(inputs["token_ids"], inputs["padding_mask"], sample_weight)
        if trained is not None:
            weights *= np.pad(trained[:, 1:], ((0, 0), (0, 1)))
        return inputs, targets, weights

    def preview_batch(self, x):
        """What `fit` would train on: for each row its tokens as (text, whether it is trained).

        >>> tokenizer = keras_llama.SentencePieceTokenizer.train(["a b c"] * 9, vocabulary_size=270)
        >>> preprocessor = keras_llama.TextPreprocessor(tokenizer, sequence_length=16)
        >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=270, **keras_llama.size("tiny"))
        >>> lm = keras_llama.LlamaCausalLM(backbone, preprocessor)
        >>> lm.preview_batch([{"prompt": "a", "response": " b"}])
        [[('<s>', False), ('▁a', False), ('▁b', True), ('</s>', True)]]
        """
        columns = self.encode(x)
        ids = columns["token_ids"]
        trained = columns.get("trained", [[0] + [1] * (len(row) - 1) for row in ids])
        token = self.preprocessor.tokenizer.token
        return [
            [(token(int(i)), bool(t)) for i, t in zip(row, flags, strict=True)]
            for row, flags in zip(ids, trained, strict=True)
        ]

    def count_rows(self, x, packing=False):
        """How many rows `fit` makes of texts or conversations, as a schedule of the learning rate has to know.

        >>> tokenizer = keras_llama.SentencePieceTokenizer.train(["a b c"] * 9, vocabulary_size=270)
        >>> preprocessor = keras_llama.TextPreprocessor(tokenizer, sequence_length=16)
        >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=270, **keras_llama.size("tiny"))
        >>> lm = keras_llama.LlamaCausalLM(backbone, preprocessor)
        >>> lm.count_rows(["a b c"] * 9), lm.count_rows(["a b c"] * 9, packing=True)
        (9, 3)
        """
        return len(self._rows(x, packing=packing)[1])

    def generate(
        self,
        prompts,
        max_new_tokens=None,
        *,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=None,
        num_beams=None,
        length_penalty=None,
        seed=None,
        stop="auto",
        stream=False,
        strip_prompt=False,
        batch_size=32,
        max_length=None,
        stop_token_ids="auto",
    ):
        """Continues prompts; settings that are not given are those of `generation_config`.

        Args:
            prompts: a string, or a list or array of strings; or token ids, as `fit` takes them.
            max_new_tokens: most tokens to add; 128, or what the context leaves, unless given.
            temperature, top_k, top_p, min_p, repetition_penalty: see `samplers.Settings`; `temperature=0`
                takes the most likely token.
            num_beams: beams of a beam search; 1 for none. It takes no temperature.
            length_penalty: exponent of a beam's length, which its log-probability is divided by; 1 unless given.
            seed: of the sampling; the same seed gives the same text on every backend.
            stop: "auto" stops at the checkpoint's stop set; a string or a list of strings or token ids
                stops there too; `None` never stops early.
            stream: yield text as it comes, never half a character: pieces of the string, or a list of
                pieces for a list of prompts; joined they are what `stream=False` returns. A number
                says how many tokens to wait for; `True` is 1.
            strip_prompt: leave the prompt out of the result.
            batch_size: prompts at a time; with `stream` they all run at once.
            max_length: KerasHub's name for the most tokens of prompt and completion together.
            stop_token_ids: KerasHub's name for the ids to stop at, instead of the checkpoint's stop set.

        Returns:
            The prompt and its completion, a string for a string, else a list; for token ids
            `{"token_ids", "padding_mask"}`, int32 (B, T), stop token included.

        Raises:
            ValueError: for an empty prompt, one that leaves no room in the context, or a setting out of range.
        """
        rows, texts = self._prompts(prompts)
        plan = make_plan(
            self.generation_config,
            [len(row) for row in rows],
            self.backbone.config.context_length,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            num_beams=num_beams,
            length_penalty=length_penalty,
            seed=seed,
            stops=stops(self.stop_ids, stop, stop_token_ids),
            stream=stream,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        tokenizer = None if texts is None else self.preprocessor.tokenizer
        if tokenizer is None and (plan.stream or plan.stop_texts):
            raise invalid("`stream` and strings in `stop` need prompts that are strings.", stream=stream, stop=stop)
        if plan.stream:
            pieces = completion.stream(self._loop, rows, plan, tokenizer)
            pieces = pieces if strip_prompt else itertools.chain([texts], pieces)
            return (piece[0] for piece in pieces) if isinstance(prompts, str) else pieces
        parts = [([rows[i] for i in part.rows], part) for part in plan.parts(batch_size)]
        if tokenizer is None:
            new = [row for part in parts for row in completion.new_ids(self._loop, *part)]
            return pad_rows(new if strip_prompt else [[*row, *more] for row, more in zip(rows, new, strict=True)])
        found = [text for part in parts for text in completion.texts(self._loop, *part, tokenizer)]
        answers = found if strip_prompt else [text + more for text, more in zip(texts, found, strict=True)]
        return answers[0] if isinstance(prompts, str) else answers

    def chat(self, messages, max_new_tokens=None, **options):
        """The assistant's answer to a conversation, by the checkpoint's chat template.

        Args:
            messages: `[{"role": "user", "content": ...}, ...]`, or a string, the user's.
            max_new_tokens, **options: as `generate` takes them; with `stream` yields the answer's pieces.

        Raises:
            ValueError: if there is no chat template, or a message has another form.
        """
        if self.preprocessor is None:
            raise invalid("`chat` needs a preprocessor.", preprocessor=None)
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        ids = self.preprocessor.tokenizer.encode_chat(dialogue.check_messages(messages))
        answers = self.generate(_Encoded([ids], [""]), max_new_tokens, strip_prompt=True, **options)
        return (piece[0] for piece in answers) if options.get("stream") else answers[0]

    def score(self, texts, batch_size=8):
        """How likely texts are: for each a dict of `tokens`, `token_ids`, `log_probs` and `perplexity`.

        Args:
            texts: a string, or a list or array of strings; or token ids.
            batch_size: texts per step.

        Returns:
            A dict for each text (one for a string): `log_probs` holds the natural logarithm of each
            token's probability after the ones before; the first token has none. `perplexity` is
            exp of minus their mean.

        Raises:
            ValueError: for a text of a single token, which has nothing to score, or of more than the context holds.
        """
        batch_size = rows_per_step(batch_size)
        rows, strings = self._prompts(texts)
        context = self.backbone.config.context_length
        for i, row in enumerate(rows):
            if len(row) < 2:
                raise invalid(f"Text {i} must have at least two tokens to score.", tokens=row)
            if context is not None and len(row) > context:
                hint = "Score it in parts."
                raise invalid(f"Text {i} must fit into the context of {context} tokens.", hint, tokens=len(row))
        scored = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = pad_rows(part, backend.bucket(max(map(len, part))))
            found = ops.convert_to_numpy(self._score_step(batch["token_ids"], batch["padding_mask"]))
            scored += [values[: len(row) - 1].astype(float) for values, row in zip(found, part, strict=True)]
        answers = [
            {"token_ids": row, "log_probs": values.tolist(), "perplexity": float(np.exp(-values.mean()))}
            for row, values in zip(rows, scored, strict=True)
        ]
        if strings is not None:
            token = self.preprocessor.tokenizer.token
            answers = [{"tokens": [token(i) for i in answer["token_ids"]], **answer} for answer in answers]
        return answers[0] if isinstance(texts, str) else answers

    def serving(self, text):
        if text is None:
            return super().serving(text)
        context = self.backbone.config.context_length or self.preprocessor.sequence_length
        generated, inputs, defaults = self.generating(self._loop, text, context)
        log_probs = text.compiled(self._log_probs)

        def generate(prompts, *sampling):
            arrays = text.prompts(prompts, context - 1)
            new, stopped = generated(arrays, (), *sampling)
            return {"texts": prompts + text.completion(arrays[0], new), "stopped": stopped}

        def score(texts):
            rows = text.rows(texts, context, self.preprocessor.add_bos, False)
            ids, mask = text.padded(rows), text.mask(rows)
            known = ops.cast(mask[:, 1:], "float32")
            return {"log_probs": log_probs(ids, mask) * known, "token_ids": ids, "lengths": ops.sum(mask, axis=1)}

        return {
            "generate": Signature(generate, {"prompts": STRINGS, **inputs}, defaults),
            "score": Signature(score, {"texts": STRINGS}),
            **super().serving(text),
        }

    @functools.cached_property
    def _loop(self):
        return self.make_loop(self._next_logits)

    @functools.cached_property
    def _score_step(self):
        return backend.Compiled(self._log_probs, self.weights, backend.resolve_jit("auto"))

    def _next_logits(self, token_ids, padding_mask, cache, index):
        """Float32 logits after the last column (B, V), and the cache."""
        hidden, cache = self.backbone.decode(token_ids, padding_mask, cache, index)
        return self.logits_of(hidden[:, -1]), cache

    def _log_probs(self, token_ids, padding_mask):
        """Log-probability of each token but the first, (B, T - 1)."""
        hidden, _ = self.backbone.decode(token_ids, padding_mask)
        logits = self.logits_of(hidden[:, :-1])
        chosen = ops.take_along_axis(logits, token_ids[:, 1:, None], axis=-1)
        return ops.squeeze(chosen, -1) - ops.logsumexp(logits, axis=-1)

    def _prompts(self, prompts):
        """Rows of token ids, and the strings that they came from (`None` for token ids)."""
        if isinstance(prompts, _Encoded):
            return prompts
        if self.preprocessor is not None and not are_ids(prompts):
            texts = check_texts([prompts] if isinstance(prompts, str) else prompts, "prompts")
            return self.preprocessor.tokenizer.encode(texts, add_bos=self.preprocessor.add_bos), texts
        return self._id_rows(prompts, "prompts"), None


class _Encoded(NamedTuple):
    """Prompts that are token ids already, and the strings that stand for them."""

    rows: list[list[int]]
    texts: list[str]
