"""The captioning recipe end to end on few drawings, its data, its scores, and what it refuses with exit code 2."""

import argparse
import json
import types

import keras
import numpy as np
import pytest
from PIL import Image

import keras_llama
from keras_llama.checkpoints import presets
from tasks import baselines, captioners, captioning, common, delivery, pictures

SHORT = ["--batch-size", "16", "--image-size", "32", "--num-beams", "2"]
FAST = ["--vocabulary-size", "300", *SHORT]


def run(*arguments):
    captioning.main([str(argument) for argument in arguments])


@pytest.fixture
def captions(tmp_path):
    """A captions file of twelve images with two captions each, commas in some."""
    (tmp_path / "images").mkdir()
    rows = ["image,caption"]
    for i in range(12):
        Image.new("RGB", (40, 30), (20 * i, 100, 200 - 10 * i)).save(tmp_path / "images" / f"{i}.jpg")
        rows += [f"{i}.jpg,a plain colour , number {i} .", f'{i}.jpg,"colour {i}, and ""nothing"" else"']
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_trains_scores_shows_and_exports(tmp_path, capsys):
    output = tmp_path / "out"
    run("--limit", 64, "--epochs", 1, "--augment", "flip", "rotation", "crop", "--output-dir", output, *FAST)
    report = json.loads((output / "metrics.json").read_text())
    assert report["task"] == "captioning"
    assert report["rows"] == {"train": 64, "validation": 64, "test": 64}
    assert {"bleu", "cider", "exact_match", "greedy", "parameters", "train_seconds"} <= set(report)
    assert 0 < report["baselines"]["nearest_colours"]["bleu"] <= 100
    for picture in ("training.png", "captions.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert "most frequent: BLEU-4" in capsys.readouterr().out
    model = keras.saving.load_model(output / "model.keras")
    file = str(output / "samples" / "0.png")
    assert delivery.serve(output / "saved_model", [file], "--files")["texts"] == [model.generate(file)]


@pytest.mark.plain
@pytest.mark.usefixtures("not_exported")
@pytest.mark.parametrize("trainable", ["lora", "head"])
def test_a_text_checkpoint_learns_to_see_by_little(captions, chat_lm, tmp_path, trainable):
    chat_lm.save_to_preset(tmp_path / "preset")
    few = ["--trainable", trainable, "--encoder", "vit", "--freeze-encoder", "--sequence-length", 40]
    run(
        "--data",
        captions,
        "--preset",
        tmp_path / "preset",
        "--epochs",
        1,
        "--output-dir",
        tmp_path / "out",
        *SHORT,
        *few,
    )
    model = keras.saving.load_model(tmp_path / "out" / "model.keras")
    kinds = {
        "projector" if w.path.startswith("projector") else w.path.rsplit("/", 1)[1] for w in model.trainable_weights
    }
    assert kinds == {"projector", *(["lora_a", "lora_b"] if trainable == "lora" else [])}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == {"train": 8, "test": 3}
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists() == (trainable == "lora")


@pytest.mark.slow
def test_files_of_any_kind_then_training_goes_on(captions, tmp_path, monkeypatch, capsys):
    text = captions.read_text(encoding="utf-8")
    for i, file in enumerate(sorted((captions.parent / "images").iterdir())):
        other = file.with_suffix((".webp", ".gif", ".bmp", ".tif")[i % 4])
        Image.open(file).save(other)
        file.unlink()
        text = text.replace(f"\n{file.name},", f"\n{other.name},")
    captions.write_text(text, encoding="utf-8")
    output = tmp_path / "out"
    run("--data", captions, "--epochs", 1, "--output-dir", output, *FAST)
    assert "served by a fresh process" in capsys.readouterr().out
    monkeypatch.setattr(delivery, "exported", lambda *_: None)
    run("--data", captions, "--preset", output / "model.keras", "--epochs", 1, "--output-dir", tmp_path / "more")
    assert keras.saving.load_model(tmp_path / "more" / "model.keras").image_size == (32, 32)


def captioner():
    tokenizer = keras_llama.SentencePieceTokenizer.train(["a plain colour", "nothing else"] * 9, vocabulary_size=280)
    backbone = keras_llama.LlamaBackbone(vocabulary_size=280, **keras_llama.size("tiny"))
    encoder = keras_llama.convolutional_encoder(16, (8, 8))
    return keras_llama.LlamaImageCaptioner(backbone, encoder, keras_llama.TextPreprocessor(tokenizer, 16))


def flags(preset, **changes):
    given = {"encoder": None, "image_size": None, "freeze_encoder": False, "label_smoothing": 0.0}
    given |= {"precision": "float32", "sequence_length": 16, "preset": str(preset), "preset_layers": None}
    return argparse.Namespace(**given | changes, asked=[*changes])


@pytest.mark.plain
@pytest.mark.parametrize("form", ["model.keras", "preset", "hf://me/captioner"])
def test_a_saved_captioner_keeps_its_encoder(tmp_path, monkeypatch, form):
    model = captioner()
    model.save(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    monkeypatch.setattr(presets, "download", lambda name: tmp_path / "preset")
    place = form if "//" in form else tmp_path / form
    again = captioners.build(flags(place, freeze_encoder=True), [])
    for mine, theirs in zip(model.image_encoder.get_weights(), again.image_encoder.get_weights(), strict=True):
        assert np.array_equal(mine, theirs)
    assert not again.image_encoder.trainable_weights
    assert captioners.build(flags(place), []).image_encoder.trainable_weights
    for change, name in (({"encoder": "vit"}, "encoder"), ({"image_size": 32}, "image-size")):
        with pytest.raises(common.DataError, match=rf"Leave out --{name}: .*has its own"):
            captioners.build(flags(place, **change), [])


@pytest.mark.plain
def test_training_goes_on_with_an_encoder_that_was_frozen(tmp_path):
    model = captioner()
    model.image_encoder.trainable = False
    model.save(tmp_path / "model.keras")
    assert captioners.build(flags(tmp_path / "model.keras"), []).image_encoder.trainable_weights


@pytest.mark.plain
@pytest.mark.usefixtures("not_exported")
def test_an_adapter_is_not_offered_without_the_encoder_trained_beside_it(tmp_path, capsys):
    model, files = captioner(), pictures.files(np.zeros((1, 16, 16, 3), "uint8"), tmp_path / "samples")
    model.enable_lora(rank=2)
    captioners.deliver(model, tmp_path, files)
    assert "No adapter alone" in capsys.readouterr().out
    assert not (tmp_path / "adapter").exists()
    model.image_encoder.trainable = False
    captioners.deliver(model, tmp_path, files)
    assert (tmp_path / "adapter").exists()


@pytest.mark.plain
def test_an_export_may_break_a_tie_but_not_have_other_logits(capsys):
    logits = np.array([[[0.0, 1.0, 10.0]]])
    model = types.SimpleNamespace(sides=("",), predict=lambda inputs, verbose: logits)

    def check(expected, found, other):
        delivery.check_texts(model, [expected], [found], lambda inputs: other, {"images": ["a.png"]})

    check("一\ufffd\ufffd", "一\ufffd", None)  # logits are not asked for
    assert not capsys.readouterr().out
    check("a dog", "a cat", logits + 0.01)
    assert "1 of 1 texts differ, as near ties do: the logits are within 1e-02" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"Expected: \['a dog'\]. Received: \['a cat'\]"):
        check("a dog", "a cat", logits[..., ::-1])


@pytest.mark.plain
def test_each_image_is_held_once_whatever_its_captions(captions, monkeypatch):
    rows, given = pictures.read(pictures.captions_file(str(captions), None), (16, 16)), {}
    model = types.SimpleNamespace(
        image_size=(16, 16),
        compile=lambda **options: None,
        fit=lambda images, captions, **options: given.update(images=images) or types.SimpleNamespace(history={}),
    )
    monkeypatch.setattr(common, "compile_options", lambda *_: {})
    args = argparse.Namespace(patience=1, batch_size=8, epochs=1, augment=[], profile=False)
    captioning.train(model, args, rows, rows)
    assert len(given["images"]) == 24
    assert len({id(image) for image in given["images"]}) == 12


@pytest.mark.plain
def test_the_drawings_are_as_many_as_said_and_always_the_same():
    drawn = pictures.shapes(1)
    assert len(drawn) == len({picture.key for picture in drawn}) == 1296
    again = pictures.shapes(1)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(drawn[::100], again[::100], strict=True))
    different = {np.asarray(picture.image).tobytes() for picture in drawn}
    assert len(different) == 1296
    train, test = common.split(pictures.shapes(2), 0.2)
    assert not {picture.key for picture in train} & {picture.key for picture in test}
    assert len(test) == 2 * 260


