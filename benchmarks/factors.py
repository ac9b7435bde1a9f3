"""What each choice of the classification recipe is worth: one factor changed at a time, on validation rows.

    python -m benchmarks.factors --data train.txt --test-data test.txt --limit 20000 [--only "label smoothing"]

Every row of the table is a training from the same seed; the flags of the recipe may follow. The test rows are not read.
"""

import argparse
import time
from unittest import mock

import keras
import keras_hub
import numpy as np
import tensorflow as tf

import keras_llama
from tasks import classification, classifiers, common

FLAGS = {
    "the recipe": [],
    "another seed": ["--seed", "1"],
    "vocabulary 4,000": ["--vocabulary-size", "4000"],
    "vocabulary 16,000": ["--vocabulary-size", "16000"],
    "no n-grams": ["--ngram-count", "0"],
    "learning rate 1e-3": ["--learning-rate", "1e-3"],
    "learning rate 4e-3": ["--learning-rate", "4e-3"],
    "weight decay 0": ["--weight-decay", "0"],
    "weight decay 0.6": ["--weight-decay", "0.6"],
    "label smoothing 0": ["--label-smoothing", "0"],
    "label smoothing 0.2": ["--label-smoothing", "0.2"],
    "dropout of blocks 0": ["--dropout", "0"],
    "dropout of blocks 0.3": ["--dropout", "0.3"],
    "dropout of embeddings 0": ["--embedding-dropout", "0"],
    "dropout of the head 0": ["--head-dropout", "0"],
    "no second pass": ["--r-drop", "0"],
    "a second pass of weight 3": ["--r-drop", "3"],
    "two blocks": ["--size", "0.3m"],
    "balanced class weights": ["--class-weights", "balanced"],
    "batches of 64": ["--batch-size", "64"],
    "six epochs, the best kept": ["--epochs", "6", "--patience", "6"],
    "Muon": ["--optimizer", "muon"],
    "a causal language model first, 2 epochs": ["--pretrain-epochs", "2"],
}


def unclipped(options):
    options["optimizer"].global_clipnorm = None
    return options


def clipped_hard(options):
    options["optimizer"].global_clipnorm = 0.1
    return options


def scheduled(make):
    """The recipe's optimiser with another schedule: `make(peak, steps)`."""

    def change(options):
        cosine = options["optimizer"]._learning_rate
        steps = cosine.decay_steps + cosine.warmup_steps
        options["optimizer"]._learning_rate = make(cosine.warmup_target, steps)
        return options

    return change


schedules = keras.optimizers.schedules
COMPILED = {
    "no clipping": unclipped,
    "gradients clipped to 0.1": clipped_hard,
    "a constant rate": scheduled(lambda peak, _: schedules.ExponentialDecay(peak, 1, 1.0)),
    "no warm-up": scheduled(lambda peak, steps: schedules.CosineDecay(peak, steps, alpha=0.05)),
    "linear decay without warm-up": scheduled(lambda peak, steps: schedules.PolynomialDecay(peak, steps, 0.05 * peak)),
    "exponential decay": scheduled(lambda peak, steps: schedules.ExponentialDecay(peak, steps, 0.05)),
}


def regularised(regularizer):
    """A penalty on the matrices of the blocks and the head."""

    def change(model, *_):
        for weight in model.trainable_variables:
            if weight.name == "kernel":
                weight.regularizer = regularizer

    return change


