"""What holds for the package as a whole: imports, layers of files, names, and the examples in docstrings."""

import ast
import doctest
import importlib
import os
import pathlib
import re

import keras
import numpy as np
import pytest

import keras_llama

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "keras_llama"
# A file imports only files above it here.
ORDER = [
    "config",
    "beside",
    "backend.device",
    "backend.arrays",
    "backend.compiled",
    "backend.listed",
    "backend.gradients",
    "backend.kernels",
    "backend.packing",
    "backend.streams",
    "backend.updates",
    "rope",
    "attention",
    "cache",
    "lora",
    "projections",
    "alike",
    "layers",
    "embedding",
    "ngrams",
    "backbone",
    "image_encoders",
    "images",
    "seq2seq_backbone",
    "losses",
    "accumulation",
    "samplers",
    "beams",
    "generation",
    "tokenizer_files",
    "chat",
    "tokenizer",
    "subword",
    "spelled",
    "opening",
    "scores",
    "batches",
    "preprocessing",
    "dialogue",
    "questions",
    "overlap",
    "resume",
    "checkpoints.checkpoint",
    "checkpoints.mapping",
    "checkpoints.hf",
    "checkpoints.peft",
    "checkpoints.gguf_tokenizer",
    "checkpoints.gguf",
    "checkpoints.llama2c",
    "checkpoints.kerashub",
    "checkpoints.loader",
    "checkpoints.presets",
    "export.words",
    "export.tables",
    "export.graph_tokenizer",
    "export.graph_sentencepiece",
    "export.graph_text",
    "export.graph_spans",
    "export.graph_images",
    "export.graph_loop",
    "export.elsewhere",
    "export.saved_model",
    "export.forward",
    "quantized",
    "adapters",
    "heads.inputs",
    "heads.files",
    "heads.task",
    "heads.head_task",
    "heads.plan",
    "heads.completion",
    "heads.language_model",
    "heads.conditioned",
    "heads.causal_lm",
    "heads.seq2seq_lm",
    "heads.image_captioner",
    "heads.text_classifier",
    "heads.ensemble",
    "heads.question_answering",
    "factory",
    "activations",
    "memory",
    "verify",
    "cli",
]
BACKEND, EXPORT = "keras_llama.backend.", "keras_llama.export."
# Where a package may be imported, inside functions; `export` may import any.
PLACES = {
    **dict.fromkeys(("tensorflow", "jax"), (BACKEND,)),
    "torch": (BACKEND, "keras_llama.verify"),
    "transformers": ("keras_llama.verify",),
    **dict.fromkeys(("keras_hub", "keras_nlp"), ("keras_llama.checkpoints.kerashub",)),
    "tensorflow_text": (),
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """(module, whether at the top of the file) of every import in a source file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, node in tree.body


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="TensorFlow is the backend itself")
def test_import_build_and_fit_load_no_tensorflow_and_no_keras_hub(run_python):
    code = """
import sys, numpy as np, keras_llama
def loaded(): return [m for m in ("tensorflow", "keras_hub", "keras_nlp", "tensorflow_text") if m in sys.modules]
assert not loaded(), loaded()
lm = keras_llama.LlamaCausalLM(keras_llama.LlamaBackbone(vocabulary_size=9, **keras_llama.size("tiny")))
lm.compile()
lm.fit(np.ones((2, 4), int), verbose=0)
assert not loaded(), loaded()
print("clean")
"""
    assert run_python(code).strip() == "clean"


@pytest.mark.plain
def test_the_order_names_every_file():
    files = {module_name(p).removeprefix("keras_llama.") for p in SOURCES if p.name != "__init__.py"}
    assert files == set(ORDER)


@pytest.mark.plain
@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_files_above_it(name):
    path = PACKAGE / (name.replace(".", "/") + ".py")
    below = ORDER[ORDER.index(name) :]
    found = {m.removeprefix("keras_llama.") for m, _ in imports(path)} & set(below)
    # `from_preset` of a backbone hands over inside a function.
    assert found <= ({"checkpoints.loader", "checkpoints.presets"} if name.endswith("backbone") else set())


@pytest.mark.plain
@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_backends_are_imported_in_their_place(path):
    name = module_name(path)
    for module, top in imports(path):
        package = module.split(".")[0]
        assert not module.startswith(("keras.src", "keras_hub.src"))
        if package in PLACES:
            assert not top
            assert name.startswith((*PLACES[package], EXPORT))


@pytest.mark.plain
def test_no_backend_question_outside_the_backend_folder():
    for path in SOURCES:
        if path.parent.name != "backend":
            assert not re.search(r"config\.backend\(\)|keras\.backend\.backend\(\)", path.read_text()), path


@pytest.mark.plain
def test_public_names():
    assert sorted(keras_llama.__all__) == keras_llama.__all__
    for name in keras_llama.__all__:
        assert getattr(keras_llama, name).__doc__


@pytest.mark.plain
def test_registered_under_the_package_name():
    for name in (
        "LlamaBackbone",
        "LlamaSeq2SeqBackbone",
        "LlamaSeq2SeqLM",
        "LlamaCausalLM",
        "LlamaTextClassifier",
        "LlamaQuestionAnswering",
        "LlamaBlock",
        "TextPreprocessor",
    ):
        assert keras.saving.get_registered_name(getattr(keras_llama, name)) == f"keras_llama>{name}"


@pytest.mark.plain
@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_examples_in_docstrings(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(module_name(path))
    names = {**vars(module), "keras": keras, "keras_llama": keras_llama, "np": np, "os": os}
    found = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    assert not found.failed


@pytest.mark.plain
def test_every_public_class_and_function_has_an_example():
    for name in keras_llama.__all__:
        assert ">>>" in getattr(keras_llama, name).__doc__, name
