"""`fit(resume=directory)`: an interrupted training ends as an unbroken one would have; bad states are refused."""

import json
import os
import pathlib
import resource
import shutil
import signal

import keras
import numpy as np
import pytest

import keras_llama
from keras_llama import ngrams

TEXTS = ["a good film", "what a film it is", "a bad film", "很好的电影", "很差的电影"] * 5
LABELS = [1, 1, 0, 1, 0] * 5


def build(tokenizer, **changes):
    """As the recipe's from scratch: what it drops out, n-grams, two passes."""
    keras.utils.set_random_seed(3)
    size = {"num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 16, "intermediate_dim": 24}
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size,
        num_ngrams=6,
        **{**size, "dropout": 0.2, "causal": False, **changes},
    )
    preprocessor = keras_llama.TextPreprocessor(tokenizer, sequence_length=16)
    backbone.ngram_embedding.know(ngrams.frequent(preprocessor.encode(TEXTS), least=5)[:6])
    options = {"num_classes": 2, "preprocessor": preprocessor, "dropout": 0.2, "r_drop": 0.5}
    model = keras_llama.LlamaTextClassifier(backbone, **options)
    rate = keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=40)
    model.compile(keras.optimizers.AdamW(rate, global_clipnorm=1.0))
    return model


class Counted(keras.callbacks.Callback):
    """Lists the steps that a training makes: numbers of a callback are kept in the state, lists are not."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(batch)


class Interrupted(keras.callbacks.Callback):
    """Ends the training in the middle of an epoch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.place, self.now = (epoch, batch), 0

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == self.place:
            raise KeyboardInterrupt


class Stopped(Interrupted):
    """The same for a reason of its own, as a limit of time."""

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == self.place:
            self.model.stop_training = True


