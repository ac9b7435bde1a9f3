"""What is chosen by the machine."""

import argparse
import pathlib

import keras
import pytest

from keras_llama import backend
from keras_llama.backend import device
from tasks import common


@pytest.mark.parametrize(
    ("generation", "expected"), [(6, "float32"), (7, "mixed_float16"), (8, "mixed_bfloat16"), (9, "mixed_bfloat16")]
)
def test_the_precision_of_a_gpu_is_that_of_its_generation(monkeypatch, generation, expected):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "_gpu_generation", lambda: generation)
    assert backend.fastest_precision() == expected


@pytest.mark.parametrize("flag", ["avx2", "avx512_bf16", "amx_bf16"])
def test_the_precision_of_a_cpu_is_bfloat16_if_it_multiplies_that(monkeypatch, flag):
    monkeypatch.setattr(pathlib.Path, "exists", lambda _: True)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: f"flags : fpu {flag} sse2\n")
    half = flag != "avx2" and keras.config.backend() != "jax"
    assert backend.fastest_precision() == ("mixed_bfloat16" if half else "float32")


def test_a_recipe_says_on_what_and_how_it_trains(monkeypatch, capsys):
    monkeypatch.setattr(backend, "fastest_precision", lambda: "mixed_float16")
    compiled = "compiled" if backend.resolve_jit("auto") else "not compiled"
    for precision, preset, expected in (
        ("auto", None, "mixed_float16"),
        ("float32", "folder", "float32"),
        ("float32", "a.keras", "the precision of a.keras"),
    ):
        args = argparse.Namespace(precision=precision, jit="auto", preset=preset, asked=[])
        common.prepare_backend(args)
        assert args.precision == (None if preset == "a.keras" else expected)
        assert f": {expected}, training steps {compiled}\n" in capsys.readouterr().out
