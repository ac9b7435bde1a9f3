"""SavedModels: strings in, strings or probabilities out, in a process that has TensorFlow and nothing else of this."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import vocabularies

import keras_llama
from tasks import delivery

ON_TENSORFLOW = keras.config.backend() == "tensorflow"
needs_tensorflow = pytest.mark.skipif(not ON_TENSORFLOW, reason="looks into the graph")
TEXTS = ["a good film", "很差的电影", "  spaces 😀 </s> <s>", "a film " * 20, ""]


@pytest.fixture(params=["tokenizer", "chat_tokenizer"] if ON_TENSORFLOW else ["tokenizer"])
def vocabulary(request):
    """A SentencePiece and a byte-level one."""
    return request.getfixturevalue(request.param)


def parts(tokenizer, **options):
    backbone = keras_llama.LlamaBackbone(vocabulary_size=tokenizer.vocabulary_size, **keras_llama.size("tiny"))
    return backbone, keras_llama.TextPreprocessor(tokenizer, 24, **options)


def classifier(tokenizer, problem_type="single", labels=("bad", "good"), **options):
    backbone, preprocessor = parts(tokenizer, **options)
    options = {"labels": labels, "problem_type": problem_type, "preprocessor": preprocessor, "pooling": "mean"}
    return keras_llama.LlamaTextClassifier(backbone, **options)


def language_model(tokenizer, make_backbone, **generation):
    backbone = make_backbone(vocabulary_size=tokenizer.vocabulary_size, context_length=48)
    preprocessor = keras_llama.TextPreprocessor(tokenizer, 24)
    return keras_llama.LlamaCausalLM(backbone, preprocessor, generation or None)


def translator(tokenizer):
    backbone = keras_llama.LlamaSeq2SeqBackbone(
        vocabulary_size=tokenizer.vocabulary_size, **keras_llama.size("tiny"), num_encoder_layers=1
    )
    generator = np.random.default_rng(1)
    for variable in backbone.variables:
        variable.assign(variable + generator.normal(0, 0.2, variable.shape))
    return keras_llama.LlamaSeq2SeqLM(backbone, keras_llama.TextPreprocessor(tokenizer, 20, add_eos=True))


@pytest.fixture(scope="module")
def written(make_backbone, tmp_path_factory):
    """A model and the folder that it is exported to, once for all tests that only read them."""
    kinds = {
        "classifier": lambda vocabulary: classifier(
            vocabulary, add_eos=isinstance(vocabulary, keras_llama.SentencePieceTokenizer)
        ),
        "translator": translator,
        "language model": lambda vocabulary: language_model(vocabulary, make_backbone, max_new_tokens=12),
    }
    made = {}

    def once(kind, vocabulary):
        if (kind, vocabulary) not in made:
            model, directory = kinds[kind](vocabulary), tmp_path_factory.mktemp("exports") / "model"
            model.export(directory)
            made[kind, vocabulary] = model, directory
        return made[kind, vocabulary]

    return once


@functools.cache
def loaded(directory):
    import tensorflow as tf

    return tf.saved_model.load(str(directory))


def call(directory, name, *inputs):
    """What a signature of a SavedModel gives, as arrays and lists."""
    import tensorflow as tf

    function = loaded(directory).signatures[name]
    names = json.loads((directory / "keras_llama.json").read_text())["signatures"][name]
    dtypes = {key: spec.dtype for key, spec in function.structured_input_signature[1].items()}
    found = function(**{key: tf.constant(x, dtypes[key]) for key, x in zip(names, inputs, strict=True)})
    return {key: tensor.numpy() for key, tensor in found.items()}


def readable(texts):
    """Broken characters are U+FFFD everywhere; how many of them depends on who writes them."""
    return [re.sub("\ufffd+", "\ufffd", text) for text in texts]


def strings(array):
    return [text.decode() for text in array]


@pytest.mark.filterwarnings("ignore:.*texts are longer than sequence_length")
def test_a_fresh_process_classifies(vocabulary, written, tmp_path):
    """From another place than the model was written to."""
    model, directory = written("classifier", vocabulary)
    shutil.move(directory, tmp_path / "elsewhere")
    answer = delivery.serve(tmp_path / "elsewhere", TEXTS)
    shutil.move(tmp_path / "elsewhere", directory)
    found = np.array(answer["probabilities"])
    expected = keras.ops.convert_to_numpy(model.probabilities(model.predict(TEXTS[:-1], verbose=0)))
    np.testing.assert_allclose(found[:-1], expected, atol=1e-6 if ON_TENSORFLOW else 1e-4)
    assert answer["labels"][:-1] == [row["label"] for row in model.classify(TEXTS[:-1])]
    assert answer["label_names"] == ["bad", "good"]
    assert np.isfinite(found[-1]).all()  # the empty string is a text of no tokens but the first


@pytest.mark.slow
def test_a_fresh_process_generates(vocabulary, written):
    model, directory = written("language model", vocabulary)
    prompts = TEXTS[:3]
    for asked in (prompts, prompts[:1]):
        assert readable(delivery.serve(directory, asked)["texts"]) == readable(model.generate(asked))


@pytest.mark.slow
def test_a_fresh_process_translates(vocabulary, written):
    model, directory = written("translator", vocabulary)
    sources = [*TEXTS[:3], "unseen слова", "good " * 80]
    found, expected = delivery.serve(directory, sources)["texts"], model.generate(sources, truncate=True)
    assert readable(found) == readable(expected)


LOADS_ALONE = """
import sys
for name in ("keras", "keras_hub", "keras_nlp", "keras_llama", "tensorflow_text"):
    sys.modules[name] = None  # to import it is an error
