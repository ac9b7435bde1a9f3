"""A task whose base is frozen, with LoRA adapters beside it: by name, switched, merged, saved."""

import math
import numbers
import pathlib
import re

import keras
import numpy as np
from keras import ops

from keras_llama.checkpoints import mapping, peft
from keras_llama.config import invalid
from keras_llama.quantized import Quantizable

_TARGETS = {"attention": r"attention/", "all-linear": r""}
_TASK_TYPES = {"lm_head": "CAUSAL_LM", "score": "SEQ_CLS", "qa_outputs": "QUESTION_ANS"}


class Adaptable(Quantizable):
    """The part of a task that trains few weights beside frozen ones.

    The adapters of one name stand beside the kernels that they were made for. Those in use are trained; all are saved
    in a `.keras` file, and apart from the base by `save_checkpoint(format="peft")`.
    """

    base_frozen: bool
    base: str

    @property
    def text_weights(self):
        """The weights that a checkpoint names and an adapter's training freezes: all, unless a head reads images."""
        return self.weights

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter in use."""
        return self.backbone.active_adapter

    def enable_lora(self, rank=8, *, alpha=None, dropout=0.0, targets="attention", name="default"):
        """Freezes the weights and puts adapters beside kernels (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

        The head of a classifier stays trainable. For more than one adapter call it once for each. Tasks that share a
        backbone share its adapters, but each has its own head, one for all of them.

        Args:
            rank: columns of A and rows of B, at least 1, at most the smaller side of each kernel.
            alpha: what is added is scaled by alpha / rank; 2 * rank unless given.
            dropout: share of an adapter's inputs that training leaves out.
            targets: "attention" (query, key, value and output), "all-linear" (those and the MLP's), or a regular
                expression that is searched for in paths such as "block_0/attention/query".
            name: of the adapter.

        Raises:
            ValueError: for a rank out of range, targets that match nothing or are no regular expression, a name in
                use or with a "." or "/", or dropout in a model with `remat`.

        >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
        >>> lm = keras_llama.LlamaCausalLM(backbone)
        >>> lm.enable_lora(rank=2, targets="query|value")
        trainable parameters: 1,792 of 372,096 (0.5 %)
        """
        settings = {"rank": rank, "alpha": 2 * rank if alpha is None else alpha, "dropout": dropout, "targets": targets}
        self._check_settings(name, **settings)
        chosen = [path for path, _ in self._targeted(targets)]
        self.add_adapter(name, chosen, rank=rank, alpha=settings["alpha"], dropout=dropout)
        trainable, total = (_count(weights) for weights in (self.trainable_weights, self.weights))
        print(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.1f} %)")

    def add_adapter(self, name, paths, *, rank, alpha, dropout=0.0):
        """Adapters beside the projections of these paths, in use from now on; see `enable_lora`."""
        layers = dict(self._projections())
        for path in paths:
            layers[path].add_adapter(name, rank=rank, alpha=alpha, rate=dropout)
        self.adapters[name] = {"paths": list(paths), "rank": rank, "alpha": alpha, "dropout": dropout}
        self.set_adapter(name)

    def set_adapter(self, name):
        """Takes the adapter of this name into use; `None` is the base alone.

        Raises:
            ValueError: for a name that is not there.
        """
        if name is not None and name not in self.adapters:
            raise invalid("`name` must be of an adapter of this model, or None.", name=name, adapters=[*self.adapters])
        self.backbone.active_adapter = name
        for _, layer in self._projections():
            layer.active = name or ""
        adapters = [layer.adapter for _, layer in self._projections() if layer.adapter is not None]
        self._train_only([*(weight for adapter in adapters for weight in adapter.weights), *self._head_weights()])

    def freeze_base(self):
        """Trains nothing but the head from now on; an adapter in use stays as it is.

        The base is frozen for every task that shares it, and in a `.keras` file too, until `unfreeze_base()`.

        Raises:
            ValueError: for a language model, whose head is part of the base.

        >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
        >>> classifier = keras_llama.LlamaTextClassifier(backbone, num_classes=3)
        >>> classifier.freeze_base()
        >>> [weight.path for weight in classifier.trainable_weights]
        ['score/kernel']
        """
        if not self._head_weights():
            raise invalid(
                "A task must have a head of its own to be trained without its base.",
                "`enable_lora` trains little of a language model.",
                head=self.head,
            )
        self._train_only(self._head_weights())
        self.base_frozen = True

    def unfreeze_base(self):
        """Trains every weight from now on.

        Raises:
            ValueError: if the model has adapters, or is quantised.

        >>> backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
        >>> classifier = keras_llama.LlamaTextClassifier(backbone, num_classes=3)
        >>> classifier.freeze_base()
        >>> classifier.unfreeze_base()
        >>> len(classifier.trainable_weights) == len(classifier.weights)
        True
        """
        if self.adapters or self.quantized:
            raise invalid(
                "A base is frozen for good if it is quantised, and as long as it has adapters.",
                "Call `merge_lora()`, or load a base that is not quantised.",
                adapters=[*self.adapters],
                quantized=self.quantized,
            )
        self._train_only(self.weights)

    def merge_lora(self):
        """Adds the adapter in use to the kernels beside it, and takes all adapters away; every weight is trainable.

        Raises:
            ValueError: if no adapter is in use, or a kernel is quantised.
        """
        if self.active_adapter is None:
            raise invalid(
                "An adapter must be in use to be merged.", "Call `enable_lora` or `set_adapter`.", active=None
            )
        layers = [layer for _, layer in self._projections()]
        if self.quantized:
            raise invalid("A quantised kernel takes no adapter in.", "Load the base anew.", quantized=self.quantized)
        for layer in layers:
            if layer.adapter is not None:
                layer.kernel.assign(layer.merged_kernel(layer.kernel.dtype))
            layer.remove_adapters()
        self.adapters.clear()
        self.backbone.active_adapter = None
        self._train_only(self.weights)

    def load_adapter(self, directory, name=None):
        """Reads an adapter that PEFT or `save_checkpoint(format="peft")` wrote, and takes it into use.

        The weights of a head that were trained beside it replace this model's.

        Args:
            directory: with adapter_config.json and adapter_model.safetensors.
            name: of the adapter here; the directory's own, with "_" for ".", unless given.

        Raises:
            ValueError: for an adapter of another base, by the first module that differs; for options beyond plain
                LoRA; for a name in use; for dropout in a model with `remat`. The model is then as it was.
        """
        name = pathlib.Path(directory).name.replace(".", "_") if name is None else name
        found = peft.read(directory)
        layers = {_module(layer): (path, layer) for path, layer in self._projections()}
        for module, pair in found.modules.items():
            shapes = [array.shape for array in pair]
            if module not in layers:
                raise invalid(
                    f"{directory}: expected an adapter of this base.", "It has no such module.", module=module
                )
            kernel = layers[module][1].sizes
            if shapes != [(found.rank, kernel[0]), (kernel[1], found.rank)]:
                raise invalid(f"{directory}: {module} must fit a kernel {kernel}.", rank=found.rank, shapes=shapes)
        heads = {mapping.from_ours(weight.path)[1]: weight for weight in self._head_weights()}
        for module, array in found.heads.items():
            if module not in heads or heads[module].shape[::-1] != array.shape:
                own = {module: weight.shape[::-1] for module, weight in heads.items()}
                raise invalid(f"{directory}: expected weights of the head {own}.", module=module, shape=array.shape)
        self._check_name(name)
        self._check_dropout(found.dropout)
        paths = [layers[module][0] for module in found.modules]
        self.add_adapter(name, paths, rank=found.rank, alpha=found.alpha, dropout=found.dropout)
        for module, pair in found.modules.items():
            adapter = layers[module][1].adapter
            for weight, array in zip((adapter.a, adapter.b), pair, strict=True):
                weight.assign(array.T.astype("float32"))
        for module, array in found.heads.items():
            heads[module].assign(array.T)

    def write_adapter(self, directory, overwrite=False):
        """Writes the adapter in use, and the head that was trained beside it, for PEFT; see `save_checkpoint`."""
        if self.active_adapter is None:
            raise invalid(
                "An adapter must be in use to be written.", "Call `enable_lora` or `set_adapter`.", active=None
            )
        settings = self.adapters[self.active_adapter]
        modules = {
            _module(layer): tuple(ops.convert_to_numpy(weight).T for weight in (layer.adapter.a, layer.adapter.b))
            for _, layer in self._projections()
            if layer.adapter is not None
        }
        heads = {
            mapping.from_ours(w.path)[1]: ops.convert_to_numpy(ops.cast(w, "float32")).T for w in self._head_weights()
        }
        adapter = peft.Adapter(settings["rank"], settings["alpha"], settings["dropout"], modules, heads)
        peft.write(directory, adapter, _TASK_TYPES.get(self.head), self.base, overwrite)

    @property
    def adapter_settings(self):
        """What `add_adapters` makes the same adapters of in another model of this kind."""
        made = {name: {**settings, "paths": list(settings["paths"])} for name, settings in self.adapters.items()}
        return {"made": made, "active": self.active_adapter}

    def add_adapters(self, settings):
        """The adapters of `adapter_settings`, untrained."""
        for name, made in settings["made"].items():
            self.add_adapter(name, **made)
        if settings["made"]:
            self.set_adapter(settings["active"])

    def _head_weights(self):
        """The head's weights, where it is trained beside an adapter; a language model's is the base's own."""
        return [] if self.head == "lm_head" else [w for w in self.weights if w.path.startswith(f"{self.head}/")]

    def _train_only(self, weights):
        chosen = {id(weight) for weight in weights}
        for weight in self.text_weights:  # whole numbers, such as a list of n-grams, are never trained
            weight.trainable = id(weight) in chosen and keras.backend.is_float_dtype(weight.dtype)
        self.base_frozen = False
        self.forget_functions()

    def _targeted(self, targets):
        try:
            pattern = re.compile(_TARGETS.get(targets, targets))
        except (re.error, TypeError) as error:
            raise invalid(
                f"`targets` must be one of {[*_TARGETS]} or a regular expression.", targets=targets
            ) from error
        found = [(path, layer) for path, layer in self._projections() if pattern.search(path)]
        if not found:
            known = sorted({re.sub(r"block_\d+", "block_0", path) for path, _ in self._projections()})
            raise invalid(f"`targets` must match some of {known}.", targets=targets)
        return found

    def _check_settings(self, name, rank, alpha, dropout, targets):
        sides = [min(layer.sizes) for _, layer in self._targeted(targets)]
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(sides):
            raise invalid(f"`rank` must be an integer from 1 to {min(sides)}, the least side of a kernel.", rank=rank)
        known = all(isinstance(value, numbers.Real) for value in (dropout, alpha))
        if not known or not 0 <= dropout < 1 or not 0 < alpha < math.inf:
            raise invalid("`dropout` must lie in [0, 1), and `alpha` be above 0.", dropout=dropout, alpha=alpha)
        self._check_name(name)
        self._check_dropout(dropout)

    def _check_dropout(self, dropout):
        if dropout and self.backbone.remat:
            raise invalid("`dropout` must be 0 in a model with `remat`, which draws nothing twice.", dropout=dropout)

    def _check_name(self, name):
        if not isinstance(name, str) or not re.fullmatch(r"[^./]+", name) or name in self.adapters:
            hint = 'Without "." and "/", which part the paths of weights.'
            raise invalid(
                "`name` must be a string that no adapter has yet.", hint, name=name, adapters=[*self.adapters]
            )


def _module(layer) -> str:
    """Hugging Face's name of a projection, such as layers.0.self_attn.q_proj."""
    return mapping.from_ours(f"{layer.path}/kernel")[1].removesuffix(".weight")


def _count(weights) -> int:
    return sum(int(np.prod(weight.shape)) for weight in weights)
