"""Training speed of the two Transformers of `benchmarks.translation`, in turns within one process.

    python -m benchmarks.translation_speed --data cmn.txt [--rounds 8] [--steps 60] [--optimizer adamw]

Same rows, vocabulary, batch size and precision; the first round, which traces, is left out. A turn of one model is
divided by the turn of the other beside it, since a machine's pace changes from minute to minute: the median counts.
"""

import argparse
import random
import statistics
import types

import keras

from benchmarks import translation, translation_peers
from benchmarks.translation import BATCH_SIZE, OWN, VOCABULARY_SIZE
from keras_llama.losses import TokenCrossentropy
from tasks import common, translators


class Turns:
    """A compiled model and its batches; `tokens_per_second` trains some steps more."""

    def __init__(self, model, fit, tokens):
        self.model, self.fit, self.tokens = model, fit, tokens

    def tokens_per_second(self, steps):
        watch = translation.Budget(1e-3, minutes=60)
        self.fit(steps, watch)
        return self.tokens * watch.steps_per_second()


def project(rows, name, tokens):
    model = translators.build(types.SimpleNamespace(**OWN, dropout=0.1), rows)
    model.compile(common.optimizer(name, 1e-3, 0.05, model.head), weighted_metrics=None, jit_compile=False)
    columns = [list(column) for column in zip(*rows, strict=True)]

    def fit(steps, watch):
        part = [column[: steps * BATCH_SIZE] for column in columns]
        model.fit(*part, batch_size=BATCH_SIZE, verbose=0, callbacks=[watch])

    return Turns(model, fit, tokens)


def keras_hub(rows, name, tokens):
    settings = translation_peers.SETTINGS["keras_hub"]
    tokenizer = translators.joint_vocabulary(rows, VOCABULARY_SIZE)

    def build(width):
        return settings.build(tokenizer.vocabulary_size, width, settings.depth, settings.dropout, tokenizer.pad_id)

    keras.config.set_dtype_policy(settings.dtype)
    model = build(translation_peers.fitting_width(build, translation.PARAMETERS))
    model.compile(common.optimizer(name, 1e-3, 0.05, "embedding"), TokenCrossentropy(0.1), jit_compile=False)
    english, chinese = (list(column) for column in zip(*rows, strict=True))
    read, written = tokenizer.encode(english, add_eos=True), tokenizer.encode(chinese, add_bos=True, add_eos=True)

    def fit(steps, watch):
        rows = steps * BATCH_SIZE
        batches = translation_peers.dataset(read[:rows], written[:rows], BATCH_SIZE, tokenizer.pad_id, seed=0)
        model.fit(batches, shuffle=False, verbose=0, callbacks=[watch])

    return Turns(model, fit, tokens)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True, help="source<TAB>target lines")
    flags.add_argument("--rounds", type=common.positive, default=8)
    flags.add_argument("--steps", type=common.positive, default=60)
    flags.add_argument("--optimizer", choices=common.OPTIMIZERS, default=common.OPTIMIZERS[0])
    args = flags.parse_args()
    rows = translation.split(args.data)["train"]
    random.Random(0).shuffle(rows)  # the file is sorted by length
    tokenizer = translators.joint_vocabulary(rows, VOCABULARY_SIZE)
    targets = tokenizer.encode([target for _, target in rows[: args.steps * BATCH_SIZE]])
    tokens = BATCH_SIZE * (1 + statistics.mean(map(len, targets)))
    own, other = (make(rows, args.optimizer, tokens) for make in (project, keras_hub))
    speeds = [[turn.tokens_per_second(args.steps) for turn in (own, other)] for _ in range(args.rounds + 1)][1:]
    for ours, theirs in speeds:
        print(f"project {ours:,.0f}, KerasHub {theirs:,.0f} target tokens/s: {ours / theirs:.2f}")
    print(f"median {statistics.median(ours / theirs for ours, theirs in speeds):.2f}")


if __name__ == "__main__":
    main()
