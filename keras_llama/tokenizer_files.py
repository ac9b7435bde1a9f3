"""Tokenizers of other formats as Hugging Face's files, and back: tiktoken, GGUF metadata, SentencePiece.

Every tokenizer here is the dict of its Hugging Face files; these functions build them where a source has none.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from keras_llama.config import invalid

JSON, MODEL, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"

# How text is cut into words before pairs are merged, by the names that GGUF gives these ways.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]},
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_WORDS}, "behavior": "Isolated", "invert": False},
            {**_BYTES, "use_regex": False},
        ],
    },
}
# Control tokens that follow the 128,000 ranks of Llama 3's file, by their names since Llama 3.1.
_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens, in SentencePiece and GGUF
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def is_tiktoken(data: bytes) -> bool:
    """Whether a `tokenizer.model` is a tiktoken file, `base64 SPACE rank` a line, and no SentencePiece model."""
    return _TIKTOKEN_LINE.match(data) is not None


def from_tiktoken(data: bytes) -> dict[str, bytes]:
    """Llama 3's tiktoken file -> `tokenizer.json` and its settings.

    tiktoken merges the pair whose result has the lowest rank, whatever the pair: every split of a token
    into two tokens is a merge, in the order of the results.

    Raises:
        ValueError: for a line that is no `base64 rank`, or ranks that are not 0, 1, 2, ...
    """
    tokens = []
    for number, line in enumerate(data.splitlines()):
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error) as error:
            raise invalid(f"{MODEL}:{number + 1}: expected base64 SPACE rank.", line=line[:80]) from error
        if int(rank) != number:
            raise invalid(f"{MODEL}:{number + 1}: expected the rank {number}.", line=line[:80])
        tokens.append(token)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    as_text = {byte: chr(code) for byte, code in _byte_characters().items()}
    names = ["".join(as_text[byte] for byte in token) for token in tokens]
    merges = [(names[ranks[left]], names[ranks[right]]) for left, right in _splits(tokens, ranks)]
    reserved = iter(range(256))
    control = [_LLAMA3_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    vocabulary = {name: i for i, name in enumerate(names)}
    added = {name: (len(names) + i, True) for i, name in enumerate(control)}
    settings = {"bos_token": control[0], "eos_token": control[1], "add_bos_token": True}
    return _byte_pair_files(vocabulary, merges, added, "llama-bpe", settings)


def _splits(tokens: list[Any], ranks: Mapping[Any, int]) -> Iterable[tuple[Any, Any]]:
    """Every split of a token into two tokens, in the order of the tokens, then of the parts' ranks."""
    for token in tokens:
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        found = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        yield from sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _byte_characters() -> dict[int, int]:
    """The printable character that stands for each byte in byte-level vocabularies, since GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}


def _byte_pair_files(
    vocabulary: dict[str, int],
    merges: Iterable[tuple[str, str]],
    added: dict[str, tuple[int, bool]],
    words: str,
    settings: dict[str, Any],
) -> dict[str, bytes]:
    """`tokenizer.json` of a byte-level tokenizer, and its settings; `added` is text: (id, whether control)."""
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(text, token, control) for text, (token, control) in added.items()],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[words],
        "post_processor": _template(settings, added),
        "decoder": {**_BYTES, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": words == "llama-bpe",  # some of Llama 3's tokens cannot be reached by merging
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    return {JSON: _dump(document), SETTINGS: _dump(settings)}


def _added(text: str, token: int, control: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": text, **flags, "special": control}


def _template(settings: Mapping[str, Any], added: Mapping[str, tuple[int, bool]]) -> dict[str, Any] | None:
    """The post-processor that adds the begin of text, if the settings ask for it."""
    bos = settings.get("bos_token", "")
    if not settings.get("add_bos_token") or bos not in added:
        return None
    first: dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], {"SpecialToken": {"id": bos, "type_id": 1}}, texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [added[bos][0]], "tokens": [bos]}},
    }


def _dump(document: Any) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()


# Of a vocabulary that `SentencePieceTokenizer.train` learned.
LLAMA_SETTINGS = _dump(
    {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
    }
)


def from_gguf(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The `tokenizer.ggml.*` fields of a GGUF file -> Hugging Face's files.

    Raises:
        ValueError: for another kind of tokenizer than "llama" (SentencePiece) and "gpt2" (byte-level pairs) or
            another `pre` than "llama-bpe", "smollm" and "gpt-2".
    """
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    tokens, kinds = fields.get("tokens"), fields.get("token_type")
    if not isinstance(tokens, list):
        raise invalid("Expected the GGUF field tokenizer.ggml.tokens.", tokens=tokens)
    kinds = list(kinds) if kinds else [_NORMAL] * len(tokens)
    settings: dict[str, Any] = {}
    for role, name in _ROLES.items():
        token = fields.get(f"{name}_token_id")
        if token is not None:
            if not 0 <= token < len(tokens):
                raise invalid(f"Expected tokenizer.ggml.{name}_token_id inside the vocabulary.", id=token)
            settings[role] = tokens[token]
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    if fields.get("model") == "llama":
        settings |= {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": fields.get("add_bos_token", True),
            "add_eos_token": fields.get("add_eos_token", False),
            "legacy": True,  # what SentencePiece and llama.cpp do after a control token
            "clean_up_tokenization_spaces": False,
        }
        model = _sentencepiece_model(
            tokens, fields.get("scores"), kinds, settings, fields.get("add_space_prefix", True)
        )
        return {MODEL: model, SETTINGS: _dump(settings)}
    words = fields.get("pre", "gpt-2")
    if fields.get("model") != "gpt2" or words not in _PRE_TOKENIZERS:
        raise invalid(
            f'Expected a GGUF tokenizer "llama", or "gpt2" with `pre` of {sorted(_PRE_TOKENIZERS)}.',
            "Other ways to cut text into words would give other ids.",
            model=fields.get("model"),
            pre=fields.get("pre"),
        )
    settings["add_bos_token"] = fields.get("add_bos_token", words == "llama-bpe")
    added = {
        token: (i, kind == _CONTROL)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER)
    }
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("merges", [])]
    return _byte_pair_files(vocabulary, merges, added, words, settings)


