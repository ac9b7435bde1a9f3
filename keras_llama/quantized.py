"""A task whose kernels have few bits: rounded as they are, or by what texts show to matter."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_llama import backend
from keras_llama.config import invalid

_MODES = ("int8", "int4")
_CALIBRATED = {"gptq": keras.quantizers.GPTQConfig, "awq": keras.quantizers.AWQConfig}
_INT4 = keras.quantizers.Int4QuantizationConfig


class Quantizable(keras.Model):
    """The part of a task that rounds its kernels, by Keras' quantizers."""

    backbone: Any
    preprocessor: Any
    head: str
    compile_options: Mapping[str, Any]

    @property
    def adapters(self) -> dict[str, dict[str, Any]]:
        """The settings of each adapter, by name."""
        return self.backbone.adapters

    @property
    def quantized(self) -> str | None:
        """What the kernels are rounded to, such as "int8" or "gptq/4/128"."""
        return self.backbone.quantized

    def quantize(self, mode=None, config=None, **kwargs):
        """Keras' `quantize` of every kernel and embedding but a classifier's head: a base for decoding, or under LoRA.

        A quantised model is saved and loaded as it is. Its kernels are no longer trained. GPTQ (Frantar et al., 2022,
        https://arxiv.org/abs/2210.17323) and AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978) choose what
        kernels of blocks are rounded to by what texts put into them, and leave embeddings and head as they are.

        Args:
            mode: "int8" (kernels a fourth of float32's size) or "int4" (an eighth).
            config: a `keras.quantizers` configuration in place of the mode, with Keras' quantizers; the `dataset` of a
                `GPTQConfig` or `AWQConfig` holds strings, or rows of token ids, and its `tokenizer` may be `None`: it
                is the task's.

        Raises:
            ValueError: for another mode or quantizers of the user's, if the model is quantised already, or has
                adapters, or if GPTQ or AWQ are asked of an encoder-decoder, of a captioner, or without a dataset of
                token ids that the model has. A calibration that fails leaves the model as it was.

        >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
        >>> lm = keras_llama.LlamaCausalLM(backbone)
        >>> lm.quantize("int8")
        >>> str(lm.backbone.blocks[0].mlp.up.kernel.dtype)
        'int8'
        """
        mode = getattr(config, "mode", mode)
        if mode not in _MODES and not isinstance(config, tuple(_CALIBRATED.values())):
            raise invalid(f"`mode` must be one of {list(_MODES)}.", "GPTQ and AWQ need their configuration.", mode=mode)
        if self.quantized or self.adapters:
            raise invalid(
                "A model is quantised once, and before it has adapters.",
                "Load it anew, or call `merge_lora()` first.",
                quantized=self.quantized,
                adapters=[*self.adapters],
            )
        quantized = mode
        if mode in _MODES and config is not None:
            quantized = _described(config)
        elif mode in _CALIBRATED:
            config = self._calibration(config)
            quantized = f"{mode}/{config.weight_bits}/{config.group_size}"
        calibrated = [layer for _, layer in self._projections()] if mode in _CALIBRATED else []
        with _as_before_unless_done(calibrated), backend.without_gradients(), warnings.catch_warnings():
            # Keras asks each layer, and most have nothing to quantise.
            warnings.filterwarnings("ignore", ".*does not have a `quantize` method")
            super().quantize(mode, config=config, filters=functools.partial(self._rounds, mode), **kwargs)
        self.backbone.quantized = quantized
        self.forget_functions()

    def quantize_as(self, quantized):
        """Makes the layers those of a model with this value of `quantized`, whose weights are still to come."""
        mode, *numbers = quantized.split("/")
        if mode in _MODES:
            return self.quantize(mode, config=_INT4(block_size=int(numbers[0])) if numbers else None)
        bits, group = map(int, numbers)
        config = _CALIBRATED[mode](None, None, weight_bits=bits, group_size=group)
        self.backbone.quantized = quantized
        for _, layer in self._projections():
            layer.quantize(mode, config=config)
            del layer._kernel  # as Keras does after the calibration
        return self.forget_functions()

    def get_quantization_layer_structure(self, mode=None):
        """What Keras runs a text through, one after another, to see what enters each kernel."""
        backbone = self.backbone
        blocks = [_Alone(backbone.positions, block) for block in backbone.blocks]
        return {"pre_block_layers": [backbone.token_embedding], "sequential_blocks": blocks}

    def _rounds(self, mode, layer):
        """Whether a layer is quantised in this mode; a classifier's head is small, and still trained."""
        if mode in _CALIBRATED:
            return any(layer is one for _, one in self._projections())
        return self.head == "lm_head" or layer.name != self.head

    def _calibration(self, config):
        """The configuration with rows of token ids."""
        if hasattr(self.backbone, "encoder_blocks") or self.backbone.config.num_ngrams:
            hint = 'Take "int8" or "int4".'
            raise invalid("GPTQ and AWQ need a model without an encoder and without n-grams.", hint, mode=config.mode)
        texts = [] if config.dataset is None else list(config.dataset)
        if not texts or (isinstance(texts[0], str) and self.preprocessor is None):
            raise invalid(
                "`dataset` must hold strings, or rows of token ids for a task without a preprocessor.",
                dataset=config.dataset,
            )
        config = copy.copy(config)
        strings = isinstance(texts[0], str)
        rows = self.preprocessor.tokenizer.encode(texts) if strings else self._id_rows(texts, "dataset")
        config.dataset, config.tokenizer = [np.asarray(row, "int32") for row in rows], self
        return config

    def forget_traces(self):
        """Drops what `generate`, `score` and `features` have compiled, which reads the weights that there were."""
        backend.find_weights(self)
        for kind in type(self).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, functools.cached_property) and kind.__module__.startswith("keras_llama"):
                    self.__dict__.pop(name, None)

    def forget_functions(self):
        """Drops all that was compiled for the model as it was; an optimiser that has its state begins anew."""
        self.forget_traces()
        self.train_function = self.test_function = self.predict_function = None
        if self.compiled and self.optimizer.built:
            self.compile(type(self.optimizer).from_config(self.optimizer.get_config()), **self.compile_options)

    def _projections(self):
        """Path and layer of every projection that may have adapters."""
        for block in (*getattr(self.backbone, "encoder_blocks", ()), *self.backbone.blocks):
            for layer in (layer for group in block.projections for layer in group):
                yield layer.path, layer  # such as block_0/attention/query


