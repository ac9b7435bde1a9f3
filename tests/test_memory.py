"""What training takes is told before; what is built, trained and used is freed again."""

import argparse
import pathlib
import types

import keras
import numpy as np
import pytest

import keras_llama
from keras_llama import backend
from tasks import captioning, classification, common, generation, memory, translation

PROGRAM = """
import gc, os, sys
import keras, keras_llama
import numpy as np

def anonymous():
    with open("/proc/self/status") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

ids = np.ones((1, 8), "int32")
sizes = {**keras_llama.size("tiny"), "hidden_dim": 512, "intermediate_dim": 2048}
sizes["tie_word_embeddings"] = sys.argv[1] == "fit tied"
levels = []
for _ in range(8):
    backbone = keras_llama.LlamaBackbone(vocabulary_size=8_000, **sizes)
    lm = keras_llama.LlamaCausalLM(backbone, None, {"eos_token_id": []})
    megabytes = sum(int(np.prod(v.shape)) for v in lm.weights) * 4 / 2**20
    if sys.argv[1].startswith("fit"):
        lm.compile(keras.optimizers.SGD(0.1))
        lm.fit(ids, verbose=0)
    else:
        lm.predict(ids, verbose=0)
        lm.generate(ids, 4, stop=None)
    del backbone, lm
    gc.collect()
    levels.append(anonymous())
print(megabytes, *levels)
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("use", ["fit", "fit tied", "generate"])
def test_a_model_that_is_gone_takes_its_memory_along(run_python, use):
    megabytes, *levels = map(float, run_python(PROGRAM, use).split())
    assert levels[-1] - levels[3] < 1.5 * megabytes, (megabytes, levels)  # kept, four models would be four times it


def adapted(task):
    task.enable_lora(4, targets="all-linear")


def frozen(task):
    task.freeze_base()


def projected(task):
    """Trains the projector alone."""
    task.freeze_base()
    task.image_encoder.trainable = False


def as_built(task):
    pass


def nbytes(variables):
    widths = {"float32": 4, "int32": 4, "int64": 8, "bfloat16": 2}
    return sum(int(np.prod(v.shape)) * widths[keras.backend.standardize_dtype(v.dtype)] for v in variables)


@pytest.fixture
def make_task(make_backbone):
    def make(head, prepare=as_built, patches=4, **changes):
        if head == "translator":
            sizes = {"vocabulary_size": 60, **keras_llama.size("tiny"), **changes}
            task = keras_llama.LlamaSeq2SeqLM(keras_llama.LlamaSeq2SeqBackbone(**sizes))
        elif head == "captioner":
            encoder = keras_llama.convolutional_encoder(4 * patches, (8, 8))  # patches in a row
            task = keras_llama.LlamaImageCaptioner(make_backbone(**changes), encoder)
        elif head == "classifier":
            task = keras_llama.LlamaTextClassifier(make_backbone(**changes), 3)
        else:
            task = keras_llama.LlamaCausalLM(make_backbone(**changes))
        prepare(task)
        return task

    return make


CASES = {
    "all": ("lm", as_built, {}, lambda: "auto"),
    "tied, Muon": ("lm", as_built, {"tie_word_embeddings": True}, lambda: keras.optimizers.Muon(1e-3)),
    "accumulated": ("lm", as_built, {}, lambda: keras.optimizers.AdamW(1e-3, gradient_accumulation_steps=2)),
    "averaged": ("lm", as_built, {}, lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True)),
    "half": ("lm", adapted, {"dtype": "bfloat16"}, lambda: "adam"),
    "mixed": ("classifier", as_built, {"dtype": "mixed_bfloat16"}, lambda: "sgd"),
    "scaled": ("classifier", as_built, {"dtype": "mixed_float16"}, lambda: "adamw"),
    "adapted": ("classifier", adapted, {}, lambda: "auto"),
    "frozen": ("classifier", frozen, {}, lambda: "muon"),
    "encoder-decoder": ("translator", as_built, {"num_encoder_layers": 1}, lambda: "auto"),
    "encoder-decoder, adapted": ("translator", adapted, {"share_embeddings": False}, lambda: "auto"),
    "images": ("captioner", as_built, {}, lambda: "auto"),
    "images, adapted": ("captioner", adapted, {}, lambda: "auto"),
    "images, projector alone": ("captioner", projected, {}, lambda: "auto"),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_state_are_those_of_the_variables(name, make_task):
    head, prepare, changes, optimizer = CASES[name]
    task = make_task(head, prepare, **changes)
    task.compile(optimizer())
    before = keras_llama.estimate_memory(task, 4, 16)
    assert len(task.optimizer.variables) < 10  # nothing was made for it
    task.optimizer.build(task.trainable_variables)
    assert before.weights == nbytes(task.weights)
    assert before.gradients == nbytes(task.trainable_variables)
    assert before.optimizer == nbytes(task.optimizer.variables)
    assert keras_llama.estimate_memory(task, 4, 16) == before


@pytest.mark.plain
@pytest.mark.parametrize("head", ["lm", "classifier"])
def test_the_optimizer_is_the_one_given_or_the_one_compiled_or_adamw(head, make_task):
    task = make_task(head)
    adam, none = (keras_llama.estimate_memory(task, 4, 16, optimizer) for optimizer in ("adamw", None))
    assert adam.optimizer == none.optimizer > 2 * none.gradients
    assert keras_llama.estimate_memory(task, 4, 16, "sgd").optimizer < 100
    task.compile("sgd")
    assert keras_llama.estimate_memory(task, 4, 16).optimizer < 100
    assert keras_llama.estimate_memory(task, 4, 16, keras.optimizers.Adam()).optimizer == adam.optimizer


@pytest.mark.plain
@pytest.mark.parametrize(
    ("head", "prepare"),
    [("lm", as_built), ("lm", adapted), ("translator", as_built), ("captioner", as_built), ("captioner", projected)],
)
def test_activations_grow_in_proportion_to_rows_and_faster_with_their_length(head, prepare, make_task):
    task = make_task(head, prepare)
    one, four, long = (keras_llama.estimate_memory(task, *shape) for shape in ((1, 256), (4, 256), (1, 1024)))
    assert four.activations == 4 * one.activations > 0
    assert long.peak > four.peak  # weights of attention, or the kernel's mask


@pytest.mark.plain
def test_what_saves_memory_is_estimated_to(make_task):
    every = keras_llama.estimate_memory(make_task("classifier"), 64, 64)
    lora = keras_llama.estimate_memory(make_task("classifier", adapted), 64, 64)
    head = keras_llama.estimate_memory(make_task("classifier", frozen), 64, 64)
    assert head.gradients < lora.gradients < every.gradients
    assert head.peak < min(lora.peak, every.peak)
    assert head.activations == 0
    assert (
        keras_llama.estimate_memory(make_task("classifier", remat="block"), 64, 64).activations < every.activations / 2
    )
    half = keras_llama.estimate_memory(make_task("classifier", dtype="mixed_bfloat16"), 64, 64)
    assert half.activations < 0.8 * every.activations
    twice = make_task("classifier")
    twice.r_drop = 1.0
    assert keras_llama.estimate_memory(twice, 64, 64).activations == 2 * every.activations
    lm = make_task("lm", vocabulary_size=4000)
    lm.compile()
    chunked = keras_llama.estimate_memory(lm, 64, 256)
    lm.compile(metrics=[keras.metrics.SparseCategoricalAccuracy()])  # which needs the logits
    assert keras_llama.estimate_memory(lm, 64, 256).peak > chunked.peak


def activations(task, *shape):
    return keras_llama.estimate_memory(task, *(shape or (8, 64))).activations


@pytest.mark.parametrize(("targets", "inputs", "masks"), [("query", 0, 1), ("query|key|value", 2, 3), ("down", 1, 1)])
def test_each_adapter_with_dropout_keeps_its_own_input_and_what_is_left_of_it(targets, inputs, masks, make_task):
    plain, dropped = (
        activations(make_task("lm", lambda task, rate=rate: task.enable_lora(4, targets=targets, dropout=rate)))
        for rate in (0.0, 0.1)
    )
    config = make_task("lm").backbone.config
    width = config.intermediate_dim if targets == "down" else config.hidden_dim
    if (targets, backend.name()) == ("down", "tensorflow"):
        inputs += 2  # sigmoid(gate) and silu(gate), which nothing computes again
    drawn = 8 if backend.name() == "jax" else 1
    assert dropped - plain == 8 * 64 * width * config.num_layers * (4 * inputs + masks * drawn)


def test_blocks_of_both_halves_count_and_those_with_cross_attention_for_more(make_task):
    layers = {"num_layers": 1, "num_encoder_layers": 1}
    base = make_task("translator", **layers)
    one = activations(base)
    encoder = activations(make_task("translator", **{**layers, "num_encoder_layers": 2})) - one
    decoder = activations(make_task("translator", **{**layers, "num_layers": 2})) - one
    assert 1.2 * encoder < decoder < 2 * encoder
    alone = keras_llama.LlamaCausalLM(
        keras_llama.LlamaBackbone(vocabulary_size=60, **{**keras_llama.size("tiny"), "num_layers": 1})
    )
    assert one > 2 * activations(alone)
    base.backbone.remat = "block"
    assert activations(base) < one / 2


def test_what_stands_before_the_last_gradient_keeps_nothing(make_task):
    def decoder_alone(task):
        task.enable_lora(4, targets="^block_")

    both, one = (make_task("translator", prepare) for prepare in (adapted, decoder_alone))
    assert 0 < activations(one) < 0.7 * activations(both)
    assert activations(make_task("captioner", projected)) > 0  # the projector is in front of all blocks


@pytest.mark.plain
def test_vectors_in_front_of_a_frozen_base_need_its_gradient(make_backbone):
    plain, overlapped = (
        keras_llama.LlamaQuestionAnswering(make_backbone(causal=False), question_overlap=overlap)
        for overlap in (False, 2)
    )
    plain.freeze_base()
    overlapped.freeze_base()
    assert activations(plain) == 0 < activations(overlapped)


def test_patches_are_tokens_and_an_image_encoder_that_is_trained_keeps_its_layers(make_task):
    few, many, texts = make_task("captioner"), make_task("captioner", patches=8), make_task("lm")
    assert activations(texts, 8, 16 + 64) < activations(many, 8, 16) < 2 * activations(texts, 8, 16 + 64)
    assert activations(few, 8, 64) < activations(many, 8, 16)
    trained = activations(few)
    few.image_encoder.trainable = False
    # Of each pixel a colour; of each convolution itself, its norm, and its activation.
    kept = 8 * 4 * (16 * 16 * 3 + 3 * (8 * 8 * 8) + 3 * (4 * 4 * 8))
    assert trained - activations(few) == kept


def test_an_image_encoder_that_is_frozen_still_runs(make_backbone):
    def peak(channels):
        layers = [keras.layers.Conv2D(channels, 1), keras.layers.Conv2D(8, 32, strides=32)]
        encoder = keras.Sequential([keras.Input((64, 64, 3)), *layers])
        encoder.trainable = False
        estimate = keras_llama.estimate_memory(keras_llama.LlamaImageCaptioner(make_backbone(), encoder), 8, 8)
        return estimate.peak - estimate.weights

    more = 8 * 4 * 64 * 64 * 100  # that the first layer gives
    assert more <= peak(300) - peak(200) < 1.3 * more


@pytest.mark.plain
def test_an_estimate_reads_in_units():
    text = str(keras_llama.MemoryEstimate(3 * 2**20, 2**20, 2**21, 2**22, 3 * 2**29))
    assert text == "peak 1.50 GiB (weights 3 MiB, gradients 1 MiB, optimizer 2 MiB, activations 4 MiB)"


@pytest.mark.plain
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch_size": 0}, "`batch_size` must be .* Received: batch_size=0"),
        ({"batch_size": True}, "`batch_size` must be"),
        ({"sequence_length": 1.5}, "`sequence_length` must be .* Received: sequence_length=1.5"),
        ({"optimizer": "adamax2"}, "`optimizer` must be .* Received: optimizer='adamax2'. Such as"),
        ({"task": keras.Sequential()}, "`task` must be .* Received: task='Sequential'"),
    ],
)
def test_what_cannot_be_estimated_is_refused(changes, expected, make_task):
    arguments = {"task": make_task("lm"), "batch_size": 4, "sequence_length": 16, **changes}
    with pytest.raises(ValueError, match=expected):
        keras_llama.estimate_memory(**arguments)


def recipe(task):
    """Arguments to train with, at the length of the task's texts: 32."""
    task.preprocessor = types.SimpleNamespace(sequence_length=32)
    given = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "batch_size": 64}
    return argparse.Namespace(**given, force=False)


