"""What pretraining is made of: rows of packed tokens, the tokenizer and the model, and callbacks; it starts Keras.

Shapes: B batch, T tokens of a row.
"""

import functools
import hashlib
import itertools
import math
import pathlib
import time

import keras
import numpy as np

import keras_llama
from keras_llama.checkpoints.presets import open_checkpoint
from keras_llama.opening import open_tokenizer
from tasks import common, corpus, records


class _Rows(keras.utils.PyDataset):
    """Rows of T neighbouring tokens of a corpus, whose `padding_mask` numbers the texts in each.

    A row begins with the last token of the one before, so that every token but the first of a text is a target.
    """

    def __init__(self, side: corpus.Side, length: int, batch_size: int):
        super().__init__()
        self.tokens, self.starts, self.counts = side
        self.length, self.batch_size = length, batch_size

    def rows(self, begins, ends=None):
        """Rows that begin at these tokens, going round the corpus: a dict of int32 (B, T)."""
        columns = np.arange(self.length)
        places = (np.asarray(begins)[:, None] + columns) % len(self.tokens)
        text = np.searchsorted(self.starts, places, side="right") - 1
        first = self.starts[text] == places
        first[:, 0] = True
        mask = np.cumsum(first, axis=1)
        if ends is not None:
            mask *= columns < (np.asarray(ends) - begins)[:, None]
        return {"token_ids": self.tokens[places].astype("int32"), "padding_mask": mask.astype("int32")}


class TrainingRows(_Rows):
    """An epoch is the next `steps` batches: passes over the corpus follow each other, in orders drawn from `seed`.

    Each pass goes round the corpus from another token. Every batch is known by its number alone, so that training goes
    on anywhere; memory grows by 8 bytes a row, and for a moment by 16 where the next pass is drawn.
    """

    def __init__(self, side, length, batch_size, steps, seed):
        super().__init__(side, length, batch_size)
        self.steps, self.seed, self.epoch = steps, seed, 0
        self.per_pass = rows_of_pass(side, length)
        self._pass = functools.lru_cache(1)(self._drawn)

    def __len__(self):
        return self.steps

    def start(self, epoch):
        self.epoch = epoch

    def digest(self):
        return f"{self.counts['digest']} by {self.batch_size} x {self.length}, seed {self.seed}"

    def __getitem__(self, index):
        first = (self.epoch * self.steps + index) * self.batch_size
        return self.rows([self._begin(first + row) for row in range(self.batch_size)])

    def _begin(self, number):
        turn, row = divmod(number, self.per_pass)
        shift, order = self._pass(turn)
        return shift + order[row] * (self.length - 1)

    def _drawn(self, turn):
        generator = np.random.default_rng([self.seed, turn])
        return generator.integers(len(self.tokens)), generator.permutation(self.per_pass)


