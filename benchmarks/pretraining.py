"""Pretraining beside KerasHub in one run: validation bits per byte after so many minutes, one core each, side by side.

    python -m benchmarks.pretraining --data tinystories_sample.txt --minutes 15 [--models keras_llama keras_hub]
                                     [--rates keras_llama=1e-2 keras_hub=2e-3] [flags of tasks.pretraining]

Both have blocks of one size, one tokenizer, the same rows in the same order, and the recipe's warm-up and cosine decay,
which here go by the time that has passed. KerasHub's `Llama3CausalLM` has its own starting weights and loss, and no
numbers of texts in its mask. Minutes are of the core, which others may share, from the end of the second step:
neither pays for compiling. The bits are worked out from the logits of either, in float32, by the same lines. Each model
is a process of its own, on TensorFlow.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time

import numpy as np

MODELS = ("keras_llama", "keras_hub")


def peer(args, lm):
    """KerasHub's model of the same size and vocabulary."""
    import keras_hub

    import keras_llama

    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=lm.backbone.config.vocabulary_size,
        **keras_llama.size(args.size),
        rope_max_wavelength=10_000.0,
        tie_word_embeddings=args.tied,
        dropout=args.dropout,
        dtype=args.precision,
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


def batches(rows):
    """What KerasHub's `fit` takes: inputs whose mask is 0 or 1, targets and weights."""
    import keras

    from keras_llama import backend
    from keras_llama.preprocessing import next_token_targets

    class Rows(keras.utils.PyDataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            inputs = rows[index]
            targets = next_token_targets(inputs["token_ids"], inputs["padding_mask"])
            return {**inputs, "padding_mask": np.minimum(inputs["padding_mask"], 1)}, *targets

    return backend.stream(Rows())


def timed(seconds, rate):
    """The recipe's schedule of the learning rate, and the end, by time."""
    import keras

    schedule = keras.optimizers.schedules.CosineDecay(0.0, 1000, alpha=0.05, warmup_target=rate, warmup_steps=100)
    rates = [float(schedule(step)) for step in range(1101)]

    class Timed(keras.callbacks.Callback):
        begun, steps = None, 0

        def on_train_batch_begin(self, batch, logs=None):
            passed = 0.0 if self.begun is None else (time.process_time() - self.begun) / seconds
            self.model.optimizer.learning_rate = rates[min(1100, int(1100 * passed))]

        def on_train_batch_end(self, batch, logs=None):
            self.steps += 1
            if self.steps == 2:
                self.begun = time.process_time()
            self.model.stop_training = self.begun is not None and time.process_time() - self.begun >= seconds

    return Timed()


def nats(model, held, segments):
    """The negative log-likelihood of all that is predicted in `held`, in float64."""
    from keras_llama.preprocessing import next_token_targets

    total = 0.0
    for index in range(len(held)):
        inputs = held[index]
        targets, weights = next_token_targets(inputs["token_ids"], inputs["padding_mask"])
        if not segments:
            inputs = {**inputs, "padding_mask": np.minimum(inputs["padding_mask"], 1)}
        logits = np.asarray(model.predict_on_batch(inputs), "float64")
        chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        highest = logits.max(axis=-1)
        normal = highest + np.log(np.exp(logits - highest[..., None]).sum(axis=-1))
        total += float(((normal - chosen) * weights).sum())
    return total


def child(args) -> dict:
    import keras

    from tasks import common, pretrainers, pretraining

    lm, sides, _ = pretraining.prepare(args)
    ours = args.model == MODELS[0]
    model = lm if ours else peer(args, lm)
    shape = (args.sequence_length, args.batch_size)
    rows = pretrainers.TrainingRows(sides[0], *shape, 10**6, args.seed)
    held = pretrainers.ValidationRows(sides[1], *shape)
    adam = common.optimizer(args.optimizer, args.learning_rate, args.weight_decay, lm.head if ours else "embedding")
    jit = common.JIT[args.jit]
    if ours:
        model.compile(adam, jit_compile=jit)
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=adam, loss=loss, weighted_metrics=None, jit_compile=jit)
    clock = timed(60 * args.minutes, args.learning_rate)
    started = time.perf_counter()
    history = model.fit(rows if ours else batches(rows), shuffle=False, callbacks=[clock], verbose=0)
    tokens = clock.steps * args.batch_size * (args.sequence_length - 1)
    args.precision = "float32"
    twin = pretrainers.scratch(args, lm.preprocessor.tokenizer)
    twin = twin if ours else peer(args, twin)
    twin.set_weights(model.get_weights())
    total = nats(twin, held, ours)
    counts = sides[1].counts
    return {
        "model": args.model,
        "optimizer": args.optimizer,
        "learning_rate": args.learning_rate,
        "parameters": model.count_params(),
        "steps": clock.steps,
        "passes": round(tokens / sides[0].counts["tokens"], 2),
        "tokens_per_second": round(tokens / (60 * args.minutes)),
        "wall_seconds": round(time.perf_counter() - started),
        "mean_training_loss": round(history.history["loss"][-1], 4),
        "bits_per_byte": round(total / math.log(2) / counts["bytes"], 4),
        "nats_per_character": round(total / counts["characters"], 4),
    }


def main() -> None:
    from tasks import pretraining

    flags = pretraining.parser()
    flags.description, flags.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    flags.add_argument("--minutes", type=float, default=15)
    flags.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    flags.add_argument("--rates", nargs="+", default=[], metavar="MODEL=RATE", help="one after another, in each model")
    flags.add_argument("--cores", nargs="+", type=int, default=[0, 1], help="one for each model")
    flags.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.model:
        answers, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(child(args)), file=answers)
        return
    rates = {model: [given.split("=")[1] for given in args.rates if given.startswith(model)] for model in args.models}
    for turn in range(max(1, *map(len, rates.values()))):
        started = []
        for model, core in zip(args.models, args.cores, strict=False):
            rate = rates[model][turn : turn + 1] or ([] if rates[model] else [str(args.learning_rate)])
            for value in rate:
                own = ["--model", model, "--learning-rate", value, "--output-dir", f"{args.output_dir}/{model}"]
                command = ["taskset", "-c", str(core), sys.executable, "-m", "benchmarks.pretraining", *sys.argv[1:]]
                environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "OMP_NUM_THREADS": "1"}
                started.append(subprocess.Popen([*command, *own], stdout=subprocess.PIPE, text=True, env=environment))
        for process in started:
            print(process.communicate()[0].strip(), flush=True)


if __name__ == "__main__":
    main()
