"""The command line: what it prints, what it writes, and exit code 2 for bad input."""

import pytest
import reference
import torch
import transformers

import keras_llama
from keras_llama import cli
from tasks import delivery

pytestmark = pytest.mark.plain


@pytest.fixture
def preset(chat_lm, tmp_path):
    chat_lm.save_to_preset(tmp_path / "preset")
    return str(tmp_path / "preset")


def test_generate_prints_the_text_as_it_comes(chat_lm, preset, capsys):
    expected = chat_lm.generate(["a film", "what"], 6)
    cli.main(["generate", preset, "a film", "what", "--max-new-tokens", "6"])
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)
    cli.main(["generate", preset, "a film", "--max-new-tokens", "6", "--num-beams", "2"])
    assert capsys.readouterr().out == chat_lm.generate("a film", 6, num_beams=2) + "\n"
    options = ["--temperature", "2", "--top-k", "50", "--seed", "3", "--stop", "o"]
    cli.main(["generate", preset, "a film", "--max-new-tokens", "6", *options])
    expected = chat_lm.generate("a film", 6, temperature=2.0, top_k=50, seed=3, stop=["o"])
    assert capsys.readouterr().out == expected + "\n"


def test_chat_with_a_system_message(chat_lm, preset, capsys):
    messages = [{"role": "system", "content": "good"}, {"role": "user", "content": "what"}]
    cli.main(["generate", preset, "what", "--chat", "--system", "good", "--max-new-tokens", "6"])
    assert capsys.readouterr().out == chat_lm.chat(messages, 6) + "\n"


def test_convert_and_info(chat_lm, preset, tmp_path, capsys):
    cli.main(["convert", preset, str(tmp_path / "half"), "--dtype", "bfloat16"])
    assert "bfloat16" in capsys.readouterr().out
    cli.main(["convert", preset, str(tmp_path / "half.gguf"), "--format", "gguf", "--quantization", "q8_0"])
    for path in ("half", "half.gguf"):
        cli.main(["info", str(tmp_path / path)])
        printed = capsys.readouterr().out
        assert f"vocabulary_size: {chat_lm.backbone.config.vocabulary_size}" in printed
        assert "weights as bfloat16" in printed
    assert keras_llama.LlamaCausalLM.from_preset(tmp_path / "half").dtype_policy.name == "bfloat16"


@pytest.mark.slow
def test_export_writes_what_can_be_served(chat_lm, preset, tmp_path, capsys):
    cli.main(["export", preset, str(tmp_path / "served"), "--versioned"])
    assert "parameters" in capsys.readouterr().out
    assert delivery.serve(tmp_path / "served" / "1", ["a film"])["texts"] == [chat_lm.generate("a film")]


def test_verify_prints_a_line_for_each_block(chat_tokenizer, tmp_path, capsys):
    config = reference.hf_config(vocab_size=chat_tokenizer.vocabulary_size)
    reference.randomize(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path)
    for name, data in chat_tokenizer.files.items():
        (tmp_path / name).write_bytes(data)
    cli.main(["verify", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.rsplit(maxsplit=2)[0].strip() for line in lines] == ["embedding", "block 0", "block 1", "logits"]
    assert all(float(line.split()[-2]) < 1e-4 < float(line.split()[-1]) for line in lines)


def test_verify_finds_a_difference(chat_tokenizer, tmp_path, monkeypatch):
    config = reference.hf_config(vocab_size=chat_tokenizer.vocabulary_size)
    model = reference.randomize(transformers.LlamaForCausalLM(config))
    model.save_pretrained(tmp_path)
    for name, data in chat_tokenizer.files.items():
        (tmp_path / name).write_bytes(data)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    from keras_llama.verify import verify

    found = {place: difference for place, difference, _ in verify(tmp_path)}
    assert found["block 0"] < 1e-5 < 1e-2 < found["block 1"]
    assert found["logits"] > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "no_such_file", "a"], "there is no such file"),
        (["generate", "PRESET", ""], "must not be empty"),
        (["generate", "PRESET", "a", "--temperature", "-1"], "`temperature` must be"),
        (["generate", "PRESET", "a", "--max-new-tokens", "0"], "`max_new_tokens`"),
        (["convert", "PRESET", "PRESET"], "new or empty"),
        (["info", "EMPTY"], "config.json"),
    ],
)
def test_bad_input_ends_with_code_2(preset, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"PRESET": preset, "EMPTY": str(tmp_path / "empty")}
    with pytest.raises(SystemExit) as left:
        cli.main([places.get(argument, argument) for argument in arguments])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("keras-llama: ")
    assert message in error


def test_the_installed_command_runs(run_python, preset):
    told = run_python("import sys; from keras_llama.cli import main; main(sys.argv[1:])", "info", preset)
    assert told.startswith(preset)
