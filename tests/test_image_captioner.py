"""The captioner: images of any kind, what is trained, decoding, files, encoders, the SavedModel, what it refuses."""

import io
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image, ImageFile, PngImagePlugin

import keras_llama
from keras_llama.images import augment, distinct_images, read_images
from tasks import delivery

CAPTIONS = ["a red film", "a good blue", "what is green", "很好的电影"]
COLOURS = [(220, 30, 30), (30, 30, 220), (30, 200, 30), (240, 240, 240)]
ON_TENSORFLOW = keras.config.backend() == "tensorflow"
needs_tensorflow = pytest.mark.skipif(not ON_TENSORFLOW, reason="looks into the graph")


@pytest.fixture(scope="module")
def tokenizer():
    return keras_llama.SentencePieceTokenizer.train(CAPTIONS * 3, vocabulary_size=290)


def make(tokenizer, encoder=None, length=16, **options):
    keras.utils.set_random_seed(0)
    backbone = keras_llama.LlamaBackbone(
        vocabulary_size=290 if tokenizer is None else tokenizer.vocabulary_size,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=32,
        intermediate_dim=48,
        **options.pop("backbone", {}),
    )
    encoder = encoder or keras_llama.convolutional_encoder(16, (8, 8))
    text = None if tokenizer is None else keras_llama.TextPreprocessor(tokenizer, length)
    return keras_llama.LlamaImageCaptioner(backbone, encoder, text, **options)


def shaken(model, scale=0.4):
    """The model with weights so large that images and tokens tell."""
    generator = np.random.default_rng(2)
    for weight in model.weights:
        noise = generator.normal(0, scale, weight.shape)
        weight.assign(1 + abs(noise) if "norm" in weight.path else noise)
    return model


@pytest.fixture(scope="module")
def random(tokenizer):
    return shaken(make(tokenizer))


@pytest.fixture(scope="module")
def by_ids():
    """The same without a preprocessor."""
    return shaken(make(None, generation_config={"decoder_start_token_id": 1}))


@pytest.fixture(scope="module")
def trained(tokenizer):
    model = make(tokenizer)
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(np.repeat(plain_images(), 4, axis=0), np.repeat(CAPTIONS, 4), epochs=50, batch_size=16, verbose=0)
    return model


def plain_images(size=16):
    return np.stack([np.full((size, size, 3), colour, "uint8") for colour in COLOURS])


def noise(count, size=16):
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3)).astype("uint8")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def arrays(weights):
    return [ops.convert_to_numpy(weight) for weight in weights]


def changed(weights, before):
    return [not np.array_equal(a, b) for a, b in zip(arrays(weights), before, strict=True)]


def test_learns_captions_and_gives_them_back(trained, tmp_path):
    images = plain_images()
    assert trained.generate(images) == CAPTIONS
    assert trained.generate(images, num_beams=3) == CAPTIONS
    assert trained.generate(images[1]) == CAPTIONS[1]
    Image.fromarray(images[2]).resize((50, 70)).save(tmp_path / "green.png")
    assert trained.generate(tmp_path / "green.png") == CAPTIONS[2]
    assert trained.generate([str(tmp_path / "green.png"), images[0]]) == [CAPTIONS[2], CAPTIONS[0]]
    assert "".join(trained.generate(images[3], stream=True)) == CAPTIONS[3]
    found = trained.evaluate(images, CAPTIONS, verbose=0, return_dict=True)
    assert found["accuracy"] == 1
    assert trained.evaluate(images, CAPTIONS[::-1], verbose=0, return_dict=True)["accuracy"] < 1


def connected(twice):
    """Two layers and their sum, or twice the second: the layers are the same."""
    image = keras.Input((16, 16, 3))
    first = keras.layers.Conv2D(8, 8, 8)(image)
    second = keras.layers.Conv2D(8, 1, activation="relu")(first)
    return keras.Model(image, keras.layers.Add()([second if twice else first, second]))


