"""Files: a task in a `.keras` file, in a preset, and from a checkpoint."""

import dataclasses
import pathlib
from typing import Any

import keras

from keras_llama.adapters import Adaptable
from keras_llama.backbone import LlamaBackbone
from keras_llama.beside import written_beside
from keras_llama.checkpoints import hf, loader, mapping, presets
from keras_llama.config import invalid
from keras_llama.layers import no_random_weights
from keras_llama.opening import open_tokenizer
from keras_llama.preprocessing import TextPreprocessor
from keras_llama.spelled import SpelledTokenizer


class Files(Adaptable):
    """The half of a task that reads and writes it.

    A head overrides what differs:
        `preset_options`, `checkpoint_settings`: what it takes from a checkpoint, and writes into one,
        `fresh_weights`: what of it a checkpoint may lack.
    """

    preprocessor: Any
    backbone: Any
    backbone_class: Any = LlamaBackbone
    parts: tuple[str, ...] = ("backbone", "preprocessor")  # the arguments that are objects of Keras' own kind
    head = ""  # its weights' name in the words of Hugging Face: "lm_head", "score", "qa_outputs"
    base = "model."  # what stands there before the names of the backbone's weights

    @classmethod
    def from_preset(cls, preset, dtype=None, sequence_length=None, num_layers=None, **options):
        """The task with the weights, the tokenizer and the settings of a checkpoint.

        Args:
            preset: a Hugging Face directory; a `.gguf` file; a llama2.c `.bin` file; `hf://org/name`, with
                `@revision` if wanted; "smollm2_135m_instruct"; a KerasHub preset or backbone.
            dtype: a Keras dtype policy or its name; `None` takes the global policy if it is not float32,
                else the dtype in which the checkpoint loses nothing (bfloat16 for quantised files). To
                train all weights pass "mixed_bfloat16" or "float32".
            sequence_length: longest text to train on, in tokens; the checkpoint's own, at most 2,048, unless given.
            num_layers: take the first so many blocks alone, to fine-tune a shallower model; all of them unless given.
            **options: of the task, such as `labels`; a head that the checkpoint lacks starts at random, and a line
                says so.

        Raises:
            ValueError: if the checkpoint cannot be read or does not fit, in one table of names, or if
                `sequence_length` is above its context, or `num_layers` above its blocks.
        """
        checkpoint = presets.open_checkpoint(preset)
        if num_layers is not None:
            checkpoint = loader.first_layers(checkpoint, num_layers)
        context = checkpoint.config.context_length
        if isinstance(sequence_length, int) and context and sequence_length > context:
            raise invalid(
                f"`sequence_length` must be at most the model's context of {context} tokens.",
                sequence_length=sequence_length,
            )
        own = checkpoint.options.get("preprocessor", {})
        preprocessor = None
        if checkpoint.tokenizer_files:
            tokenizer = open_tokenizer(checkpoint.tokenizer_files)
            length = sequence_length or own.get("sequence_length") or min(context or 2048, 2048)
            flags = {"add_bos": tokenizer.default_add_bos, "add_eos": tokenizer.default_add_eos, **own}
            preprocessor = TextPreprocessor(tokenizer, **{**flags, "sequence_length": length})
        options = {**cls.preset_options(checkpoint, preprocessor), **options}
        backbone = loader.build_backbone(checkpoint, dtype, cls=cls.backbone_class)
        with no_random_weights():
            task = cls(backbone, preprocessor=preprocessor, **options)
        fresh = set(task.fresh_weights(checkpoint)) - set(checkpoint.tensors)
        loader.load(task, checkpoint, fresh, task.text_weights)
        if fresh:
            print(f"{checkpoint.source} has no {', '.join(sorted(fresh))}: drawn at random, to be trained")
        return task

    @classmethod
    def preset_options(cls, checkpoint, preprocessor):
        """Arguments of the constructor that a checkpoint decides."""
        return {}

    def fresh_weights(self, checkpoint):
        """Hugging Face's names of the head's weights that a checkpoint of another task may lack."""
        names = (mapping.from_ours(variable.path)[1] for variable in self.weights)
        return [name for name in names if checkpoint.head != self.head == name.split(".")[0]]

    def checkpoint_settings(self):
        """What a checkpoint says of this task beside its weights, for `save_checkpoint`."""
        if self.quantized:
            raise invalid(
                "A checkpoint of other tools holds the weights before `quantize`.",
                'Write it before, or a "q8_0" GGUF file from the model as it was.',
                quantized=self.quantized,
            )
        if self.adapters:
            raise invalid(
                "A checkpoint holds kernels, and this model has adapters beside them.",
                'Call `merge_lora()` first, or write them apart by `save_checkpoint(format="peft")`.',
                adapters=[*self.adapters],
            )
        config, tokenizer = self.backbone.config, None if self.preprocessor is None else self.preprocessor.tokenizer
        fields = {**hf.fields_from_config(config), "dtype": self.dtype_policy.variable_dtype}
        fields["torch_dtype"] = fields["dtype"]  # the older spelling
        if tokenizer is not None:
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
            fields |= {name: token for name, token in ids.items() if token >= 0}
        return {
            "fields": fields,
            "prefix": self.base,
            "files": {} if tokenizer is None else tokenizer.files,
            "generation": {},
            "options": {},
            "differs": _difference(config, tokenizer),
        }

    def save_to_preset(self, directory, *, overwrite=False):
        """Writes a folder that `from_preset` reads back whole, in the layout that other tools read too.

        It is Hugging Face's: safetensors, `config.json`, tokenizer files; and `keras_llama.json` for what
        those have no field for. A model that other tools would compute otherwise is marked as one that
        they do not know.

        Raises:
            ValueError: if `directory` holds files and `overwrite` is not set.
        """
        settings = self.checkpoint_settings()
        config = self.backbone.config
        own = {
            "version": 1,
            "class": type(self).__name__,
            "config": {name: value for name, value in dataclasses.asdict(config).items() if name in _OWN_FIELDS},
            "options": settings["options"],
        }
        if self.preprocessor is not None:
            flags = ("sequence_length", "add_bos", "add_eos")
            own["options"]["preprocessor"] = {name: getattr(self.preprocessor, name) for name in flags}
        if settings["differs"]:
            settings["fields"]["model_type"] = "keras_llama"
        presets.write_directory(self, settings, directory, own, overwrite)

    def save(self, filepath, overwrite=True, **kwargs):
        """Keras' `save` to a `.keras` file, written beside and renamed, so that a former file stays whole.

        Raises:
            ValueError: for another ending; `.h5` cannot hold the vocabulary and the optimiser.
        """
        path = pathlib.Path(filepath)
        if path.suffix != ".keras":
            raise invalid(
                "`filepath` must end in .keras.",
                "A task holds more than an .h5 file can: its vocabulary, and the state of its optimiser.",
                filepath=str(filepath),
            )
        if path.exists() and not overwrite:
            raise invalid("`filepath` must not exist when overwrite=False.", filepath=str(filepath))
        with written_beside(path) as unfinished:
            super().save(unfinished, **kwargs)

    def save_assets(self, directory):
        if self.preprocessor is not None:
            self.preprocessor.tokenizer.save_assets(directory)

    def load_assets(self, directory):
        if self.preprocessor is not None:
            self.preprocessor.tokenizer.load_assets(directory)
            self._check_vocabulary()

    def get_config(self):
        return {
            **{part: keras.saving.serialize_keras_object(getattr(self, part)) for part in self.parts},
            "name": self.name,
            "trainable": self.trainable,
            "adapters": self.adapter_settings,
            "base_frozen": self.base_frozen,
            "quantized": self.quantized,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = {**config, **{part: keras.saving.deserialize_keras_object(config[part]) for part in cls.parts}}
        adapters, quantized = config.pop("adapters", None), config.pop("quantized", None)
        frozen = config.pop("base_frozen", False)
        task = cls(**config)
        if quantized:
            task.quantize_as(quantized)
        if adapters:
            task.add_adapters(adapters)
        if frozen:
            task.freeze_base()
        return task

    def _check_vocabulary(self):
        tokens, size = self.preprocessor.tokenizer.vocabulary_size, self.backbone.config.vocabulary_size
        if tokens > size:
            raise invalid(
                "The backbone's `vocabulary_size` must be at least the tokenizer's.",
                "Build the backbone with `vocabulary_size=tokenizer.vocabulary_size`.",
                vocabulary_size=size,
                tokenizer_vocabulary_size=tokens,
            )


def _difference(config, tokenizer):
    """What other tools would compute otherwise, "" if nothing."""
    if isinstance(tokenizer, SpelledTokenizer):
        return "spelled subwords"
    if config.num_ngrams:
        return "n-gram embeddings"
    if not config.final_norm:
        return "model without a last norm"
    return "" if config.causal else "bidirectional attention"


# Of the configuration, what `config.json` has no field for, or none that may be empty.
_OWN_FIELDS = (
    "causal",
    "dropout",
    "context_length",
    "num_encoder_layers",
    "share_embeddings",
    "num_ngrams",
    "embedding_dropout",
    "final_norm",
)
