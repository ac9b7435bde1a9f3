"""LlamaImageCaptioner: an image -> its caption, by an image encoder and a LLaMA decoder.

Shapes: B batch, h x w pixels, P patches, C features, T caption tokens, D hidden, V vocabulary.
"""

import functools
import pathlib
import tempfile

import keras
import numpy as np
from keras import ops

from keras_llama import backend
from keras_llama.config import invalid
from keras_llama.export import graph_images
from keras_llama.export.saved_model import IDS, STRINGS, Signature
from keras_llama.heads.conditioned import ConditionedModel
from keras_llama.heads.inputs import is_token_ids
from keras_llama.image_encoders import ImageProjector, check_encoder, keep_frozen
from keras_llama.images import augment, distinct_images, is_image, read_images
from keras_llama.layers import register
from keras_llama.preprocessing import check_texts, next_token_targets

ENCODER_FILE = "image_encoder.keras"


@register
class LlamaImageCaptioner(ConditionedModel):
    """Images and captions -> logits of each next caption token, float32 (B, T, V); `generate` writes captions.

    What an image encoder makes of an image, P features, goes through a projector and stands as P embeddings in front
    of the caption's tokens (as in LLaVA, Liu et al., 2023, https://arxiv.org/abs/2304.08485). The decoder reads both;
    the loss is the mean over the caption's tokens, perplexity and accuracy count the same.

    `fit(images, captions)` takes images as `images.read_images` does: paths, bytes, PIL images, uint8 arrays; an
    image with several captions stands there once for each, and is held once. Encoder, projector and decoder are
    trained, but for what is frozen: the encoder by Keras' own `image_encoder.trainable = False`, the decoder by
    `freeze_base()`, or by `enable_lora()`, beside whose adapters the others are trained. `from_preset` takes a
    captioner's own folder, or with `image_encoder=` the checkpoint of a text model, which is then the decoder behind a
    new projector.

    Args:
        backbone: a causal `LlamaBackbone`.
        image_encoder: a Keras model, pixels from 0 to 255, (B, h, w, 3), -> features (B, h', w', C) or (B, P, C), such
            as `convolutional_encoder()`, one of `keras.applications` or a backbone of KerasHub; h and w are fixed. If
            it expects other pixels, put a `keras.layers.Rescaling` before it, in a `keras.Sequential`.
        preprocessor: a `TextPreprocessor`, whose `sequence_length` is of the caption alone; or `None` to take and
            return token ids.
        generation_config: defaults of `generate` in the words of `generation_config.json`, as in `LlamaCausalLM`.
        label_smoothing: share of the target probability spread evenly, in the default loss.

    Raises:
        ValueError: for a bidirectional backbone or one with n-grams, an encoder of other shapes, or a context that
            does not hold patches and caption.

    >>> tokenizer = keras_llama.SentencePieceTokenizer.train(["dark", "bright"], vocabulary_size=270)
    >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=270, **keras_llama.size("tiny"))
    >>> encoder = keras_llama.convolutional_encoder(16, (8, 8))
    >>> captioner = keras_llama.LlamaImageCaptioner(backbone, encoder, keras_llama.TextPreprocessor(tokenizer, 16))
    >>> captioner.compile()
    >>> images = np.stack([np.full((16, 16, 3), value, "uint8") for value in (20, 230)] * 8)
    >>> history = captioner.fit(images, ["dark", "bright"] * 8, epochs=60, verbose=0)
    >>> captioner.generate(images[:2])
    ['dark', 'bright']
    """

    parts = (*ConditionedModel.parts, "image_encoder")
    packs = False

    def __init__(
        self,
        backbone,
        image_encoder=None,
        preprocessor=None,
        generation_config=None,
        label_smoothing=0.0,
        **kwargs,
    ):
        size, patches = check_encoder(image_encoder)
        _check_decoder(backbone, patches, preprocessor)
        projector = ImageProjector(backbone.config.hidden_dim, dtype=backbone.dtype_policy, name="projector")
        inputs = {"images": keras.Input((*size, 3), name="images"), **backbone.input}
        prefix = projector(image_encoder(inputs["images"]))
        keep_frozen(image_encoder)
        hidden = _behind(prefix, backbone, inputs["token_ids"], inputs["padding_mask"])
        super().__init__(
            backbone, preprocessor, generation_config, label_smoothing, inputs=inputs, hidden=hidden, **kwargs
        )
        self.image_encoder = image_encoder
        self.projector = projector
        self.image_size = size

    @property
    def prompt_tokens(self):
        """P and the start."""
        return self.projector.positions.embeddings.shape[0] + 1

    @property
    def text_weights(self):
        """All weights but the image encoder's, which has a file of its own and its own `trainable`."""
        own = {id(weight) for weight in self.image_encoder.weights}
        return [weight for weight in self.weights if id(weight) not in own]

    @classmethod
    def preset_options(cls, checkpoint, preprocessor):
        options = super().preset_options(checkpoint, preprocessor)
        file = encoder_file(checkpoint)
        if file is None:
            return options
        try:
            return {**options, "image_encoder": keras.saving.load_model(file, compile=False)}
        except (OSError, KeyError, ValueError) as error:
            raise invalid(f"{file}: expected a Keras model.", "Fetch it again.", error=str(error)) from error

    def fresh_weights(self, checkpoint):
        """The projector's, for the checkpoint of a text model."""
        if encoder_file(checkpoint) is not None:
            return []
        return [f"multi_modal_projector.{name}.weight" for name in ("linear_1", "linear_2", "positions")]

    def checkpoint_settings(self):
        settings = {**super().checkpoint_settings(), "differs": "image encoder"}
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, ENCODER_FILE)
            self.image_encoder.save(file)
            return {**settings, "files": {**settings["files"], ENCODER_FILE: file.read_bytes()}}

    def join(self, x, y):
        """Images and captions as the columns of one input; they come as two lists, or as such columns."""
        if self.preprocessor is None or (isinstance(x, dict) and is_token_ids(x)):
            return x, y
        if not isinstance(x, dict):
            if y is None:
                raise invalid(
                    "An image needs a caption: pass fit(images, captions), or x={'images': [...], 'captions': [...]}.",
                    "To caption images call `generate`.",
                    y=y,
                )
            x, y = {"images": x, "captions": y}, None
        return x, y

    def encode(self, x, argument="x", cut=None, predicting=False):
        if set(x) != {"captions"}:
            raise invalid(f"`{argument}` must have the keys images and captions.", **{argument: ["images", *x]})
        return {"token_ids": self.whole_texts(check_texts(x["captions"], "captions"), cut)}

    def _rows(self, x, argument="x", predicting=False, one_length=False, packing=False, cut=None):
        if not isinstance(x, dict) or "images" not in x:
            raise invalid(f"`{argument}` must be a dict with the key images.", **{argument: type(x).__name__})
        images, numbers = distinct_images(x["images"], self.image_size)
        rest = {key: value for key, value in x.items() if key != "images"}
        texts, lengths = super()._rows(rest, argument, predicting, one_length, packing, cut)
        if len(numbers) != len(lengths):
            raise invalid("There must be a caption for each image.", images=len(numbers), captions=len(lengths))

        def inputs(chosen):
            return {"images": np.stack([images[i] for i in numbers[chosen]]), **texts(chosen)}

        return inputs, lengths

    def fit(self, x=None, y=None, batch_size=None, epochs=1, *, augmentation=(), **kwargs):
        """As `Task.fit`, on images and captions.

        Args:
            x, y: images, and a caption for each; or columns {"images", "captions"}; or token ids beside images.
            augmentation: Keras layers that change the images of each training batch at random, in turn, such as
                `keras.layers.RandomFlip("horizontal")`; no other images go through them. The size must come out as it
                was: `[keras.layers.RandomCrop(56, 56), keras.layers.Resizing(64, 64)]`.
            batch_size, epochs, **kwargs: as `Task.fit` takes them.

        Raises:
            ValueError: as `Task.fit`, and for images that are broken or too large, or fewer captions than images.
        """
        self.augment = functools.partial(augment, tuple(augmentation)) if augmentation else None
        try:
            return super().fit(x, y, batch_size, epochs, **kwargs)
        finally:
            self.augment = None

    def finish_batch(self, inputs, y=None, sample_weight=None):
        """Teacher forcing: each token of the caption is to be followed by the next."""
        return inputs, *next_token_targets(inputs["token_ids"], inputs["padding_mask"], sample_weight)

    def call(self, inputs, training=None, mask=None):
        images = ops.reshape(inputs["images"], (-1, *self.image_size, 3))  # TensorFlow's datasets leave sizes open
        return super().call({**inputs, "images": images}, training, mask)

    def hidden_states(self, inputs, training=None):
        prefix = self.prefix(inputs["images"], training)
        return _behind(prefix, self.backbone, inputs["token_ids"], inputs["padding_mask"])

    def prefix(self, images, training=False):
        """Embeddings (B, P, D) of images (B, h, w, 3), pixels from 0 to 255."""
        features = self.image_encoder(ops.cast(images, self.image_encoder.compute_dtype), training=training)
        return self.projector(features)

    def generate(
        self,
        images,
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
        stop_token_ids="auto",
    ):
        """The caption of each image; settings that are not given are the defaults.

        Args:
            images: an image, or a list or array of images, as `images.read_images` takes them.
            max_new_tokens: most tokens of a caption; what the preprocessor's `sequence_length` leaves unless given.
            temperature, top_k, top_p, min_p, repetition_penalty: see `samplers.Settings`; `temperature=0`
                takes the most likely token.
            num_beams, length_penalty: of a beam search; 1 beam for none. It takes no temperature.
            seed: of the sampling; the same seed gives the same text on every backend.
            stop, stop_token_ids: as in `LlamaCausalLM.generate`.
            stream: yield text as it comes, in pieces, `stream` tokens at a time; all images run at once.
            batch_size: images at a time.

        Returns:
            A string for one image, else a list; without a preprocessor `{"token_ids", "padding_mask"}`, int32 (B, T),
            the start token left out, the stop token included.

        Raises:
            ValueError: for what is no image, is broken or too large, or a setting out of range.
        """
        alone = is_image(images)
        return self.answers(
            read_images([images] if alone else images, self.image_size),
            max_new_tokens,
            strings=self.preprocessor is not None,
            alone=alone,
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

    def prompts_of(self, sources):
        """The start of each caption behind a place for each patch, and the embeddings that stand there."""
        return [[self.start_id] * self.prompt_tokens] * len(sources), (self._prefix(np.stack(sources)),)

    def serving(self, text):
        def logits(files, token_ids, padding_mask):
            inputs = {"images": graph_images.read(files, self.image_size)}
            inputs |= {"token_ids": token_ids, "padding_mask": padding_mask}
            return {"logits": keras.Model.__call__(self, inputs, training=False)}

        of_ids = {"logits": Signature(logits, {"images": STRINGS, "token_ids": IDS, "padding_mask": IDS})}
        if text is None:
            return of_ids
        longest = self.preprocessor.sequence_length
        context = self.backbone.config.context_length or longest + self.prompt_tokens
        generated, inputs, defaults = self.generating(self.token_loop, text, context, max_new_tokens=longest - 1)
        prefix = text.compiled(self.prefix)

        def caption(files, *sampling):
            prompts = text.starting(files, self.start_id, self.prompt_tokens)
            new, stopped = generated(prompts, (prefix(graph_images.read(files, self.image_size)),), *sampling)
            return {"texts": text.decode(new), "stopped": stopped}

        return {
            "caption": Signature(caption, {"images": STRINGS, **inputs}, defaults),
            **super().serving(text),
            **of_ids,
        }

    @functools.cached_property
    def token_loop(self):
        """The `TokenLoop` over this model's steps."""
        return self.make_loop(self._next_logits, start=self._first_logits)

    @functools.cached_property
    def _prefix(self):
        return backend.Compiled(self.prefix, self.weights, backend.resolve_jit("auto"))

    def _first_logits(self, token_ids, padding_mask, cache, index, prefix):
        """Float32 logits after the start (B, V), and the cache; `prefix` stands where rows have places for it."""
        tokens = self.backbone.token_embedding(token_ids)
        places = prefix.shape[1]
        before, start = tokens[:, : -places - 1], tokens[:, -1:]
        embeddings = ops.concatenate([before, ops.cast(prefix, tokens.dtype), start], axis=1)
        hidden, cache = self.backbone.decode(token_ids, padding_mask, cache, index, embeddings)
        return self.logits_of(hidden[:, -1]), cache

    def _next_logits(self, token_ids, padding_mask, cache, index, prefix):
        """Float32 logits after the last column (B, V), and the cache, which holds `prefix` already."""
        hidden, cache = self.backbone.decode(token_ids, padding_mask, cache, index)
        return self.logits_of(hidden[:, -1]), cache

    def _calibration(self, config):
        raise invalid(
            "GPTQ and AWQ choose by texts alone, and this decoder reads images, too.",
            'Take "int8" or "int4".',
            mode=config.mode,
        )

    def _head_weights(self):
        """The projector's: beside a frozen decoder, or its adapters, it is trained."""
        return self.projector.weights

    def _rounds(self, mode, layer):
        apart = {id(weight) for weight in (*self.image_encoder.weights, *self.projector.weights)}
        return super()._rounds(mode, layer) and not any(id(weight) in apart for weight in layer.weights)


def _behind(prefix, backbone, token_ids, padding_mask):
    """Hidden states (B, T, D) of caption tokens (B, T) that stand behind embeddings (B, P, D)."""
    caption = backbone.token_embedding(token_ids)
    embeddings = ops.concatenate([ops.cast(prefix, caption.dtype), caption], axis=1)
    places = prefix.shape[1]
    ids, mask = (ops.pad(x, [[0, 0], [places, 0]], constant_values=1) for x in (token_ids, padding_mask))
    return backbone.decode(ids, mask, embeddings=embeddings)[0][:, places:]


def _check_decoder(backbone, patches, preprocessor):
    config = backbone.config
    if not config.causal or config.num_ngrams:
        raise invalid(
            "`backbone` must be causal and without n-grams.", causal=config.causal, num_ngrams=config.num_ngrams
        )
    length = 1 if preprocessor is None else preprocessor.sequence_length
    if config.context_length and patches + length > config.context_length:
        raise invalid(
            f"The backbone's context of {config.context_length} tokens must hold the patches and the caption.",
            "Take an encoder of fewer patches, or a smaller `sequence_length`.",
            patches=patches,
            sequence_length=length,
        )


def encoder_file(checkpoint):
    """The image encoder in a captioner's preset; `None` in other checkpoints."""
    file = None if checkpoint.folder is None else checkpoint.folder / ENCODER_FILE
    return file if file is not None and file.exists() else None