@contextlib.contextmanager
def _as_before_unless_done(layers):
    """Sets layers back if what is done to them inside ends in an error, or is interrupted.

    Keras has them all hold new weights first, and deletes the kernel of each when it has rounded it.
    """
    before = [(layer, dict(vars(layer))) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, attributes in before:
            layer._tracker.unlock()
            for name in vars(layer).keys() - attributes.keys():
                delattr(layer, name)
            for name, value in attributes.items():
                if vars(layer).get(name) is not value:
                    setattr(layer, name, value)
            layer._tracker.lock()
            backend.find_weights(layer)
        raise


def _described(config) -> str:
    """The `quantized` of a configuration that is Keras' own but for the size of int4's blocks."""
    default, given = type(config)().get_config(), config.get_config()
    size, usual = given.pop("block_size", None), default.pop("block_size", None)
    if given != default:
        raise invalid("`config` must have Keras' own quantizers: no others are saved.", config=given)
    return config.mode if size == usual else f"{config.mode}/{size or -1}"


class _Alone(keras.layers.Layer):
    """A block with nothing beside hidden states (B, T, D) to be told: no row has padding."""

    def __init__(self, positions, block):
        super().__init__(autocast=False)
        self.positions, self.block = positions, block

    def call(self, x):
        ones = ops.ones(ops.shape(x)[:2], "int32")
        hidden, _ = self.block(x, *self.positions(ones, ones))
        return hidden