@pytest.mark.plain
def test_a_drawing_shows_what_its_caption_says():
    by_key = {picture.key: np.asarray(picture.image).astype(int) for picture in pictures.shapes(1)}
    for place, (x, y) in (("at the top left", (10, 10)), ("in the middle", (32, 32)), ("on the right", (54, 32))):
        for colour in ("red", "cyan"):
            pixel = by_key[f"a large {colour} square {place}"][y, x]
            assert np.abs(pixel - pictures.COLOURS[colour]).max() <= 16
    background = by_key["a small red circle at the top left"][40, 40]
    sizes = [
        (np.abs(by_key[f"a {size} red circle at the top left"] - pictures.COLOURS["red"]).max(-1) < 30).sum()
        for size in ("small", "medium", "large")
    ]
    assert sizes == sorted(sizes)
    assert background.min() >= 170


@pytest.mark.plain
def test_scores_are_those_of_the_published_metrics():
    references = [["A dog runs .", "the dog, running"], ["a cat sits on the mat"], ["two children play in the park"]]
    perfect = pictures.scores(["a dog runs", "A cat sits on the mat !", "two children play in the park"], references)
    assert perfect["exact_match"] == 100
    assert perfect["bleu"] == pytest.approx(100, abs=1e-4)
    other = pictures.scores(["a dog runs", "a cat sits on a mat", "some people"], references)
    assert other["exact_match"] == pytest.approx(100 / 3)
    assert 0 < other["cider"] < perfect["cider"]
    assert pictures.scores(["", "", ""], references)["bleu"] < 1e-3
    assert pictures.words("两个孩子，a Ball!") == "两 个 孩 子 a ball"


