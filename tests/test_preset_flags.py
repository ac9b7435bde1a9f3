"""Beside --preset a flag that is asked for is applied or refused, and the report has what the model has."""

import argparse
import importlib

import pytest

import keras_llama
from tasks import captioners, classification, classifiers, common, pretraining, translators

pytestmark = pytest.mark.plain


def given(parser=pretraining.parser, **flags):
    """What a recipe's parser makes of these flags, which are all asked for."""
    words = [word for name, value in flags.items() for word in (common.flag(name), str(value))]
    return parser().parse_args(words)


def test_what_is_asked_for_is_known_whatever_its_value():
    flags = ["--dropout", "0.1", "--force", "--pretrain-data", "a", "b", "--head-dropout=0.4", "--preset-l", "2"]
    args = classification.parser().parse_args(flags)
    assert sorted(args.asked) == ["dropout", "force", "head_dropout", "preset_layers", "pretrain_data"]
    defaults = classification.parser().parse_args([])
    assert defaults.asked == []
    assert (args.dropout, args.head_dropout) == (defaults.dropout, defaults.head_dropout)
    assert args.pretrain_data == ["a", "b"]


SCRATCH = ["--size", "tiny", "--vocabulary-size", "300", "--dropout", "0"]
FILE = ["--precision", "float32", "--preset-layers", "1"]  # though it is the default
CASES = {  # flags that a preset has its own of: any, a .keras file
    "classification": ([*SCRATCH, "--ngram-count", "0", "--embedding-dropout", "0"], [*FILE, "--head-dropout", "0"]),
    "generation": (SCRATCH, FILE),
    "generation without data": (["--prompt", "a", *SCRATCH], FILE),
    "translation": (["--architecture", "decoder", *SCRATCH, "--encoder-layers", "1"], FILE),
    "question_answering": (SCRATCH, FILE),
    "captioning": (["--limit", "8", "--variants", "1", *SCRATCH], FILE),
    "pretraining": ([*SCRATCH, "--split-ideographs", "--tied", "--tokenizer", "a"], FILE),
}


@pytest.mark.parametrize("preset", ["checkpoint", "model.keras"])
@pytest.mark.parametrize("case", CASES)
def test_what_a_preset_has_its_own_of_is_refused(case, preset, chat_lm, tmp_path, capsys):
    chat_lm.save_to_preset(tmp_path / "checkpoint")
    preset = str(tmp_path / preset)  # of which the file is not even looked at
    recipe = importlib.import_module(f"tasks.{case.split()[0]}")
    of_any, of_files = CASES[case]
    rows = tmp_path / "rows.tsv"
    end = "\n\n" if case == "generation" else "\n"
    rows.write_text("".join(f"film {i}\tlabel {i % 2}{end}" for i in range(60)), encoding="utf-8")
    data = [] if case in ("captioning", "question_answering", "generation without data") else ["--data", str(rows)]
    flags = ["--output-dir", str(tmp_path / "out"), *data, *of_any, *(of_files if preset == "model.keras" else [])]
    with pytest.raises(SystemExit) as left:
        recipe.main([*flags, "--preset", preset])
    assert left.value.code == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "Leave out" in line]
    named = [word.strip(",:") for word in told.split() if word.startswith("--")]
    others = {"--prompt", "--limit", "--variants", "--architecture"}
    assert set(named) - {"--preset"} == {flag for flag in flags[2 + len(data) :] if flag.startswith("--")} - others
    assert f"--preset {preset} has its own." in told


def test_a_saved_model_is_taken_for_texts_as_long_as_is_asked_for(chat_lm, tmp_path):
    """Its context is 200 tokens."""
    chat_lm.save(tmp_path / "model.keras")
    preset = {"preset": tmp_path / "model.keras"}
    for flags, length in (({}, 64), ({"sequence_length": 200}, 200)):
        args = given(**preset, **flags)
        lm = common.from_preset(args, keras_llama.LlamaCausalLM)
        assert (args.sequence_length, lm.preprocessor.sequence_length) == (length, length)
        assert args.precision == lm.dtype_policy.name
        assert (args.size, args.dropout) == (None, None)  # of which nothing is known, and nothing was used
        assert not lm.preprocessor.add_bos
    with pytest.raises(common.DataError, match=r"must be at most the model's context of 200 tokens. Received: 201"):
        common.from_preset(given(**preset, sequence_length=201), keras_llama.LlamaCausalLM)


def test_a_saved_translator_takes_label_smoothing(tokenizer, tmp_path):
    config = {**keras_llama.size("tiny"), "num_layers": 1, "dropout": 0.2}
    backbone = keras_llama.LlamaSeq2SeqBackbone(vocabulary_size=tokenizer.vocabulary_size, **config)
    before = keras_llama.LlamaSeq2SeqLM(backbone, keras_llama.TextPreprocessor(tokenizer, 16), label_smoothing=0.2)
    before.save(tmp_path / "model.keras")
    flags = {"preset": str(tmp_path / "model.keras"), "architecture": "encoder-decoder", "label_smoothing": 0.1}
    for asked, expected in (([], 0.2), (["label_smoothing"], 0.1)):
        args = argparse.Namespace(**flags, dropout=0.1, asked=asked)
        model = translators.build(args, [])
        assert args.label_smoothing == model.label_smoothing == expected
        assert args.dropout is None