import tensorflow as tf
served = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
print(served(tf.constant(["a film"]))["texts"][0].numpy().decode())
"""


@needs_tensorflow
def test_it_needs_tensorflow_alone(chat_tokenizer, written, run_python):
    model, directory = written("language model", chat_tokenizer)
    assert run_python(LOADS_ALONE, directory).rstrip("\n") == model.generate("a film").rstrip("\n")


def graph(directory):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    return SavedModel.FromString((directory / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def


def operations(directory):
    found = graph(directory)
    return {node.op for nodes in (found.node, *(f.node_def for f in found.library.function)) for node in nodes}


@needs_tensorflow
@pytest.mark.parametrize("kind", ["classifier", "translator", "language model"])
def test_the_graph_holds_known_operations_only(vocabulary, written, kind):
    allowed = set((pathlib.Path(__file__).parent / "operations.txt").read_text().split())
    assert operations(written(kind, vocabulary)[1]) <= allowed


@needs_tensorflow
def test_a_session_consumer(tokenizer, written):
    model, directory = written("translator", tokenizer)
    command = ["saved_model_cli", "run", "--dir", str(directory), "--tag_set", "serve"]
    command += ["--signature_def", "serving_default", "--input_exprs", "sources=['a good film']"]
    tool = pathlib.Path(sys.executable).with_name(command[0])
    done = subprocess.run([str(tool), *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert repr(model.generate("a good film").encode()) in done.stdout


@needs_tensorflow
def test_stop_tokens_limits_and_context(tokenizer, make_backbone, tmp_path):
    model = language_model(tokenizer, make_backbone)
    prompts = ["a film", "a good film it is, a good film"]
    ids = model.generate([row.tolist() for row in map(np.array, tokenizer.encode(prompts, add_bos=True))], 20)
    stop = int(ids["token_ids"][0][len(tokenizer.encode(prompts[:1], add_bos=True)[0]) + 4])
    model.generation_config = {"eos_token_id": [stop]}
    model.export(tmp_path / "model")
    found = call(tmp_path / "model", "generate", prompts, 10, 0.0, 0, 1.0, 0)
    assert strings(found["texts"]) == model.generate(prompts, 10)
    assert found["stopped"][0] == 1
    assert call(tmp_path / "model", "generate", prompts, 2, 0.0, 0, 1.0, 0)["stopped"].tolist() == [0, 0]
    model.generation_config = {"eos_token_id": []}
    model.export(tmp_path / "endless")
    beyond = call(tmp_path / "endless", "generate", prompts, 1000, 0.0, 0, 1.0, 0)
    assert beyond["stopped"].tolist() == [2, 2]
    alone = [model.generate(text, 48 - len(tokenizer.encode([text], add_bos=True)[0])) for text in prompts]
    assert strings(beyond["texts"]) == alone


@needs_tensorflow
def test_sampling_has_the_probabilities_of_the_model(tokenizer, written):
    model, directory = written("language model", tokenizer)
    prompts = ["a film"] * 1500
    drawn = strings(call(directory, "generate", prompts, 1, 0.9, 6, 0.95, 3)["texts"])
    here = model.generate(prompts, 1, temperature=0.9, top_k=6, top_p=0.95, seed=5, batch_size=1500)
    kinds = sorted({*drawn, *here})
    counts = np.array([[texts.count(kind) for kind in kinds] for texts in (drawn, here)])
    assert 2 <= len(kinds) <= 6
    expected = counts.sum(0) / 2
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom, p = 0.001
    again = call(directory, "generate", prompts, 1, 0.9, 6, 0.95, 3)["texts"]
    other = call(directory, "generate", prompts, 1, 0.9, 6, 0.95, 4)["texts"]
    assert strings(again) == drawn != strings(other)


@needs_tensorflow
def test_scores_and_tokens(vocabulary, written):
    model, directory = written("language model", vocabulary)
    texts = TEXTS[:3]
    found = call(directory, "score", texts)
    for row, size, expected in zip(found["log_probs"], found["lengths"], model.score(texts), strict=True):
        np.testing.assert_allclose(row[: size - 1], expected["log_probs"], atol=1e-4)
        assert not row[size - 1 :].any()
    tokens = call(directory, "tokenize", texts)
    rows = [row[:size].tolist() for row, size in zip(tokens["token_ids"], tokens["lengths"], strict=True)]
    assert rows == vocabulary.encode(texts)
    back = call(directory, "detokenize", tokens["token_ids"], tokens["lengths"])
    assert strings(back["texts"]) == vocabulary.decode(rows)


@needs_tensorflow
@pytest.mark.parametrize(
    ("kind", "output"), [("classifier", "probabilities"), ("translator", "texts"), ("language model", "texts")]
)
def test_the_empty_batch_and_the_empty_string(tokenizer, written, kind, output):
    import tensorflow as tf

    _, directory = written(kind, tokenizer)
    serve = loaded(directory).signatures["serving_default"]
    assert serve(tf.constant([], tf.string))[output].shape[0] == 0
    assert serve(tf.constant([""]))[output].shape[0] == 1
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        tf.compat.v1.saved_model.load(session, ["serve"], str(directory))
        session.graph.finalize()


@needs_tensorflow
def test_weights_are_stored_once(tokenizer, written):
    model, directory = written("classifier", tokenizer)
    bytes_of_weights = sum(int(np.prod(v.shape)) * 4 for v in model.variables)
    stored = sum(p.stat().st_size for p in (directory / "variables").iterdir())
    assert stored < 1.05 * bytes_of_weights + 20_000


@needs_tensorflow
@pytest.mark.parametrize("problem_type", ["multi", "regression"])
def test_other_problems(tokenizer, tmp_path, problem_type):
    model = classifier(tokenizer, problem_type)
    model.export(tmp_path / "model")
    answer = call(tmp_path / "model", "classify", TEXTS[:2])
    expected = np.asarray(model.probabilities(model.predict(TEXTS[:2], verbose=0)))
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-6)
    assert "labels" not in answer
    assert ("label_names" in answer) == (problem_type == "multi")


@needs_tensorflow
def test_a_large_text_is_cut_and_bounded(tokenizer, written):
    model, directory = written("classifier", tokenizer)
    large = ["a good film " * 90_000, "a" * 1_000_000, "好" * 400_000]
    found = call(directory, "classify", large)["probabilities"]
    with pytest.warns(UserWarning, match="3 of 3 texts are longer"):
        expected = np.asarray(model.probabilities(model.predict(large, verbose=0)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.isfinite(call(directory, "classify", [b"\xff\xfe broken"])["probabilities"]).all()


@needs_tensorflow
@pytest.mark.xla
@pytest.mark.parametrize("task", ["classify", "generate", "translate"])
def test_xla_compiles_the_model(tokenizer, make_backbone, tmp_path, task):
    texts = TEXTS[:2]
    if task == "classify":
        model = classifier(tokenizer)
    else:
        model = translator(tokenizer) if task == "translate" else language_model(tokenizer, make_backbone)
    model.export(tmp_path / "model", jit=True)
    assert any(f.attr["_XlaMustCompile"].b for f in graph(tmp_path / "model").library.function)
    if task == "classify":
        found = call(tmp_path / "model", task, texts)["probabilities"]
        np.testing.assert_allclose(found, model.probabilities(model.predict(texts, verbose=0)), atol=1e-5)
        return
    found = call(tmp_path / "model", task, texts, 9, 0.0, 0, 1.0, 0)["texts"]
    assert readable(strings(found)) == readable(model.generate(texts, 9))
    if task == "generate":
        scores = call(tmp_path / "model", "score", texts)
        for row, size, expected in zip(scores["log_probs"], scores["lengths"], model.score(texts), strict=True):
            np.testing.assert_allclose(row[: size - 1], expected["log_probs"], atol=1e-4)


@needs_tensorflow
def test_lengths_of_one_bucket_are_compiled_once(tokenizer, make_backbone, monkeypatch):
    import tensorflow as tf

    from keras_llama.export.graph_text import GraphText
    from keras_llama.generation import TokenLoop

    model, shapes, grow = language_model(tokenizer, make_backbone), [], TokenLoop.in_graph

    def watched(self, ids, mask, *rest):
        shapes.append((ids.shape.as_list(), mask.shape.as_list()))
        return grow(self, ids, mask, *rest)

    monkeypatch.setattr(TokenLoop, "in_graph", watched)
    generate = model.serving(GraphText(model.preprocessor, jit=True))["generate"].call
    for prompt, new in [("a", 2), ("a film", 5), ("a bad film", 8)]:
        generate(tf.constant([prompt]), *map(tf.constant, (new, 0.0, 0, 1.0, 0)))
    assert shapes == [([1, 8], [1, 16])] * 3


@needs_tensorflow
def test_a_vocabulary_that_needs_tensorflow_text_says_so(tmp_path):
    model = classifier(vocabularies.trained(TEXTS[:3] * 9, model_type="unigram", vocab_size=40))
    with pytest.warns(UserWarning, match="must import tensorflow_text"):
        model.export(tmp_path / "model")
    answer = delivery.serve(tmp_path / "model", TEXTS[:3])
    expected = model.probabilities(model.predict(TEXTS[:3], verbose=0))
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-6)


class LiteRT:
    """A file in LiteRT's interpreter, which takes new sizes when it is told."""

    def __init__(self, path):
        interpreter = pytest.importorskip("ai_edge_litert.interpreter")
        self.model = interpreter.Interpreter(str(path))

    def __call__(self, _, inputs):
        places = {place["name"]: place["index"] for place in self.model.get_input_details()}
        for name, array in inputs.items():
            self.model.resize_tensor_input(places[name], array.shape)
        self.model.allocate_tensors()
        for name, array in inputs.items():
            self.model.set_tensor(places[name], array)
        self.model.invoke()
        return [self.model.get_tensor(self.model.get_output_details()[0]["index"])]


