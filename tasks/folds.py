"""k folds of labelled rows, and what the recipe's model says of each when it is trained on the others."""

import argparse
import functools

import numpy as np

from tasks import classifiers, common


class Folds:
    """Rows in --folds parts; equal texts stay together, and each part has its share of every label."""

    def __init__(self, args, rows, labels, more=()):
        if args.preset and _may_know_rows(args.preset):
            raise common.DataError(f"--preset {args.preset}: may have been trained on the rows that it would be asked.")
        self.args, self.rows, self.labels, self.more = args, rows, labels, list(more)
        self.held = split(rows, labels, args.folds)

    def probabilities(self, fold, args=None):
        """Those of each label for the rows of a fold, (n, C); `args` may differ from those of the others."""
        from keras import ops

        changes = {"resume": None, "tensorboard": False, "profile": False}
        args = argparse.Namespace(**{**vars(args or self.args), **changes})
        held = set(self.held[fold].tolist())
        rest = [row for i, row in enumerate(self.rows) if i not in held]
        train, validation = common.split(rest, args.validation_share)
        asked = [self.rows[i] for i in self.held[fold]]
        answer = self._by_a_head if args.trainable == "head" else self._by_a_whole
        return ops.convert_to_numpy(answer(args, train, validation, asked))

    def _by_a_whole(self, args, train, validation, asked):
        models = classifiers.built(args, [text for text, *_ in train], self.labels)
        model, *_ = classifiers.fit(args, models, self.more, train, validation)
        return model.probabilities(model.predict([text for text, *_ in asked], verbose=0))

    def _by_a_head(self, args, train, validation, asked):
        import keras

        base, vectors = self._base  # which draws random weights when it is asked for first
        keras.utils.set_random_seed(args.seed)
        train, validation, asked = (
            [(vectors[text], *others) for text, *others in part] for part in (train, validation, asked)
        )
        model = classifiers.head(args, base.backbone, self.labels)
        classifiers.train(args, model, train, validation)
        head = keras.Model(model.head_input, model.output)
        return model.probabilities(head.predict(np.stack([vector for vector, *_ in asked]), verbose=0))

    @functools.cached_property
    def _base(self):
        """The model of --preset, and the vector of each text, which no fold changes."""
        base = classifiers.build(self.args, [], self.labels)
        texts = sorted({text for text, *_ in self.rows})
        return base, dict(zip(texts, base.features(texts), strict=True))


def _may_know_rows(preset):
    """Whether a preset was trained on labels: which rows it saw is not told."""
    if common.is_file(preset):
        return True
    from keras_llama import LlamaTextClassifier
    from keras_llama.checkpoints.presets import open_checkpoint

    return open_checkpoint(preset).head == LlamaTextClassifier.head


def split(rows, labels, count):
    """The numbers of the rows of each of `count` folds."""
    from sklearn.model_selection import StratifiedGroupKFold

    texts = {label: {text for text, found, _ in rows if found == label} for label in labels}
    rarest = min(labels, key=lambda label: len(texts[label]))
    if not 2 <= count <= len(texts[rarest]):
        raise common.DataError(
            f"--folds must be at least 2, and at most the number of texts of each label; {rarest!r} has "
            f"{len(texts[rarest])} to train on. Received: {count}."
        )
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=common.SPLIT_SEED)
    named, grouped = ([row[i] for row in rows] for i in (1, 0))
    return [held for _, held in folds.split(rows, named, grouped)]