@pytest.mark.plain
def test_a_training_goes_on_with_layers_of_other_automatic_names(tokenizer, tmp_path):
    def fit(encoder, epochs):
        model = make(tokenizer, encoder)
        model.compile()
        return model.fit(plain_images(), CAPTIONS, epochs=epochs, verbose=0, resume=tmp_path)

    first = fit(connected(twice=False), 1).history["loss"]
    history = fit(connected(twice=False), 2)
    assert (history.epoch, history.history["loss"][:1]) == ([0, 1], first)
    with pytest.raises(ValueError, match="must be of this model"):
        fit(connected(twice=True), 3)


def inputs_of(model, images, rows):
    """What the graph takes: images, and rows of token ids behind the start."""
    ids = np.array([[model.start_id, *row] for row in rows], "int32")
    return {"images": images, "token_ids": ids, "padding_mask": np.ones_like(ids)}


@pytest.mark.plain
def test_a_caption_has_the_context_behind_the_patches(tokenizer):
    model = make(tokenizer, length=12, backbone={"context_length": 28})  # 16 patches
    model.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caption is cut
        model.fit(noise(1), ["what is green " * 9], verbose=0)
    rows = [[5] * 11, [5] * 12]
    assert model.predict(inputs_of(model, noise(1), rows[:1]), verbose=0).shape[1] == 12
    with pytest.raises(ValueError, match=r"texts of at most 12 tokens.*Received: longest=13"):
        model.predict(inputs_of(model, noise(1), rows[1:]), verbose=0)


def test_cached_decoding_is_that_of_the_whole_graph(by_ids):
    images = noise(3)
    found = by_ids.generate(images, 6)["token_ids"]
    assert len({tuple(row) for row in found}) > 1  # the images tell
    logits = ops.convert_to_numpy(by_ids(inputs_of(by_ids, images, found[:, :-1])))
    assert np.array_equal(logits.argmax(-1), found)


def best_by_search(model, image, width, steps, ends):
    """Beam search without a cache and without batches, from its definition."""
    running, finished = [((), 0.0)], []
    for _ in range(steps):
        inputs = inputs_of(model, np.repeat(image[None], len(running), axis=0), [row for row, _ in running])
        scores = ops.convert_to_numpy(ops.log_softmax(model(inputs)[:, -1]))
        found = [
            ((*row, token), total + float(line[token]))
            for (row, total), line in zip(running, scores, strict=True)
            for token in range(len(line))
        ]
        found = sorted(found, key=lambda pair: -pair[1])[: 2 * width]
        finished += [(row, s) for row, s in found[:width] if row[-1] in ends]
        running = [(row, s) for row, s in found if row[-1] not in ends][:width]
    return max([*finished, *running], key=lambda pair: pair[1] / len(pair[0]))[0]


def test_beams_are_those_of_the_definition(by_ids):
    image, ends = noise(1), list(range(0, 290, 5))
    found = by_ids.generate(image, 4, num_beams=3, stop_token_ids=ends)
    assert found["token_ids"][0].tolist() == list(best_by_search(by_ids, image[0], 3, 4, ends))


def test_a_batch_gives_what_each_image_alone_gives(random):
    images = noise(4)
    for options in ({}, {"num_beams": 3}, {"temperature": 1.0, "top_k": 20}):
        whole = random.generate(images, 8, seed=3, stop=None, **options)
        if "temperature" not in options:  # a row's random numbers are those of its number in the call
            assert [random.generate(image, 8, seed=3, stop=None, **options) for image in images] == whole
        assert random.generate(images, 8, seed=3, stop=None, batch_size=2, **options) == whole
    assert len(set(whole)) > 1