def onnx_runs(path):
    """What ONNX Runtime and OpenVINO make of one file."""
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [onnxruntime.InferenceSession(path).run, lambda _, inputs: [compiled(inputs)[0]]]


OWN, OTHER = ("litert", "onnx") if ON_TENSORFLOW else ("onnx", "litert")  # the other one is handed over


@pytest.mark.skipif(keras.config.backend() == "jax", reason="as TensorFlow does")
@pytest.mark.parametrize(
    ("format", "task"), [(OWN, "classifier"), (OWN, "language model"), (OWN, "translator"), (OTHER, "classifier")]
)
def test_the_forward_pass_of_any_batch_and_length(tokenizer, make_backbone, tmp_path, task, format):
    if task == "classifier":
        model = classifier(tokenizer)
    else:
        model = translator(tokenizer) if task == "translator" else language_model(tokenizer, make_backbone)
    model.export(tmp_path / "model", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    runs = onnx_runs(tmp_path / "model") if format == "onnx" else [LiteRT(tmp_path / "model")]
    generator = np.random.default_rng(0)
    for rows in (1, 3):
        for length in (1, 7, 33):
            inputs = {name: np.ones((rows, length), "int32") for name in model.input}
            for name in inputs:
                if name.endswith("token_ids"):
                    inputs[name] = generator.integers(4, 200, (rows, length), "int32")
                elif length > 1:
                    inputs[name][-1, : length // 3] = 0
            expected = keras.ops.convert_to_numpy(model(inputs))
            real = np.ones(rows, bool) if task == "classifier" else inputs[list(model.input)[-1]] > 0
            for run in runs:
                np.testing.assert_allclose(run(None, inputs)[0][real], expected[real], atol=1e-4)


@pytest.mark.plain
def test_a_file_is_kept_when_the_new_one_cannot_be_written(tokenizer, tmp_path, monkeypatch):
    def full(_, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    runs_on = keras.config.backend()
    monkeypatch.setattr("keras_llama.export.forward.FORMATS", {"onnx": (runs_on, full), "litert": (runs_on, full)})
    (tmp_path / "model").write_text("kept")
    for format in ("onnx", "litert"):
        with pytest.raises(OSError, match="No space left"):
            classifier(tokenizer).export(tmp_path / "model", format=format, overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.plain
def test_formats_that_are_refused(tokenizer, tmp_path):
    model = classifier(tokenizer)
    (tmp_path / "mine.onnx").write_text("kept")
    for options, message in [
        ({"format": "openvino"}, "OpenVINO reads the file"),
        ({"format": "gguf"}, '"tf_saved_model", "onnx" or "litert"'),
        ({"format": "litert"}, "must not exist"),
        ({"format": "onnx", "jit": True}, "are of SavedModels"),
        ({"format": "onnx"}, "must not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.export(tmp_path / "mine.onnx", **options)
    assert (tmp_path / "mine.onnx").read_text() == "kept"


@needs_tensorflow
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_program_in_cpp(vocabulary, written, tmp_path):
    import tensorflow as tf

    model, directory = written("language model", vocabulary)
    libraries = pathlib.Path(tf.sysconfig.get_lib())
    program = pathlib.Path(__file__).with_name("consumer.cc")
    command = ["g++", "-std=c++17", program, "-o", tmp_path / "consumer", *tf.sysconfig.get_compile_flags()]
    command += [f"-L{libraries}", "-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2"]
    subprocess.run([*map(str, command), f"-Wl,-rpath,{libraries}"], check=True)
    arguments = [tmp_path / "consumer", directory, *tensor_names(directory, "texts"), *TEXTS[:3]]
    done = subprocess.run([*map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    texts = done.stdout.decode().split("\0")[:-1]
    assert readable(texts) == readable(model.generate(TEXTS[:3]))


def tensor_names(directory, output):
    """Operation of the only input of `serving_default`, operation and number of one of its outputs."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    saved = SavedModel.FromString((directory / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_default"]
    (source,) = signature.inputs.values()
    return [source.name.split(":")[0], *signature.outputs[output].name.split(":")]


@needs_tensorflow
def test_without_a_preprocessor_it_takes_ids(make_backbone, tmp_path):
    model = keras_llama.LlamaTextClassifier(make_backbone(), num_classes=2)
    with pytest.warns(UserWarning, match="takes token ids"):
        model.export(tmp_path / "model")
    ids, mask = np.array([[5, 8, 2]]), np.ones((1, 3))
    found = call(tmp_path / "model", "logits", ids, mask)["logits"]
    np.testing.assert_allclose(found, model.predict({"token_ids": ids, "padding_mask": mask}, verbose=0), atol=1e-6)
    with pytest.raises(ValueError, match="`jit` needs a preprocessor"):
        model.export(tmp_path / "other", jit=True)


@needs_tensorflow
def test_ids_go_in_beside_strings(tokenizer, written):
    model, directory = written("language model", tokenizer)
    ids, mask = np.array([[5, 8, 2]]), np.ones((1, 3))
    found = call(directory, "logits", ids, mask)["logits"]
    np.testing.assert_allclose(found, model.predict({"token_ids": ids, "padding_mask": mask}, verbose=0), atol=1e-5)


@needs_tensorflow
def test_the_layout_of_tensorflow_serving(tokenizer, tmp_path):
    classifier(tokenizer).export(tmp_path / "model", versioned=True)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["1"]
    assert call(tmp_path / "model" / "1", "classify", ["a"])["labels"][0] in (b"bad", b"good")


@pytest.mark.plain
def test_the_configuration_of_tensorflow_serving_can_be_read():
    text_format = pytest.importorskip("google.protobuf.text_format")
    config = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2")
    page = (pathlib.Path(__file__).parents[1] / "docs/serving.md").read_text()
    (block,) = re.findall(r"```text\n(model_config_list.*?)```", page, re.DOTALL)
    found = text_format.Parse(block, config.ModelServerConfig()).model_config_list.config
    assert [entry.base_path for entry in found] == ["/models/llama", "/models/sentiment"]


@needs_tensorflow
def test_a_former_folder_is_kept_unless_it_may_go(tokenizer, tmp_path, monkeypatch):
    import tensorflow as tf

    model = classifier(tokenizer)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="`filepath` must be a directory that is new or empty"):
        model.export(tmp_path / "model")

    def full(*_, **__):
        (tmp_path / ".model.unfinished").mkdir(exist_ok=True)
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tf.saved_model, "save", full)
        with pytest.raises(OSError, match=r"could not be written.*No space left"):
            model.export(tmp_path / "model", overwrite=True)
    rename = os.replace

    def locked(source, target):
        if str(source).endswith("unfinished"):
            raise PermissionError("locked")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", locked)
        with pytest.raises(PermissionError):
            model.export(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "mine.txt").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "model").rename(tmp_path / ".model.former")  # cut off between the renames
    with pytest.raises(ValueError, match="new or empty"):
        model.export(tmp_path / "model")
    assert (tmp_path / "model" / "mine.txt").read_text() == "kept"
    model.export(tmp_path / "model", overwrite=True)
    assert not (tmp_path / "model" / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.plain
@pytest.mark.skipif(ON_TENSORFLOW, reason="the other backends have TensorFlow write it")
def test_a_process_that_fails_is_told(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_llama.export.elsewhere._PROGRAM", "raise RuntimeError('no TensorFlow here')")
    with pytest.raises(RuntimeError, match="no TensorFlow here"):
        classifier(tokenizer).export(tmp_path / "model")
    refused = "raise ValueError('not this vocabulary')"
    monkeypatch.setattr("keras_llama.export.elsewhere._PROGRAM", refused)
    with pytest.raises(ValueError, match="not this vocabulary"):
        classifier(tokenizer).export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.plain
def test_serving_a_broken_model_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="could not be served"):
        delivery.serve(tmp_path, ["a"])