@pytest.mark.plain
def test_a_recipe_names_the_largest_batch_that_fits(make_task, capsys):
    task = make_task("lm", vocabulary_size=4000)
    args = recipe(task)
    fits = keras_llama.estimate_memory(task, 24, 32, common.optimizer("adamw", 1e-3, 0.1, task.head))
    free = fits.peak - fits.weights
    with pytest.raises(common.DataError, match=r"--batch-size 64: .* --batch-size 24 fits; --force"):
        memory.check(task, args, free)
    with pytest.raises(common.DataError, match="Not even --batch-size 1 fits"):
        memory.check(task, args, 1000)
    args.batch_size = 24
    memory.check(task, args, free)
    args.batch_size, args.force = 64, True
    memory.check(task, args, free)
    assert capsys.readouterr().out.count("Memory of training, estimated: peak ") == 4


def test_what_stays_beside_a_training_is_counted(make_task, capsys, monkeypatch):
    """The weights of the best epoch, which are no GPU's, and the optimisers of models that were trained before."""
    task = make_task("lm", vocabulary_size=4000)
    args = recipe(task)
    found = keras_llama.estimate_memory(task, 64, 32, common.optimizer("adamw", 1e-3, 0.1, task.head))
    alone = found.peak - found.weights
    for given, held in (
        ({"best": True}, found.weights),
        ({"kept": 1000}, 1000),
        ({"trained": 2}, 2 * found.optimizer),
    ):
        memory.check(task, args, alone + held, **given)
        with pytest.raises(common.DataError, match="--force trains anyway"):
            memory.check(task, args, alone + held - 1, **given)
    assert f"; beside it {held / 2**20:.0f} MiB of the best" in capsys.readouterr().out
    monkeypatch.setattr(backend, "has_gpu", lambda: True)
    memory.check(task, args, alone, best=True, kept=1000)