def test_the_loss_is_the_mean_over_the_captions_tokens(random):
    images, captions = noise(2), ["a", "what is green"]
    logits = random.predict({"images": images, "captions": captions}, verbose=0)
    rows = random.whole_texts(captions)
    entropies = [
        -ops.convert_to_numpy(ops.log_softmax(line))[np.arange(len(row) - 1), row[1:]]
        for line, row in zip(logits, rows, strict=True)
    ]
    expected = np.concatenate(entropies).mean()
    random.compile()
    assert random.evaluate(images, captions, verbose=0, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-5)
    # With metrics of another kind all logits are computed; the loss is the same.
    random.compile(weighted_metrics=[keras.metrics.SparseTopKCategoricalAccuracy()])
    assert random.evaluate(images, captions, verbose=0, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-5)
    weighted = random.evaluate(images, captions, sample_weight=[0, 1], verbose=0, return_dict=True)
    assert weighted["loss"] == pytest.approx(entropies[1].mean(), rel=1e-5)


FROZEN = {
    "nothing": (lambda model: None, (True, True, True)),
    "encoder": (lambda model: setattr(model.image_encoder, "trainable", False), (False, True, True)),
    "decoder": (lambda model: model.freeze_base(), (True, True, False)),
    "all but adapters": (lambda model: model.enable_lora(rank=2), (True, True, False)),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_gradients_reach_what_is_trained_and_nothing_else(tokenizer, frozen):
    model = make(tokenizer)
    freeze, expected = FROZEN[frozen]
    parts = [model.image_encoder.weights, model.projector.weights, model.backbone.weights]
    before = [arrays(part) for part in parts]
    freeze(model)
    model.compile(keras.optimizers.SGD(1.0))
    model.fit(noise(8), CAPTIONS * 2, epochs=2, verbose=0)  # B of an adapter is zero in the first step
    for part, values, trained in zip(parts, before, expected, strict=True):
        assert set(changed(part, values)) == {trained}
    if frozen == "all but adapters":
        assert any(ops.convert_to_numpy(w).any() for w in model.trainable_weights if w.path.endswith("lora_b"))


@pytest.mark.plain
def test_augmentation_changes_training_alone(tokenizer, tmp_path):
    layers = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.1)]
    layers += [keras.layers.RandomCrop(12, 12), keras.layers.Resizing(16, 16)]
    encoder = keras_llama.vit_encoder(16, 8, width=8, num_layers=1, num_heads=2)  # which keeps no means of its batches
    model, images = make(tokenizer, encoder), noise(4)
    columns = {"images": images, "captions": CAPTIONS}
    first = model.predict(columns, verbose=0)
    model.compile(keras.optimizers.SGD(0.0))
    options = {"validation_data": (images, CAPTIONS), "augmentation": layers, "verbose": 0}
    found = model.fit(images, CAPTIONS, epochs=3, resume=tmp_path / "state", **options).history
    assert len(set(found["loss"])) == 3  # each epoch sees other crops
    assert len(set(found["val_loss"])) == 1
    assert np.array_equal(model.predict(columns, verbose=0), first)
    more = model.fit(images, CAPTIONS, epochs=4, resume=tmp_path / "state", **options).history
    assert more["loss"][:3] == found["loss"]  # the data are known again, whatever was made of them
    with pytest.raises(ValueError, match=r"give images of the size.*Received: size=\(12, 12\)"):
        augment(layers[2:3], ({"images": images},), [0])


@pytest.mark.plain
def test_what_is_drawn_depends_on_the_seed_alone():
    layers = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.1)]
    ((first,), (same,), (other,)) = (augment(layers, ({"images": noise(4)},), [0, 0, i]) for i in (0, 0, 1))
    assert np.array_equal(first["images"], same["images"])
    assert not np.array_equal(first["images"], other["images"])


LOAD = """
import sys, numpy as np, keras, keras_llama
folder = sys.argv[1]
given = np.load(folder + "/given.npz")
for model in keras.saving.load_model(folder + "/a.keras"), keras_llama.LlamaImageCaptioner.from_preset(folder + "/b"):
    print(model.generate(given["images"]))
    np.save(folder + "/found.npy", model.predict({"images": given["images"], "captions": given["captions"]}, verbose=0))
"""