def augmented(make):
    """Each epoch reads the texts with characters changed at random by a layer of keras_hub."""

    class Changed(keras.utils.PyDataset):
        def __init__(self, texts, labels, size):
            super().__init__()
            self.texts, self.labels, self.size = np.array(texts), np.array(labels), size
            self.layer, self.random = make(), np.random.default_rng(0)
            self.on_epoch_end()

        def __len__(self):
            return -(-len(self.texts) // self.size)

        def on_epoch_end(self):
            self.order = self.random.permutation(len(self.texts))

        def __getitem__(self, index):
            rows = self.order[index * self.size : (index + 1) * self.size]
            changed = self.layer(tf.strings.unicode_split(self.texts[rows], "UTF-8"))
            texts = ["".join(text) or old for text, old in zip(changed, self.texts[rows], strict=True)]
            return [str(text) for text in texts], list(self.labels[rows])

    def change(model, *_):
        plain = model.fit

        def fit(texts, labels, batch_size, sample_weight, **options):
            return plain(Changed(texts, labels, batch_size), **options)

        model.fit = fit

    return change


UNKNOWN = 0  # of a SentencePiece vocabulary


class Masked(keras.utils.PyDataset):
    """Batches of texts, a part of whose subwords is hidden, drawn anew each epoch, and what stood there as targets."""

    def __init__(self, preprocessor, texts, size, share=0.15):
        super().__init__()
        self.preprocessor, self.rows = preprocessor, preprocessor.encode(texts)
        self.size, self.share, self.random = size, share, np.random.default_rng(0)
        self.whole = len(preprocessor.tokenizer.spelling)  # ids from here on stand for characters before the last
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.rows) // self.size)

    def on_epoch_end(self):
        self.order = self.random.permutation(len(self.rows))

    def __getitem__(self, index):
        rows = [self.rows[i] for i in self.order[index * self.size : (index + 1) * self.size]]
        inputs = self.preprocessor.pad({"token_ids": rows})
        ids = inputs["token_ids"]
        ends = np.pad(ids[:, :-1] < self.whole, [[0, 0], [1, 0]]).cumsum(axis=1)  # which subword each token is of
        hidden = np.take_along_axis(self.random.random(ids.shape) < self.share, ends, axis=1)
        hidden &= inputs["padding_mask"] > 0
        inputs["token_ids"] = np.where(hidden, UNKNOWN, ids)
        return inputs, ids, hidden.astype("float32")


def masked_first(epochs):
    """Blocks that first learn to tell hidden subwords from those around them (Devlin et al., 2018)."""

    def change(model, recipe, texts):
        backbone = model.backbone
        normal = keras.layers.RMSNormalization()(backbone.output)
        head = keras.layers.Dense(backbone.config.vocabulary_size, name="head")
        learner = keras.Model(backbone.input, head(normal))
        learner.head = head.name
        options = common.compile_options(learner, recipe, len(texts), epochs)
        learner.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
        learner.fit(Masked(model.preprocessor, texts, recipe.batch_size), epochs=epochs, verbose=2)

    return change


def pooled(pooling, causal):
    """Blocks that read backwards, too, or do not, and what stands for the whole text: the mean, or its last token."""

    def change(model, recipe, _):
        old = model.backbone
        backbone = keras_llama.LlamaBackbone.from_config({**old.get_config(), "causal": causal, "name": "other"})
        backbone.set_weights(old.get_weights())  # n-grams that are known, too
        options = {"labels": model.labels, "preprocessor": model.preprocessor}
        options |= {"dropout": recipe.head_dropout, "r_drop": recipe.r_drop}
        return keras_llama.LlamaTextClassifier(backbone, pooling=pooling, **options)

    return change


BUILT = {
    "causal blocks": pooled("mean", causal=True),
    "causal blocks, the last token in place of the mean": pooled("last", causal=True),
    "a masked language model first, 2 epochs": masked_first(2),
    "L1 1e-6": regularised(keras.regularizers.L1(1e-6)),
    "L2 1e-4": regularised(keras.regularizers.L2(1e-4)),
    "a tenth of the characters dropped": augmented(lambda: keras_hub.layers.RandomDeletion(0.1, seed=0)),
    "characters swapped, a tenth": augmented(lambda: keras_hub.layers.RandomSwap(0.1, seed=0)),
}


def validated(recipe, compiled, built) -> tuple[float, float]:
    """The validation accuracy of one training, and what it had been after its last epoch, were that kept."""
    train, validation, _, labels = classification.load(recipe)
    options = common.compile_options
    keras.utils.set_random_seed(recipe.seed)
    texts = [row[0] for row in train]
    model = classifiers.build(recipe, texts, labels)
    model = built(model, recipe, texts) or model
    with mock.patch.object(common, "compile_options", lambda *given: compiled(options(*given))):
        _, (history,), _ = classifiers.fit(recipe, [model], [], train, validation)
    found = [row["label"] for row in model.classify([row[0] for row in validation])]
    kept = np.mean([label == row[1] for label, row in zip(found, validation, strict=True)])
    return float(kept), history["val_accuracy"][-1]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*FLAGS, *COMPILED, *BUILT]
    flags.add_argument("--only", nargs="+", choices=names, default=names, metavar="FACTOR")
    args, rest = flags.parse_known_args()
    print("| | validation accuracy | of the last epoch | seconds |\n|---|---|---|---|")
    for name in args.only:
        recipe = classification.parser().parse_args([*rest, *FLAGS.get(name, [])])
        started = time.perf_counter()
        found = validated(recipe, COMPILED.get(name, lambda options: options), BUILT.get(name, lambda *_: None))
        print(f"| {name} | {found[0]:.4f} | {found[1]:.4f} | {time.perf_counter() - started:.0f} |", flush=True)
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