@pytest.mark.plain
def test_the_floors():
    assert baselines.most_frequent_caption(["a", "b", "b", "a", "c"]) == "a"
    images = np.stack([np.full((4, 4, 3), value, "uint8") for value in (0, 128, 255)])
    assert baselines.nearest_captions(images, ["dark", "grey", "light"], images[::-1] - np.uint8(0)) == [
        "light",
        "grey",
        "dark",
    ]


@pytest.mark.plain
def test_captions_may_hold_commas_and_quotes(captions):
    rows = pictures.captions_file(str(captions), None)
    assert [row.caption for row in rows[:2]] == ["a plain colour , number 0 .", 'colour 0, and "nothing" else']
    images, references = pictures.by_image(pictures.read(rows, (8, 8)))
    assert images.shape == (12, 8, 8, 3)
    assert rows[2].key == "1.jpg"
    assert [len(texts) for texts in references] == [2] * 12


@pytest.mark.plain
@pytest.mark.parametrize(
    ("written", "caption"),
    [
        ('"Stop", says the "sign"', '"Stop", says the "sign"'),
        ('"Stop" is what it "says"', '"Stop" is what it "says"'),
        ('"a ""sign"""', 'a "sign"'),
        ('"a sign, and more"', "a sign, and more"),
    ],
)
def test_quotation_marks_of_a_caption_stay(captions, written, caption):
    captions.write_text(f"image,caption\n0.jpg,{written}\n", encoding="utf-8")
    assert pictures.captions_file(str(captions), None)[0].caption == caption


@pytest.fixture
def in_folders(captions):
    """Rows of images that only the names of their folders, or what follows a point, tell apart."""
    names = ["a/1.jpg", "b/1.jpg", "my.photo.jpg", "my.other.jpg"]
    for name in names:
        file = captions.parent / "images" / name
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    captions.write_text("image,caption\n" + "".join(f"{name},a\n" for name in names), encoding="utf-8")
    return pictures.captions_file(str(captions), None)


def listed(folder, *parts):
    files = [folder / f"part{i}.txt" for i in range(len(parts))]
    for file, names in zip(files, parts, strict=True):
        file.write_text("\n".join(names), encoding="utf-8")
    return [str(file) for file in files]