@pytest.mark.plain
def test_nothing_is_refused_where_the_machine_does_not_tell(make_task, monkeypatch):
    monkeypatch.setattr(backend, "free_memory", lambda: None)
    task = make_task("lm")
    memory.check(task, recipe(task))


@pytest.mark.plain
def test_free_memory_is_what_the_kernel_says():
    table = pathlib.Path("/proc/meminfo")
    if not table.exists() or backend.has_gpu():
        pytest.skip("of a Linux machine without GPU")
    assert 0 < backend.free_memory() <= int(table.read_text().split()[1]) * 1024


@pytest.mark.plain
@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (classification, []),
        (generation, []),
        (translation, ["--architecture", "decoder"]),
        (translation, []),
        (captioning, ["--variants", "1", "--limit", "60"]),
    ],
)
def test_the_recipes_refuse_with_exit_code_2_unless_forced(module, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backend, "free_memory", lambda: 1000)
    stop = RuntimeError("training began")

    def begin(*_, **__):
        raise stop

    for head in ("LlamaTextClassifier", "LlamaCausalLM", "LlamaSeq2SeqLM", "LlamaImageCaptioner"):
        monkeypatch.setattr(getattr(keras_llama, head), "fit", begin)
    texts = [f"{'good' if number % 2 else 'bad'} film {number}" for number in range(60)]
    data = tmp_path / ("texts.txt" if module is generation else "texts.tsv")
    lines = [text if module is generation else f"{text}\t{text.split()[0]}" for text in texts]
    data.write_text(("\n<|endoftext|>\n" if module is generation else "\n").join(lines), encoding="utf-8")
    flags = [*flags, "--output-dir", str(tmp_path / "out"), "--size", "tiny", "--vocabulary-size", "300"]
    flags += [] if module is captioning else ["--data", str(data)]  # it draws its own
    with pytest.raises(SystemExit) as left:
        module.main(flags)
    assert left.value.code == 2
    assert "--batch-size 1" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="training began"):
        module.main([*flags, "--force"])
