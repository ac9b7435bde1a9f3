"""LlamaClassifierEnsemble: classifiers that were trained apart answer as one. Shapes: B batch, C classes, M members."""

import keras
from keras import ops

from keras_llama.config import invalid
from keras_llama.heads.task import Task
from keras_llama.heads.text_classifier import LlamaTextClassifier
from keras_llama.layers import register


@register
class MeanAnswer(keras.layers.Layer):
    """Logits (B, C) of M members -> the logits (B, C) of the mean of their probabilities; of numbers, their mean."""

    def __init__(self, problem_type="single", **kwargs):
        super().__init__(**kwargs)
        self.problem_type = problem_type

    def call(self, logits):
        members = ops.stack(logits, axis=0)
        if self.problem_type == "regression":
            return ops.mean(members, axis=0)
        if self.problem_type == "single":
            return ops.logsumexp(ops.log_softmax(members, axis=-1), axis=0) - ops.log(float(len(logits)))
        # log p - log(1 - p), each the logarithm of a mean
        return ops.logsumexp(ops.log_sigmoid(members), axis=0) - ops.logsumexp(ops.log_sigmoid(-members), axis=0)

    def get_config(self):
        return {**super().get_config(), "problem_type": self.problem_type}


@register
class LlamaClassifierEnsemble(LlamaTextClassifier):
    """The mean of the probabilities of several classifiers, as one that predicts, is saved and is exported.

    Members that differ in nothing but the seed of their training err differently, so that their mean errs less
    (Lakshminarayanan et al., 2017, https://arxiv.org/abs/1612.01474), at the cost of running each.

    Args:
        members: `LlamaTextClassifier`s of different `name`s that have the same labels, problem type and vocabulary.

    Raises:
        ValueError: for members that do not go together; `save_to_preset`, for Hugging Face has no such model.

    >>> def member(name):
    ...     backbone = keras_llama.LlamaBackbone(vocabulary_size=100, **keras_llama.size("tiny"))
    ...     return keras_llama.LlamaTextClassifier(backbone, num_classes=3, name=name)
    >>> ensemble = keras_llama.LlamaClassifierEnsemble([member("first"), member("second")])
    >>> ensemble.predict(np.array([[5, 8, 2]]), verbose=0).shape
    (1, 3)
    """

    def __init__(self, members, **kwargs):
        members = list(members)
        _check(members)
        first = members[0]
        mean = MeanAnswer(first.problem_type, dtype="float32", name="mean")
        logits = mean([member(first.backbone.input) for member in members])
        Task.__init__(self, first.backbone, first.preprocessor, logits, **kwargs)
        self.members = members
        self.r_drop = max(member.r_drop for member in members)
        self._describe(first.num_classes, first.labels, first.problem_type)

    def checkpoint_settings(self):
        raise invalid(
            "An ensemble has no layout of Hugging Face.",
            "Use `save` or `export`, or save its members.",
            members=[member.name for member in self.members],
        )

    def _of_members(self, *args, **kwargs):
        raise invalid(
            "Members are trained, adapted and quantised before they are one, each alone.",
            "Call it on them and make the ensemble anew.",
            members=[member.name for member in self.members],
        )

    features = fit_head = freeze_base = unfreeze_base = quantize = _of_members
    enable_lora = add_adapter = set_adapter = load_adapter = merge_lora = write_adapter = _of_members

    def get_config(self):
        members = [keras.saving.serialize_keras_object(member) for member in self.members]
        return {"members": members, "name": self.name, "trainable": self.trainable}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        members = [keras.saving.deserialize_keras_object(member) for member in config["members"]]
        return cls(**{**config, "members": members})


def _check(members):
    if len(members) < 2 or not all(isinstance(member, LlamaTextClassifier) for member in members):
        raise invalid("`members` must be at least two classifiers.", members=[type(m).__name__ for m in members])
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        raise invalid("`members` must have different names.", "Pass `name` when building them.", names=names)
    for member in members:
        if _meaning(member) != _meaning(members[0]):
            raise invalid(
                "`members` must have the same labels, problem type and vocabulary.",
                labels=[m.labels or m.num_classes for m in members],
                problem_type=[m.problem_type for m in members],
                vocabulary_size=[m.backbone.config.vocabulary_size for m in members],
            )


def _meaning(member):
    """What its inputs and outputs stand for."""
    text = member.preprocessor
    files = None if text is None else (text.tokenizer.files, text.sequence_length, text.add_bos, text.add_eos)
    return member.labels, member.num_classes, member.problem_type, member.backbone.config.vocabulary_size, files