def fit(model, *others, texts=TEXTS, labels=LABELS, epochs=5, patience=9, **options):
    best = keras.callbacks.EarlyStopping("val_loss", patience=patience, restore_best_weights=True)
    held = (texts[:5], labels[:5])
    options = {"batch_size": 4, "validation_data": held, "verbose": 0, "epochs": epochs, **options}
    return model.fit(texts, labels, callbacks=[*others, best], **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tokenizer, and a state after one epoch; tests copy it."""
    texts = ["a good film", "a bad film", "很好的电影", "很差的电影", "what a film it is"] * 4
    tokenizer = keras_llama.SentencePieceTokenizer.train(texts, vocabulary_size=300)
    folder = tmp_path_factory.mktemp("saved")
    fit(build(tokenizer), epochs=1, resume=folder)
    return tokenizer, folder


@pytest.fixture
def tokenizer(saved):
    return saved[0]


@pytest.fixture
def state(saved, tmp_path):
    """A copy of the state, to be harmed or gone on from."""
    return pathlib.Path(shutil.copytree(saved[1], tmp_path / "state")) / "training.safetensors"


def test_an_interrupted_training_ends_as_an_unbroken_one(tokenizer, tmp_path):
    unbroken = build(tokenizer)
    expected = fit(unbroken, resume=tmp_path / "unbroken").history
    with pytest.raises(KeyboardInterrupt):
        fit(build(tokenizer), Interrupted(2, 3), resume=tmp_path / "broken")
    resumed = build(tokenizer)
    np.random.seed(99)  # the order of the rows is the state's, whatever else has been drawn
    history = fit(resumed, resume=tmp_path / "broken")
    assert history.epoch == [0, 1, 2, 3, 4]
    for name, values in expected.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(resumed.predict(TEXTS, verbose=0), unbroken.predict(TEXTS, verbose=0), atol=1e-5)


@pytest.mark.plain
def test_an_epoch_that_is_stopped_within_is_trained_again(tokenizer, tmp_path):
    expected = fit(build(tokenizer), epochs=3, resume=tmp_path / "unbroken").history
    stopped = fit(build(tokenizer), Stopped(1, 2), epochs=3, resume=tmp_path / "broken")
    assert (stopped.epoch, len(stopped.history["loss"])) == ([0, 1], 2)
    history = fit(build(tokenizer), epochs=3, resume=tmp_path / "broken")
    assert history.epoch == [0, 1, 2]
    for name, values in expected.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.plain
def test_keeping_states_changes_nothing(tokenizer, tmp_path):
    kept, plain = (fit(build(tokenizer), epochs=2, **options) for options in ({"resume": tmp_path}, {}))
    assert kept.history == plain.history


KILLED = """
import os, signal, sys
import keras
sys.path.insert(0, "tests")
import test_resume
tokenizer = keras.saving.load_model(sys.argv[1]).preprocessor.tokenizer
class Killed(test_resume.Counted):
    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if len(self.steps) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
test_resume.fit(test_resume.build(tokenizer), Killed(), resume=sys.argv[2])
"""


@pytest.mark.plain
def test_a_killed_process_ends_with_the_same_loss(tokenizer, tmp_path, run_python):
    build(tokenizer).save(tmp_path / "model.keras")  # for its tokenizer
    step = int(np.random.default_rng().integers(8, 34))  # another in each run
    print(f"killed at step {step}")
    done = run_python(KILLED, tmp_path / "model.keras", tmp_path / "killed", step, check=False)
    assert done.returncode == -signal.SIGKILL
    counts = {"killed": Counted(), "unbroken": Counted()}
    losses = [
        fit(build(tokenizer), counted, resume=tmp_path / folder).history["loss"] for folder, counted in counts.items()
    ]
    assert [len(counted.steps) for counted in counts.values()] == [35 - (step - 1) // 7 * 7, 35]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=1e-5)


@pytest.mark.plain
def test_a_training_that_stopped_early_stays_so(tokenizer, tmp_path):
    first, again = build(tokenizer), build(tokenizer)
    history = fit(first, texts=TEXTS, labels=[0, 1] * 12 + [0], patience=0, epochs=30, resume=tmp_path)
    assert len(history.epoch) < 30
    repeated = fit(again, texts=TEXTS, labels=[0, 1] * 12 + [0], patience=0, epochs=30, resume=tmp_path)
    assert repeated.history == history.history
    np.testing.assert_allclose(again.predict(TEXTS, verbose=0), first.predict(TEXTS, verbose=0), atol=1e-6)


@pytest.mark.plain
def test_epochs_may_be_added(tokenizer, state):
    first = fit(build(tokenizer), epochs=1, resume=state.parent).history["loss"]
    counted = Counted()
    history = fit(build(tokenizer), counted, epochs=2, resume=state.parent)
    assert (history.epoch, history.history["loss"][:1], len(history.history["loss"])) == ([0, 1], first, 2)
    assert len(counted.steps) == 7


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_dim": 32}, "hidden_dim"),
        ({"dropout": 0.3}, "dropout"),
        ({"rope_max_wavelength": 5.0}, "rope_max_wavelength"),
    ],
)
def test_a_state_of_another_model_is_refused(tokenizer, state, change, match):
    before = state.read_bytes()
    other = build(tokenizer, **change)
    weights = other.get_weights()
    with pytest.raises(ValueError, match=rf"must be of this model.*{match}.*Received: saved="):
        fit(other, epochs=2, resume=state.parent)
    assert state.read_bytes() == before
    assert all(np.array_equal(a, b) for a, b in zip(weights, other.get_weights(), strict=True))


@pytest.mark.plain
def test_a_state_of_other_data_is_refused(tokenizer, state):
    before, model = state.read_bytes(), build(tokenizer)
    with pytest.raises(ValueError, match="of these data"):
        fit(model, texts=[*TEXTS[:-1], "a good film"], epochs=2, resume=state.parent)
    with pytest.raises(ValueError, match="of these data"):
        fit(model, epochs=2, resume=state.parent, batch_size=5)
    assert state.read_bytes() == before


@pytest.mark.plain
@pytest.mark.parametrize(
    ("loss", "options", "match"),
    [
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0), {}, r"`loss\.ignore_class`"),
        ("auto", {"class_weight": {0: 1.0, 1: 2.0}}, "`class_weight`"),
        ("auto", {"validation_data": (TEXTS[:4], LABELS[:4])}, "`validation_data`"),
    ],
)
def test_a_state_of_another_training_is_refused(tokenizer, state, loss, options, match):
    model = build(tokenizer)
    model.compile(model.optimizer, loss)
    with pytest.raises(ValueError, match=f"{match} differs"):
        fit(model, epochs=2, resume=state.parent, **options)


@pytest.mark.plain
def test_what_a_training_is_told_by_is_the_same_in_each_process(tokenizer, tmp_path):
    """Numbers of NumPy, and a loss whose name Keras counts on."""

    class Own(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    for weight in (np.float32(2), 2.0):
        model = build(tokenizer)
        model.compile(model.optimizer, Own())
        fit(model, epochs=1, resume=tmp_path, class_weight={np.int64(0): 1.0, np.int64(1): weight})


@pytest.mark.plain
def test_a_state_cut_short_is_refused(tokenizer, state):
    whole, model = state.read_bytes(), build(tokenizer)
    for kept in (0, 5, 200, len(whole) - 10):
        state.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"must be a state that an earlier training wrote.*Received: size="):
            fit(model, epochs=2, resume=state.parent)
        assert state.read_bytes() == whole[:kept]


@pytest.mark.plain
def test_a_full_disk_leaves_the_former_state(tokenizer, state):
    """Files may grow to half of what a state takes."""
    before, model = state.read_bytes(), build(tokenizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            fit(model, epochs=2, resume=state.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state.read_bytes() == before
    assert os.listdir(state.parent) == [state.name]


@pytest.mark.plain
def test_the_state_can_be_read_by_others(state):
    """It is a safetensors file: nothing in it is code."""
    import safetensors

    with safetensors.safe_open(state, "np") as file:
        document = json.loads(file.metadata()["keras_llama"])
    assert document["epoch"] == 1
    assert list(document["history"]) == ["accuracy", "loss", "val_accuracy", "val_loss"]


@pytest.mark.plain
def test_a_data_set_of_batches_goes_on_in_its_order(tokenizer, tmp_path):
    class Source(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return TEXTS[index * 5 : index * 5 + 5], LABELS[index * 5 : index * 5 + 5]

    expected = build(tokenizer).fit(Source(), epochs=3, verbose=0, resume=tmp_path / "unbroken").history
    build(tokenizer).fit(Source(), epochs=1, verbose=0, resume=tmp_path / "broken")
    counted, options = Counted(), {"epochs": 3, "verbose": 0, "resume": tmp_path / "broken"}
    history = build(tokenizer).fit(Source(), callbacks=[counted], **options).history
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    assert len(counted.steps) == 10