@pytest.mark.plain
def test_files_bring_it_back_in_a_fresh_process(trained, tmp_path, run_python):
    images, columns = plain_images(), {"images": plain_images(), "captions": CAPTIONS}
    np.savez(tmp_path / "given.npz", **columns)
    trained.save(tmp_path / "a.keras")
    trained.save_to_preset(tmp_path / "b")
    names = {file.name for file in (tmp_path / "b").iterdir()}
    assert {"config.json", "model.safetensors", "image_encoder.keras", "tokenizer.model", "keras_llama.json"} <= names
    assert run_python(LOAD, tmp_path).splitlines() == [str(trained.generate(images))] * 2
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), trained.predict(columns, verbose=0), atol=1e-4)
    with pytest.raises(ValueError, match="know no image encoder"):
        keras_llama.save_checkpoint(trained, tmp_path / "other")
    (tmp_path / "b" / "image_encoder.keras").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"image_encoder\.keras: expected a Keras model"):
        keras_llama.LlamaImageCaptioner.from_preset(tmp_path / "b")


@pytest.mark.plain
def test_a_transformer_and_a_tied_head_come_back_too(tokenizer, tmp_path):
    encoder = keras_llama.vit_encoder(16, 8, width=8, num_layers=1, num_heads=2)
    model = shaken(make(tokenizer, encoder, label_smoothing=0.1, backbone={"tie_word_embeddings": True}))
    columns = {"images": noise(2), "captions": CAPTIONS[:2]}
    expected = model.predict(columns, verbose=0)
    model.save(tmp_path / "a.keras")
    model.save_to_preset(tmp_path / "b")
    for again in (
        keras.saving.load_model(tmp_path / "a.keras"),
        keras_llama.LlamaImageCaptioner.from_preset(tmp_path / "b"),
    ):
        assert np.array_equal(again.predict(columns, verbose=0), expected)
        assert again.label_smoothing == 0.1
    decoder = keras_llama.LlamaCausalLM.from_preset(tmp_path / "b")  # without its eyes
    for mine, theirs in zip(arrays(decoder.weights), arrays(model.backbone.weights), strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.plain
def test_a_frozen_encoder_and_adapters_come_back_so(tokenizer, tmp_path):
    vit = keras_llama.vit_encoder(16, 8, width=8, num_layers=1, num_heads=2)
    vit.trainable = False
    model = make(tokenizer, keras.Sequential([keras.Input((16, 16, 3)), vit]))  # frozen inside of what is not
    model.enable_lora(rank=2)
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(noise(4), CAPTIONS, verbose=0)
    columns = {"images": noise(2), "captions": CAPTIONS[:2]}
    expected = model.predict(columns, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert [w.path for w in again.trainable_weights] == [w.path for w in model.trainable_weights]
    np.testing.assert_array_equal(again.predict(columns, verbose=0), expected)
    keras_llama.save_checkpoint(model, tmp_path / "adapter", format="peft")
    other = make(tokenizer, keras_llama.vit_encoder(16, 8, width=8, num_layers=1, num_heads=2))
    other.image_encoder.set_weights(model.image_encoder.get_weights())
    other.load_adapter(tmp_path / "adapter")  # with the projector that was trained beside
    np.testing.assert_allclose(other.predict(columns, verbose=0), expected, atol=1e-5)


@pytest.mark.plain
def test_a_text_checkpoint_is_the_decoder(chat_lm, tmp_path, capsys):
    chat_lm.save_to_preset(tmp_path / "preset")
    encoder = keras_llama.convolutional_encoder(16, (8, 8))
    model = keras_llama.LlamaImageCaptioner.from_preset(tmp_path / "preset", image_encoder=encoder)
    assert "multi_modal_projector.linear_1.weight" in capsys.readouterr().out
    for mine, theirs in zip(arrays(model.backbone.weights), arrays(chat_lm.backbone.weights), strict=True):
        assert np.array_equal(mine, theirs)
    assert all(array.any() for array in arrays(model.projector.weights))
    assert 0.018 < ops.convert_to_numpy(model.projector.positions.embeddings).std() < 0.022
    assert model.start_id == chat_lm.preprocessor.tokenizer.eos_id  # this vocabulary has no begin of text
    model.compile(keras.optimizers.Adam(1e-3))
    losses = model.fit(noise(8), CAPTIONS * 2, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="`image_encoder` must be a Keras model of images"):
        keras_llama.LlamaImageCaptioner.from_preset(tmp_path / "preset")


@pytest.mark.plain
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNetBackbone", "ViTBackbone"])
@pytest.mark.filterwarnings("ignore")  # of the packages about themselves
def test_encoders_of_keras_applications_and_of_kerashub(tokenizer, tmp_path, name):
    if name == "MobileNetV2":
        encoder = keras.applications.MobileNetV2((64, 64, 3), alpha=0.35, include_top=False, weights=None)
    else:
        keras_hub = pytest.importorskip("keras_hub")
        small = {
            "ViTBackbone": {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32},
            "ResNetBackbone": {
                "input_conv_filters": [64],
                "input_conv_kernel_sizes": [7],
                "stackwise_num_filters": [64, 64],
                "stackwise_num_blocks": [1, 1],
                "stackwise_num_strides": [1, 2],
                "block_type": "basic_block",
            },
        }[name]
        encoder = getattr(keras_hub.models, name)(image_shape=(64, 64, 3), **small)
    scaled = keras.Sequential([keras.Input((64, 64, 3)), keras.layers.Rescaling(1 / 127.5, -1), encoder])
    model = make(tokenizer, scaled)
    model.enable_lora(rank=2)
    assert not any("moving" in weight.path for weight in model.trainable_weights)
    model.compile(keras.optimizers.Adam(1e-3))
    model.fit(noise(8, 64), CAPTIONS * 2, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.generate(noise(2, 64), 5, stop=None) == model.generate(noise(2, 64), 5, stop=None)


def gradient(width=23, height=31):
    """An image (h, w, 3) that no turn or mirror leaves as it is."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y, x * y], -1) * 255).astype("uint8"))


# What was done to an image that its orientation says how to take back.
TURNS = dict(
    zip(range(2, 9), [getattr(Image.Transpose, name) for name in (
        "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"
    )], strict=True)
)  # fmt: skip


def with_orientation(number, kind="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = number
    image = gradient().transpose(TURNS[number]) if number > 1 else gradient()
    return encoded(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


KINDS = {
    "a photograph": lambda: encoded(gradient(200, 150), "JPEG", quality=90),
    "a larger one": lambda: encoded(Image.fromarray(noise(1, 61)[0]), "PNG"),
    "grey": lambda: encoded(gradient().convert("L"), "JPEG"),
    "grey of 16 bits": lambda: encoded(Image.fromarray(np.arange(30 * 40, dtype="uint16").reshape(30, 40) * 50), "PNG"),
    "grey with transparency": lambda: encoded(gradient().convert("LA"), "PNG"),
    "black and white": lambda: encoded(gradient().convert("1"), "PNG"),
    "print colours": lambda: encoded(gradient().convert("CMYK"), "JPEG", quality=95),
    "transparent": lambda: encoded(gradient().convert("RGBA"), "PNG"),
    "a palette": lambda: encoded(gradient().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "a palette with transparency": lambda: encoded(
        gradient().convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=bytes([0, 128] * 20)
    ),
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG"),
    **{f"orientation {i}": (lambda i=i: with_orientation(i)) for i in range(1, 9)},
    "orientation of a PNG": lambda: with_orientation(6, "PNG"),
    "turned by XMP alone": lambda: encoded(gradient(), "JPEG", xmp=b'<x tiff:Orientation="6"/>'),
    "EXIF that is none": lambda: encoded(gradient(), "PNG", exif=b"nothing at all"),
    "EXIF of four bytes": lambda: encoded(gradient(), "PNG", exif=b"II*\0"),
}


@pytest.mark.plain
@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_image_is_read_alike_here_and_in_the_graph(kind):
    import tensorflow as tf

    from keras_llama.export import graph_images

    file = KINDS[kind]()
    found = read_images([file], (16, 16))
    assert found.shape == (1, 16, 16, 3)
    served = graph_images.read(tf.constant([file]), (16, 16)).numpy()
    # Sums of products may round otherwise where they end in one half.
    assert np.abs(served.astype(int) - found).max() <= 1
    assert (served != found).mean() < 0.01
    image = Image.open(io.BytesIO(file))
    if "orientation" in kind:
        upright = read_images([encoded(gradient(), "PNG")], (16, 16)).astype(int)
        assert np.abs(found - upright).max() < 12  # as JPEG keeps it
    elif "16 bits" not in kind:
        assert np.array_equal(read_images([image], (16, 16)), found)


@pytest.mark.plain
@pytest.mark.parametrize("ending", ["webp", "gif", "bmp", "tif", "png", "jpg"])
def test_a_file_of_any_kind_is_read_and_closed(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (9, 5), (250, 10, 10)).save(path)
    with warnings.catch_warnings(record=True) as left_open:
        warnings.simplefilter("always")
        assert np.abs(read_images([path], (4, 4)).astype(int) - (250, 10, 10)).max() < 8
    assert not left_open


@pytest.mark.plain
def test_arrays_and_lists_of_any_size():
    colour = np.full((9, 5, 3), (10, 20, 30), "uint8")
    alike = [colour, colour[:1, :1], np.concatenate([colour, colour[..., :1]], -1), Image.fromarray(colour)]
    assert (read_images(alike, (4, 6)) == np.array([10, 20, 30])).all()
    grey = read_images([colour[..., 0], colour[..., :1]], (4, 6))
    assert (grey == 10).all()
    whole = noise(2)
    assert read_images(whole, (16, 16)) is whole
    wide = np.zeros((2, 4, 3), "uint8")
    wide[:, 2:] = 200  # nothing is cut, whatever the shape
    assert read_images([wide], (2, 2))[0, :, :, 0].tolist() == [[29, 171]] * 2


@pytest.mark.plain
def test_an_image_that_stands_in_a_list_several_times_is_held_once(tmp_path):
    images, path = noise(2), str(tmp_path / "a.png")
    Image.fromarray(images[1]).save(path)
    first, second = images
    found, numbers = distinct_images([first, path, first, second, path, first], (16, 16))
    assert found[0] is first
    assert len(found) == 3
    assert numbers.tolist() == [0, 1, 0, 2, 1, 0]
    assert np.array_equal(read_images([first, path, first], (16, 16)), images[[0, 1, 0]])
    larger = noise(6, 24)  # whose images come and go one by one
    assert len({image.tobytes() for image in read_images(larger, (16, 16))}) == 6


@pytest.mark.plain
def test_captions_of_one_image_are_trained_beside_it(random):
    first, second = noise(2)
    images = [first, second, first, second]
    random.compile()
    expected = random.evaluate(np.stack(images), CAPTIONS, verbose=0)
    assert random.evaluate(images, CAPTIONS, verbose=0) == pytest.approx(expected, rel=1e-6)


def with_long_text():
    """A PNG file of a few kilobytes whose text is more than a megabyte."""
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 2**21, zip=True)
    return encoded(gradient(), "PNG", pnginfo=text)


def bomb(width, height):
    return encoded(Image.new("1", (width, height)), "PNG")


BAD_IMAGES = {
    "no image": (lambda: b"not an image", r"images\[0\]: expected an image"),
    "a cut file": (lambda: KINDS["a photograph"]()[:900], r"images\[0\]: expected an image"),
    "a cut PNG": (lambda: KINDS["a larger one"]()[:900], r"images\[0\]: expected an image"),
    "20 megapixels": (lambda: bomb(5000, 4000), r"images\[0\]: expected an image of at most 16,777,216 pixels"),
    "200 megapixels": (lambda: bomb(20000, 10000), "of at most 16,777,216 pixels"),
    "too long a text": (with_long_text, r"images\[0\]: expected an image\..*too large.*Is the file whole"),
    "colours that do not become RGB": (lambda: Image.new("La", (4, 4)), r"images\[0\]: expected an image.*La to"),
    "no such file": (lambda: "nowhere.jpg", "nowhere.jpg: expected an image"),
    "real numbers": (lambda: np.zeros((4, 4, 3)), r"images\[0\]: expected .*Received: .*float64.*0 to 255"),
    "five channels": (lambda: np.zeros((4, 4, 5), "uint8"), "C being 1, 3 or 4"),
    "no pixels": (lambda: np.zeros((0, 4, 3), "uint8"), "C being 1, 3 or 4"),
    "nothing": (lambda: None, r"images\[0\]: expected a path"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_refuses_bad_images(case, monkeypatch):
    image, message = BAD_IMAGES[case][0](), BAD_IMAGES[case][1]
    if "megapixels" in case:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=message):
        read_images([image], (8, 8))


@pytest.mark.plain
def test_names_the_broken_file(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(KINDS["a photograph"]()[:500])
    with pytest.raises(ValueError, match=r"broken\.jpg: expected an image"):
        read_images([str(tmp_path / "broken.jpg")], (8, 8))
    for bad in ("one.jpg", [], 7):
        with pytest.raises(ValueError, match="`images` must"):
            read_images(bad, (8, 8))


@needs_tensorflow
@pytest.mark.parametrize("case", ["no image", "a cut PNG", "20 megapixels"])
def test_the_graph_refuses_bad_images(case):
    import tensorflow as tf

    from keras_llama.export import graph_images

    with pytest.raises(tf.errors.InvalidArgumentError):
        graph_images.read(tf.constant([BAD_IMAGES[case][0]()]), (8, 8))


@needs_tensorflow
@pytest.mark.filterwarnings("ignore:The SavedModel takes token ids")
def test_a_fresh_process_reads_files_and_the_graph_captions_them(random, tmp_path):
    import tensorflow as tf

    files = {"a.jpg": KINDS["orientation 6"](), "b.png": KINDS["a palette"](), "c.png": KINDS["one pixel"]()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    random.export(tmp_path / "served")
    served = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    found = served(tf.constant(list(files.values())))["texts"].numpy()
    ids = np.array([[1, 5, 6]] * 3, "int32")
    inputs = {"images": paths, "token_ids": ids, "padding_mask": np.ones_like(ids)}
    logits = delivery.served_logits(tmp_path / "served", inputs, "--files")
    # A pixel may be one of 255 apart.
    assert np.abs(logits - random.predict(inputs, verbose=0)).max() < 0.02 * np.ptp(logits)
    expected = random.generate(paths)
    assert len(set(expected)) > 1
    clean = [text.decode().replace("\ufffd", "") for text in found]
    assert clean == [text.replace("\ufffd", "") for text in expected]


@needs_tensorflow
@pytest.mark.filterwarnings("ignore:The SavedModel takes token ids")
def test_signatures_of_logits_and_of_token_ids(random, tmp_path):
    import tensorflow as tf

    without = keras_llama.LlamaImageCaptioner(random.backbone, random.image_encoder)
    without.export(tmp_path / "served")
    images = noise(2)
    ids = np.array([[1, 5, 6]] * 2, "int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    files = tf.constant([encoded(Image.fromarray(image), "PNG") for image in images])
    tensors = {name: tf.constant(value) for name, value in inputs.items()}
    found = tf.saved_model.load(str(tmp_path / "served")).signatures["logits"](images=files, **tensors)["logits"]
    np.testing.assert_allclose(found, without({"images": images, **inputs}), atol=1e-4)
    with pytest.raises(ValueError, match='"tf_saved_model" for a model that reads images'):
        random.export(tmp_path / "model.onnx", format="onnx")


@pytest.mark.plain
def test_a_quantised_captioner_comes_back(trained, tokenizer, tmp_path):
    model = make(tokenizer)
    model.set_weights(trained.get_weights())
    model.quantize("int8")
    kinds = {weight.path.split("/")[0] for weight in model.weights if weight.dtype == "int8"}
    assert kinds == {"token_embedding", "block_0", "lm_head"}  # neither the image encoder nor the projector
    images, columns = plain_images(), {"images": plain_images(), "captions": CAPTIONS}
    assert model.generate(images) == CAPTIONS
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.generate(images, num_beams=2) == CAPTIONS
    assert np.array_equal(again.predict(columns, verbose=0), model.predict(columns, verbose=0))
    with pytest.raises(ValueError, match="holds the weights before `quantize`"):
        model.save_to_preset(tmp_path / "preset")
    model.enable_lora(rank=2)
    model.compile(keras.optimizers.Adam(1e-3))
    model.fit(images, CAPTIONS, verbose=0)


@pytest.mark.plain
def test_refuses_to_quantise_by_texts_alone(random):
    config = keras.quantizers.GPTQConfig(dataset=CAPTIONS, tokenizer=None, weight_bits=4, group_size=8)
    with pytest.raises(ValueError, match=r"by texts alone, and this decoder reads images.*mode=.gptq"):
        random.quantize(config=config)
    assert random.quantized is None


class Pictures(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return list(noise(4)), CAPTIONS


@pytest.mark.plain
def test_streams_and_held_out_rows(tokenizer):
    model = make(tokenizer)
    model.compile(keras.optimizers.Adam(1e-2))
    history = model.fit(Pictures(), epochs=2, validation_data=(plain_images(), CAPTIONS), verbose=0).history
    assert history["val_loss"][-1] < history["val_loss"][0]
    model.fit(list(plain_images(20)) * 2, CAPTIONS * 2, validation_split=0.25, verbose=0)


BAD_ROWS = {
    "no captions": (lambda: (noise(2), None), "An image needs a caption"),
    "fewer captions": (lambda: (noise(2), ["a"]), "a caption for each image"),
    "an empty caption": (lambda: (noise(2), ["a", ""]), r"`captions\[1\]` must not be empty"),
    "another column": (lambda: ({"images": noise(1), "texts": ["a"]}, None), "keys images and captions"),
    "no images": (lambda: ({"captions": ["a"]}, None), "with the key images"),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD_ROWS)
def test_refuses_bad_rows(random, case):
    random.compile()
    with pytest.raises(ValueError, match=BAD_ROWS[case][1]):
        random.fit(*BAD_ROWS[case][0](), verbose=0)


class Unbuilt(keras.Model):
    """An encoder that no one has told the size of its images."""


@pytest.mark.plain
def test_refuses_bad_parts(tokenizer):
    open_size = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3)])
    grey = keras.Sequential([keras.Input((16, 16, 1)), keras.layers.Conv2D(4, 3)])
    pooled = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.GlobalAveragePooling2D()])
    unbuilt = keras.Sequential([keras.layers.Conv2D(4, 3)])
    for encoder in (open_size, grey, pooled, unbuilt, Unbuilt()):
        with pytest.raises(ValueError, match="all sizes fixed"):
            make(tokenizer, encoder)
    with pytest.raises(ValueError, match="must be causal"):
        make(tokenizer, backbone={"causal": False})
    with pytest.raises(ValueError, match="context of 30 tokens must hold"):
        make(tokenizer, backbone={"context_length": 30})
    for options in ({"image_size": 20}, {"image_size": 30, "patch_size": 7}):
        with pytest.raises(ValueError, match="must be a multiple"):
            (keras_llama.vit_encoder if "patch_size" in options else keras_llama.convolutional_encoder)(**options)