class ValidationRows(_Rows):
    """Texts in their order, as many as fit whole into a row; longer ones go over several.

    `most` rows, if there are more, are taken at even distances.
    """

    def __init__(self, side, length, batch_size, most=None):
        super().__init__(side, length, batch_size)
        spans = np.array(list(_spans(self.starts, len(self.tokens), length)))
        count = min(most or len(spans), len(spans))
        self.spans = spans[np.linspace(0, len(spans) - 1, count).astype(int)]

    def __len__(self):
        return -(-len(self.spans) // self.batch_size)

    def __getitem__(self, index):
        return self.rows(*self.spans[index * self.batch_size : (index + 1) * self.batch_size].T)

    @property
    def bits_per_byte(self):
        """What the logarithm of a perplexity is multiplied by: tokens predicted for each byte of text, over ln 2."""
        return (len(self.tokens) - len(self.starts)) / self.counts["bytes"] / math.log(2)

    def measured(self, lm):
        """How well a model knows these rows, for the report."""
        perplexity = float(lm.evaluate(self, return_dict=True)["perplexity"])
        bits = math.log(perplexity) * self.bits_per_byte
        nats = bits * math.log(2) * self.counts["bytes"] / self.counts["characters"]
        return {"perplexity": perplexity, "bits_per_byte": bits, "nats_per_character": nats}


def rows_of_pass(side, length):
    """How many rows a pass over a corpus has."""
    return max(1, len(side.tokens) // (length - 1))


def _spans(starts, tokens, length):
    """(first token, token behind the last) of each row."""
    begin = 0
    for start, end in itertools.pairwise([*map(int, starts), tokens]):
        if end - begin > length and start > begin:
            yield begin, start
            begin = start
        while end - begin > length:
            yield begin, begin + length
            begin += length - 1
    yield begin, tokens


def given(args):
    """The files of the tokenizer of --tokenizer; none without it."""
    if not args.tokenizer:
        return {}
    path = pathlib.Path(args.tokenizer)
    if path.is_file() and path.name in ("tokenizer.json", "tokenizer.model"):
        return {path.name: path.read_bytes()}
    files = open_checkpoint(args.tokenizer).tokenizer_files
    if not files:
        raise common.DataError(f"--tokenizer {args.tokenizer}: expected a checkpoint with a tokenizer.")
    return files


def tokenizer(args, files, source, folder):
    """The tokenizer of `files`, or of the corpus in `folder` if it is there, or one learned from the texts."""
    if not files and folder.exists():
        files = corpus.vocabulary(folder)
    if not files:
        learned = keras_llama.SentencePieceTokenizer.train(
            source.learned_from(), args.vocabulary_size, split_ideographs=args.split_ideographs
        )
        files = learned.files
    return open_tokenizer(files)  # as the corpus and the preset will be opened


def build(args, source):
    """The model of --preset, or one from scratch, with its preprocessor; and the folder for its tokens.

    That is told by the vocabulary: its files, or what one is to be learned by.
    """
    told = {name: getattr(args, name) for name in ("vocabulary_size", "split_ideographs")}
    lm = common.from_preset(args, keras_llama.LlamaCausalLM) if args.preset else None
    files = lm.preprocessor.tokenizer.files if lm else given(args)
    if files:
        told = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        told["begin"] = lm and lm.preprocessor.begin
    folder = pathlib.Path(args.output_dir, f"tokens-{source.digest(**told)}")
    if lm is None:
        lm = scratch(args, tokenizer(args, files, source, folder))
    return lm, folder


def scratch(args, found):
    """A model from scratch over the vocabulary of the tokenizer `found`."""
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=found.vocabulary_size,
        **keras_llama.size(args.size),
        tie_word_embeddings=args.tied,
        dropout=args.dropout,
        context_length=args.sequence_length,
        dtype=args.precision,
    )
    preprocessor = keras_llama.TextPreprocessor(found, args.sequence_length, add_bos=found.bos_id >= 0, add_eos=True)
    return keras_llama.LlamaCausalLM(backbone, preprocessor)


def measured_flops(dtype, size=1024):
    """Floating-point operations a second of a product of square matrices, the best of some tries."""
    one = keras.ops.ones((size, size), dtype)
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        float(keras.ops.matmul(one, one)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def flops_of_token(lm, length):
    """Operations that training takes for a token: 6 N + 12 L N_heads H T, N the weights that multiply it.

    Of Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, appendix B. It counts attention to all T tokens of
    a row: that texts of a row do not see each other, and no token those after it, is not taken off.
    """
    config = lm.backbone.config
    looked_up = 0 if config.tie_word_embeddings else config.vocabulary_size * config.hidden_dim
    attention = config.num_layers * config.num_query_heads * config.head_dim * length
    return 6 * (lm.count_params() - looked_up) + 12 * attention


class Measures(keras.callbacks.Callback):
    """Adds to what is shown and kept: `tokens/s`, `mfu` (model FLOPs utilisation), `val_bits_per_byte`.

    The first step of an epoch is left out after it: it may have compiled.

    Args:
        tokens: of a batch.
        flops: operations of a token.
        peak: operations a second of the machine.
        bits_per_byte: what the logarithm of the validation perplexity is multiplied by.
    """

    def __init__(self, tokens, flops, peak, bits_per_byte=None):
        super().__init__()
        self.tokens, self.flops, self.peak, self.bits_per_byte = tokens, flops, peak, bits_per_byte

    def on_epoch_begin(self, epoch, logs=None):
        self._since = (time.perf_counter(), -1)

    def on_train_batch_end(self, batch, logs=None):
        now, (begun, first) = time.perf_counter(), self._since
        speed = (batch - first) * self.tokens / (now - begun)
        self._shown = {"tokens/s": speed, "mfu": speed * self.flops / self.peak}
        logs.update(self._shown)
        if first < 0:
            self._since = (now, batch)

    def on_epoch_end(self, epoch, logs=None):
        logs.update(self._shown)
        if self.bits_per_byte and "val_perplexity" in logs:
            logs["val_bits_per_byte"] = math.log(logs["val_perplexity"]) * self.bits_per_byte


class LastStep(keras.callbacks.Callback):
    """Ends training after `steps` in all, if that is within an epoch of `per_epoch`."""

    def __init__(self, steps, per_epoch):
        super().__init__()
        self.steps, self.per_epoch, self.before = steps, per_epoch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.before = epoch * self.per_epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.before + batch + 1 == self.steps < self.before + self.per_epoch:
            self.model.stop_training = True


class Checkpoints(keras.callbacks.Callback):
    """After each epoch saves the model as OUTPUT_DIR/preset, and shows how it continues every --prompt.

    What `lm` could not continue is refused at once.
    """

    def __init__(self, args, lm):
        super().__init__()
        self.prompts = [records.opening(args.template, prompt) for prompt in args.prompt]
        self.options = {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
        self.path = pathlib.Path(args.output_dir, "preset")
        self.texts = []
        for prompt in self.prompts:
            try:
                lm.generate(prompt, stream=True, **self.options)  # checks, and runs nothing
            except ValueError as error:
                raise common.DataError(f"--prompt {prompt!r}: {error}") from error

    def on_epoch_end(self, epoch, logs=None):
        if not (self.model.adapters or self.model.quantized):  # what is beside adapters has not changed
            self.model.save_to_preset(self.path, overwrite=True)
        self.texts = self.model.generate(self.prompts, **self.options) if self.prompts else []
        print("", *self.texts, sep="\n")