@pytest.mark.plain
def test_a_split_tells_folders_and_names_with_points_apart(in_folders, tmp_path):
    parts = pictures.split(in_folders, listed(tmp_path, ["a/1", "gone"], ["b/1.jpg"], ["my.photo", "./my.other.jpg"]))
    assert [[picture.key for picture in part] for part in parts] == [
        ["a/1.jpg"],
        ["b/1.jpg"],
        ["my.photo.jpg", "my.other.jpg"],
    ]


@pytest.mark.plain
def test_a_split_has_no_image_twice(in_folders, tmp_path):
    files = listed(tmp_path, ["a/1"], ["b/1"], ["my.photo", "a/1.jpg"])
    with pytest.raises(common.DataError, match=r"part2\.txt: expected no image of .* a/1\.jpg, of .*part0\.txt, too"):
        pictures.split(in_folders, files)
    with pytest.raises(common.DataError, match=r"part0\.txt: expected no image of another part"):
        pictures.split(in_folders, files[:1] * 2)
    with pytest.raises(common.DataError, match=r"none that --data has"):
        pictures.split(in_folders, listed(tmp_path, ["1", "my"]))


@pytest.mark.plain
def test_a_row_without_its_image_is_told_or_counted(captions, capsys):
    (captions.parent / "images" / "3.jpg").unlink()
    with pytest.raises(common.DataError, match=r"captions\.txt:8: there is no image .*3\.jpg"):
        pictures.captions_file(str(captions), None)
    assert len(pictures.captions_file(str(captions), None, skip_missing=True)) == 22
    assert "2 of 24 rows left out" in capsys.readouterr().out


@pytest.mark.plain
def test_the_official_split_of_flickr8k(shared_data):
    folder = shared_data / "captioning"
    rows = pictures.captions_file(str(folder / "flickr8k_700" / "captions.txt"), None, skip_missing=True)
    parts = pictures.split(
        rows, [str(folder / "flickr8kcn" / f"flickr8k{name}.txt") for name in ("train", "val", "test")]
    )
    assert len(rows) == 3500
    assert [len(part) for part in parts] == [5 * 523, 5 * 80, 5 * 93]


def refused(capsys, *arguments):
    """What the recipe prints when it refuses; it must leave with 2, before any training."""
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


BAD_FILES = {
    "no header": ("0.jpg,a colour\n", "captions.txt:1: expected the header image,caption"),
    "no caption": ("image,caption\n0.jpg,\n", "captions.txt:2: expected image,caption"),
    "no comma": ("image,caption\n0.jpg\n", "captions.txt:2: expected image,caption"),
    "an empty file": ("", "captions.txt:1: expected the header"),
    "a header alone": ("image,caption\n", "expected at least one row"),
    "one image": ("image,caption\n0.jpg,a colour\n", "Expected images to train, validate and test on"),
    "a missing image": ("image,caption\n0.jpg,a\nx.jpg,b\n", "captions.txt:3: there is no image"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_bad_files_by_file_and_line(captions, tmp_path, capsys, case):
    content, message = BAD_FILES[case]
    captions.write_text(content, encoding="utf-8")
    assert message in refused(capsys, "--data", captions, "--output-dir", tmp_path / "out")


BAD_FLAGS = {
    "split and test": (["--split", "a", "b", "c", "--test-data", "d"], "--split names the test images"),
    "size of an encoder's own": (["--encoder", "a.keras", "--image-size", "32"], "--image-size is for cnn and vit"),
    "encoder": (["--encoder", "resnet"], "--encoder must be cnn, vit or a .keras file"),
    "split": (["--split", "a", "b", "c"], "--split and --test-data need --data"),
    "augment": (["--augment", "blur"], "invalid choice"),
    "size of an image": (["--image-size", "20"], "`image_size` must be a multiple of 16"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_FLAGS)
def test_refuses_bad_flags(tmp_path, capsys, case):
    flags, message = BAD_FLAGS[case]
    assert message in refused(capsys, "--variants", 1, "--limit", 8, "--output-dir", tmp_path / "out", *flags)


@pytest.mark.plain
def test_a_broken_image_ends_with_its_name(captions, tmp_path, capsys):
    (captions.parent / "images" / "5.jpg").write_bytes(b"no image")
    assert "5.jpg: expected an image" in refused(capsys, "--data", captions, "--output-dir", tmp_path / "out", *FAST)