def _new_model() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    classes: Any = sentencepiece_model_pb2  # made when it is imported
    return classes.ModelProto()


def _sentencepiece_model(tokens, scores, kinds, settings, add_space_prefix) -> bytes:
    """A SentencePiece model of byte pairs with these tokens."""
    model = _new_model()
    scores = scores or [-float(i) for i in range(len(tokens))]
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in kinds
    for role, name in {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "pad"}.items():
        present = role in settings
        setattr(trainer, f"{name}_id", tokens.index(settings[role]) if present else -1)
        if present:
            setattr(trainer, f"{name}_piece", settings[role])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = add_space_prefix
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def to_gguf(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Hugging Face's files -> the `tokenizer.*` fields of a GGUF file.

    Raises:
        ValueError: for a tokenizer that GGUF has no name for.
    """
    settings = json.loads(files.get(SETTINGS, b"{}"))
    if MODEL in files and not is_tiktoken(files[MODEL]):
        fields = _sentencepiece_fields(files[MODEL], settings)
    elif JSON in files:
        fields = _json_fields(json.loads(files[JSON]))
    else:
        raise invalid(f"Expected {MODEL} or {JSON} among the tokenizer's files.", files=sorted(files))
    tokens = fields["tokens"]
    for role, name in _ROLES.items():
        text = settings.get(role)
        text = text["content"] if isinstance(text, dict) else text
        if text in tokens:
            fields.setdefault(f"{name}_token_id", tokens.index(text))
    for flag in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(flag), bool):
            fields[flag] = settings[flag]
    found = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    template = (
        files["chat_template.jinja"].decode() if "chat_template.jinja" in files else settings.get("chat_template")
    )
    return {**found, "tokenizer.chat_template": template} if isinstance(template, str) else found


def _sentencepiece_fields(model: bytes, settings: Mapping[str, Any]) -> dict[str, Any]:
    proto = _new_model()
    proto.ParseFromString(model)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise invalid("GGUF's llama.cpp takes SentencePiece models of byte pairs.", model_type="unigram or other")
    tokens, scores, kinds = ([getattr(p, name) for p in proto.pieces] for name in ("piece", "score", "type"))
    more = {int(i): added for i, added in settings.get("added_tokens_decoder", {}).items() if int(i) >= len(tokens)}
    for i in range(len(tokens), max(more, default=-1) + 1):
        added = more.get(i, {"content": f"[PAD{i}]"})
        tokens.append(added["content"])
        scores.append(-1000.0)
        kinds.append(_CONTROL if added.get("special") else _USER if i in more else _UNUSED)
    ids = {name: getattr(proto.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        **{f"{names[name]}_token_id": token for name, token in ids.items() if token >= 0},
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "add_bos_token": True,
        "add_eos_token": False,
    }


def _json_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    model = document["model"]
    if model.get("type") != "BPE":
        raise invalid("GGUF takes byte-pair tokenizers.", type=model.get("type"))
    vocabulary = {**model["vocab"], **{added["content"]: added["id"] for added in document["added_tokens"]}}
    size = max(vocabulary.values()) + 1
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [_UNUSED] * size
    for text, token in vocabulary.items():
        tokens[token], kinds[token] = text, _NORMAL
    for added in document["added_tokens"]:
        kinds[added["id"]] = _CONTROL if added["special"] else _USER
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        return _fallback_fields(model, tokens, kinds, merges)
    words = [name for name, found in _PRE_TOKENIZERS.items() if _same(found, document.get("pre_tokenizer"))]
    if not words:
        raise invalid(
            f"GGUF has names for the pre-tokenizers {sorted(_PRE_TOKENIZERS)} only.",
            "llama.cpp would cut the text into other words.",
            pre_tokenizer=document.get("pre_tokenizer"),
        )
    fields = {"model": "gpt2", "pre": words[0], "tokens": tokens, "token_type": kinds}
    return {**fields, "merges": [" ".join(merge) for merge in merges]}


def _same(expected: Any, found: Any) -> bool:
    """Whether two pre-tokenizers cut alike: options that move no word are left out."""
    if isinstance(expected, dict) and isinstance(found, dict):
        idle = {"trim_offsets", "add_prefix_space"} if found.get("add_prefix_space") is not True else {"trim_offsets"}
        keys = (set(expected) | set(found)) - idle
        return all(_same(expected.get(key), found.get(key)) for key in keys)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(_same, expected, found))
    return expected == found


def _fallback_fields(model, tokens, kinds, merges) -> dict[str, Any]:
    """A SentencePiece vocabulary that lives in a `tokenizer.json`: merges in the order of the ids become scores."""
    ranks = [model["vocab"]["".join(merge)] for merge in merges]
    if ranks != sorted(ranks):
        raise invalid("GGUF needs the merges in the order of their results' ids.", f"Keep {MODEL} beside {JSON}.")
    for i, text in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kinds[i] = _BYTE
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        kinds[unknown] = _UNKNOWN
    fields = {"model": "llama", "pre": "default", "tokens": tokens, "scores": [-float(i) for i in range(len(tokens))]}
    return {**fields, "token_type": kinds, "add_space_prefix": True}
