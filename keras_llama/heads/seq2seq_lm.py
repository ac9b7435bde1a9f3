"""LlamaSeq2SeqLM: a source text -> a target text, such as its translation, by a LLaMA encoder and decoder.

Shapes: B batch, S source length, T target length, V vocabulary.
"""

import functools
from collections import Counter

import keras
import numpy as np

from keras_llama import backend
from keras_llama.attention import record
from keras_llama.batches import longer_side
from keras_llama.config import invalid
from keras_llama.export.saved_model import STRINGS, Signature
from keras_llama.heads.conditioned import ConditionedModel
from keras_llama.heads.inputs import are_ids, is_token_ids
from keras_llama.layers import no_random_weights, register
from keras_llama.preprocessing import check_texts, next_token_targets, pad_rows
from keras_llama.seq2seq_backbone import LlamaSeq2SeqBackbone

_TEXTS = ("source", "target")


@register
class LlamaSeq2SeqLM(ConditionedModel):
    """The encoder-decoder: sources and targets -> logits of each next target token, float32 (B, T, V).

    `fit(sources, targets)` takes two lists of strings, or token ids as the backbone takes them, the target's
    with the tokens that begin and end it. Training is teacher forcing: the decoder reads the target, one
    token behind. The loss is the mean over real target tokens; perplexity and accuracy count the same.

    Args:
        backbone: a `LlamaSeq2SeqBackbone`; its `tie_word_embeddings` decides whether the head is
            the decoder's embedding matrix or weights of its own.
        preprocessor: a `TextPreprocessor`, or `None` to take and return token ids. It says how a source begins
            and ends; a target always has both tokens.
        generation_config: defaults of `generate` in the words of `generation_config.json`, as in `LlamaCausalLM`.
        label_smoothing: share of the target probability spread evenly, in the default loss.

    Raises:
        ValueError: for a backbone of another kind, or a number out of range.

    >>> backbone = keras_llama.LlamaSeq2SeqBackbone(vocabulary_size=300, **keras_llama.size("tiny"))
    >>> tokenizer = keras_llama.SentencePieceTokenizer.train(["good day", "好日子"], vocabulary_size=270)
    >>> translator = keras_llama.LlamaSeq2SeqLM(backbone, keras_llama.TextPreprocessor(tokenizer))
    >>> translator.compile()
    >>> history = translator.fit(["good day"] * 8, ["好日子"] * 8, epochs=40, verbose=0)
    >>> translator.generate("good day")
    '好日子'
    """

    backbone_class = LlamaSeq2SeqBackbone
    sides = ("encoder_", "decoder_")

    def __init__(self, backbone, preprocessor=None, generation_config=None, label_smoothing=0.0, **kwargs):
        if not isinstance(backbone, LlamaSeq2SeqBackbone):
            raise invalid(
                "`backbone` must be a LlamaSeq2SeqBackbone.",
                "Start one from a decoder with `LlamaSeq2SeqBackbone.from_decoder`.",
                backbone=type(backbone).__name__,
            )
        super().__init__(backbone, preprocessor, generation_config, label_smoothing, **kwargs)

    @classmethod
    def from_decoder(cls, decoder, *, sequence_length=None, label_smoothing=0.0, **options):
        """An encoder-decoder started from a decoder-only language model: its weights twice, its head, its vocabulary.

        Args:
            decoder: a `LlamaCausalLM`.
            sequence_length: longest source and target to train on; that of the decoder's preprocessor unless given.
            label_smoothing: of the default loss.
            **options: of `LlamaSeq2SeqBackbone.from_decoder`.

        Raises:
            ValueError: if `decoder` is something else.
        """
        if not hasattr(decoder, "backbone") or decoder.head != cls.head:
            raise invalid("`decoder` must be a LlamaCausalLM.", decoder=type(decoder).__name__)
        backbone = LlamaSeq2SeqBackbone.from_decoder(decoder.backbone, **options)
        preprocessor = decoder.preprocessor
        if preprocessor is not None:
            config = preprocessor.get_config()
            preprocessor = type(preprocessor)(
                preprocessor.tokenizer, sequence_length or config["sequence_length"], config["add_bos"], add_eos=True
            )
        generation = {"eos_token_id": sorted(decoder.stop_ids)}
        with no_random_weights():
            task = cls(backbone, preprocessor, generation_config=generation, label_smoothing=label_smoothing)
        heads = {variable.path: variable for variable in decoder.weights}
        for variable in task.weights:
            if variable.path.startswith(cls.head):
                backend.copy(heads[variable.path], variable)
        return task

    def checkpoint_settings(self):
        return {**super().checkpoint_settings(), "differs": "encoder"}

    def join(self, x, y):
        """Sources and targets as the two columns of one input; they come as two lists, or as such columns."""
        if is_token_ids(x, self.sides) or self.preprocessor is None:
            return x, y
        if not isinstance(x, dict):
            if y is None:
                raise invalid(
                    "A source needs a target: pass fit(sources, targets), or x={'source': [...], 'target': [...]}.",
                    "To translate call `generate`.",
                    y=y,
                )
            x, y = {"source": x, "target": y}, None
        if set(x) != set(_TEXTS):
            raise invalid("`x` must have the keys source and target.", x=sorted(x))
        sources, targets = (check_texts(x[name], name) for name in _TEXTS)
        if len(sources) != len(targets):
            raise invalid("There must be a target for each source.", sources=len(sources), targets=len(targets))
        return {"source": sources, "target": targets}, y

    def encode(self, x, argument="x", cut=None, predicting=False):
        x, _ = self.join(x, None)
        return {
            "encoder_token_ids": self.preprocessor.encode(x["source"], cut),
            "decoder_token_ids": self.whole_texts(x["target"], cut),
        }

    def sort_key(self, columns):
        return longer_side(*(columns[f"{side}token_ids"] for side in self.sides))

    def finish_batch(self, inputs, y=None, sample_weight=None):
        """Teacher forcing: the decoder reads all tokens of the target but the last, and is to say all but the first."""
        ids, mask = (inputs[f"decoder_{name}"] for name in ("token_ids", "padding_mask"))
        targets, weights = next_token_targets(ids, mask, sample_weight)
        read = {"decoder_token_ids": ids[:, :-1], "decoder_padding_mask": mask[:, :-1]}
        return {**inputs, **read}, targets[:, :-1], weights[:, :-1]

    def generate(
        self,
        sources,
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
        batch_size=32,
        truncate=False,
        stop_token_ids="auto",
    ):
        """The target of each source, such as its translation; settings that are not given are the defaults.

        Args:
            sources: a string, or a list or array of strings; or token ids: `{"token_ids", "padding_mask"}` or
                rows of them.
            max_new_tokens: most tokens of a target; what the preprocessor's `sequence_length` leaves unless given.
            temperature, top_k, top_p, min_p, repetition_penalty: see `samplers.Settings`; `temperature=0`
                takes the most likely token.
            num_beams, length_penalty: of a beam search; 1 beam for none. It takes no temperature.
            seed: of the sampling; the same seed gives the same text on every backend.
            stop, stop_token_ids: as in `LlamaCausalLM.generate`.
            stream: yield text as it comes, in pieces, `stream` tokens at a time; all sources run at once.
            batch_size: sources at a time.
            truncate: cut a source that is too long instead of refusing it.

        Returns:
            A string for a string, else a list; for token ids `{"token_ids", "padding_mask"}`, int32 (B, T), the
            start token left out, the stop token included.

        Raises:
            ValueError: for an empty source, one that is longer than `sequence_length`, or a setting out of range.
        """
        rows, strings = self._sources(sources, truncate)
        return self.answers(
            rows,
            max_new_tokens,
            strings=strings,
            alone=isinstance(sources, str),
            stream=stream,
            batch_size=batch_size,
            stop=stop,
            stop_token_ids=stop_token_ids,
            num_beams=num_beams,
            length_penalty=length_penalty,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )

    def alignment(self, source, target):
        """How much each token of the target looks at each token of the source, in cross-attention.

        Args:
            source, target: strings; what is longer than `sequence_length` is cut.

        Returns:
            The source's tokens, the target's tokens without its start, and the weights float32 (layers, N, T, S): row t
            belongs to the step that predicts token t, and sums to 1.

        Raises:
            ValueError: for a text that is empty.
        """
        if self.preprocessor is None:
            raise invalid("`alignment` needs a preprocessor.", preprocessor=None)
        ids = self.encode({"source": [source], "target": [target]}, cut=Counter())
        sources, targets = (ids[f"{side}token_ids"][0] for side in self.sides)
        mask = np.ones((1, len(sources)), "int32")
        memory = self.backbone.encode(sources[None], mask)
        with record() as weights:
            self.backbone.decode(targets[None, :-1], np.ones((1, len(targets) - 1), "int32"), memory, mask)
        # Each block of the decoder calls attention twice: to itself, then to the source.
        crossing = np.concatenate([keras.ops.convert_to_numpy(w) for w in weights[1::2]])
        token = self.preprocessor.tokenizer.token
        return [token(int(i)) for i in sources], [token(int(i)) for i in targets[1:]], crossing

    def serving(self, text):
        if text is None:
            return super().serving(text)
        longest = self.preprocessor.sequence_length
        context = self.backbone.config.context_length or longest
        generated, inputs, defaults = self.generating(self.token_loop, text, context, max_new_tokens=longest - 1)
        remember = text.compiled(self.remember)

        def translate(sources, *sampling):
            ids, mask = text.encode(sources)
            memory = (remember(ids, mask), mask)
            new, stopped = generated(text.starting(ids, self.start_id), memory, *sampling)
            return {"texts": text.decode(new), "stopped": stopped}

        return {"translate": Signature(translate, {"sources": STRINGS, **inputs}, defaults), **super().serving(text)}

    def remember(self, token_ids, padding_mask):
        """Keys and values of cross-attention for sources int32 (B, S): a pair (B, K, S, H) per block."""
        return self.backbone.memory(self.backbone.encode(token_ids, padding_mask))

    @functools.cached_property
    def token_loop(self):
        """The `TokenLoop` over this model's steps."""
        return self.make_loop(self._next_logits)

    @functools.cached_property
    def _remember(self):
        return backend.Compiled(self.remember, self.weights, backend.resolve_jit("auto"))

    def _next_logits(self, token_ids, padding_mask, cache, index, memory, memory_mask):
        """Float32 logits after the last column (B, V), and the cache."""
        hidden, cache = self.backbone.decode(token_ids, padding_mask, memory, memory_mask, cache, index)
        return self.logits_of(hidden[:, -1]), cache

    def prompts_of(self, sources):
        """The start of each target, and what the decoder attends to: keys and values, and their mask."""
        batch = pad_rows(sources, backend.bucket(max(map(len, sources))))
        memory = self._remember(batch["token_ids"], batch["padding_mask"])
        return [[self.start_id]] * len(sources), (memory, batch["padding_mask"])

    def _sources(self, sources, truncate):
        """Rows of token ids, and whether they came as strings."""
        text, strings = self.preprocessor, self.preprocessor is not None and not are_ids(sources)
        if strings:
            texts = check_texts([sources] if isinstance(sources, str) else sources, "sources")
            rows = text.tokenizer.encode(texts, add_bos=text.add_bos, add_eos=text.add_eos)
        else:
            rows = self._id_rows(sources, "sources")
        if text is None:
            return rows, strings
        longest = max(map(len, rows))
        if longest > text.sequence_length and not truncate:
            raise invalid(
                f"`sources` must have at most sequence_length={text.sequence_length} tokens.",
                "Pass truncate=True to cut them.",
                tokens=longest,
            )
        kept = text.cut(rows, Counter(), text.end if text.add_eos else [])  # it was asked for: no warning
        return [row.tolist() for row in kept], strings