def test_an_encoder_beside_a_decoder_has_the_dropout_that_is_asked_for(chat_lm, tmp_path):
    chat_lm.save_to_preset(tmp_path / "decoder")
    flags = {"preset": str(tmp_path / "decoder"), "architecture": "encoder-decoder", "precision": "float32"}
    flags |= {"preset_layers": 1, "sequence_length": 24, "label_smoothing": 0.1, "dropout": 0.3}
    args = argparse.Namespace(**flags, asked=["dropout", "preset_layers"])
    assert translators.build(args, []).backbone.config.dropout == args.dropout == 0.3


def test_a_saved_captioner_takes_label_smoothing_and_as_many_tokens_as_its_images_leave(tokenizer, tmp_path):
    size = {**keras_llama.size("tiny"), "num_layers": 1, "context_length": 32}
    backbone = keras_llama.LlamaBackbone(vocabulary_size=tokenizer.vocabulary_size, **size)
    encoder = keras_llama.convolutional_encoder(16, (8, 8))
    before = keras_llama.LlamaImageCaptioner(backbone, encoder, keras_llama.TextPreprocessor(tokenizer, 16))
    before.save(tmp_path / "model.keras")
    room = 32 - (before.prompt_tokens - 1)
    flags = {"preset": str(tmp_path / "model.keras"), "label_smoothing": 0.3, "freeze_encoder": False}
    asked = argparse.Namespace(**flags, sequence_length=room, asked=["sequence_length", "label_smoothing"])
    model = captioners.build(asked, [])
    assert (model.label_smoothing, model.preprocessor.sequence_length) == (0.3, room)
    with pytest.raises(common.DataError, match=rf"32 tokens, {32 - room} of them taken. Received: {room + 1}"):
        captioners.build(argparse.Namespace(**flags, sequence_length=room + 1, asked=["sequence_length"]), [])


def test_a_language_model_has_no_head_of_its_own(chat_lm):
    with pytest.raises(common.DataError, match=r"--trainable head: A task must have a head of its own.*lora"):
        common.choose_trainable(chat_lm, given(preset="a", trainable="head"))


def test_adapters_have_their_own_rank(chat_lm):
    chat_lm.enable_lora(rank=2)
    for flags in ({"lora_rank": 8}, {"lora_targets": "all-linear"}):
        with pytest.raises(common.DataError, match="--preset a has its own"):
            common.choose_trainable(chat_lm, given(preset="a", trainable="lora", **flags))
    common.choose_trainable(chat_lm, args := given(preset="a", trainable="lora"))
    assert args.lora_rank is None
    chat_lm.merge_lora()
    with pytest.raises(common.DataError, match="Leave out --lora-rank: --trainable all has no adapters"):
        common.choose_trainable(chat_lm, given(preset="a", lora_rank=8))


@pytest.mark.parametrize(("flags", "weight"), [([], 0.5), (["--r-drop", "2"], 2.0), (["--trainable", "head"], 0.0)])
def test_a_saved_classifier_has_its_own_second_pass(tokenizer, make_backbone, tmp_path, flags, weight):
    backbone = make_backbone(vocabulary_size=tokenizer.vocabulary_size)
    preprocessor = keras_llama.TextPreprocessor(tokenizer, 16)
    options = {"labels": ["bad", "good"], "preprocessor": preprocessor, "r_drop": 0.5}
    keras_llama.LlamaTextClassifier(backbone, **options).save(tmp_path / "model.keras")
    args = classification.parser().parse_args(["--preset", str(tmp_path / "model.keras"), *flags])
    model = classifiers.build(args, [], ["bad", "good"])
    assert model.r_drop == weight
    assert args.r_drop == (weight if weight else None)


def test_a_head_alone_takes_no_second_pass(chat_lm, tmp_path):
    chat_lm.save_to_preset(tmp_path / "own")
    args = given(classification.parser, preset=tmp_path / "own", trainable="head", r_drop=1)
    with pytest.raises(common.DataError, match="Leave out --r-drop: --trainable head makes one pass"):
        classifiers.build(args, [], ["bad", "good"])


def test_a_classifier_from_scratch_makes_two_passes():
    args = classification.parser().parse_args(["--vocabulary-size", "330", "--sequence-length", "16"])
    texts = ["很好的电影", "很差的电影", "a good film"] * 10
    assert classifiers.build(args, texts, ["bad", "good"]).r_drop == 1.0
    args.r_drop = 0.0
    assert classifiers.build(args, texts, ["bad", "good"]).r_drop == 0.0
