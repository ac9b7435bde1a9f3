"""Tokenizers of other formats as Hugging Face's files, and back: tiktoken, GGUF metadata, SentencePiece.

Every tokenizer here is the dict of its Hugging Face files; these functions build them where a source has none.
"""

import base64
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
_SPACE = "▁"  # U+2581 stands for a space in SentencePiece
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """One of the files, a JSON object; empty if it is not there.

    Raises:
        ValueError: if it is something else.
    """
    try:
        document = json.loads(files.get(name, b"{}"))
    except (ValueError, TypeError, RecursionError) as error:
        raise invalid(f"{name}: expected a JSON object.", str(error), size=len(files[name])) from error
    if not isinstance(document, dict):
        raise invalid(f"{name}: expected a JSON object.", found=type(document))
    return document


def settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What `tokenizer_config.json` says, and `special_tokens_map.json` where that is silent.

    >>> settings({"tokenizer_config.json": b'{"bos_token": {"content": "<s>", "special": true}}'})
    {'bos_token': '<s>'}
    """
    found = {**read_json(files, "special_tokens_map.json"), **read_json(files, SETTINGS)}
    for role in (role for role in found if role.endswith("_token")):
        if isinstance(found[role], dict):  # a token with its options
            found[role] = found[role].get("content")
    return found


def is_tiktoken(data: bytes) -> bool:
    """Whether a `tokenizer.model` is a tiktoken file, `base64 SPACE rank` a line, and no SentencePiece model."""
    return _TIKTOKEN_LINE.match(data) is not None


def from_tiktoken(data: bytes) -> dict[str, bytes]:
    """Llama 3's tiktoken file -> `tokenizer.json` and its settings.

    tiktoken merges the pair whose result has the lowest rank, whatever the pair: every split of a token
    into two tokens is a merge, in the order of the results.

    Raises:
        ValueError: for a line that is no `base64 rank`, ranks that are not 0, 1, 2, ..., or a byte without a token.

    >>> ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\\n" % i for i in range(256))
    >>> sorted(from_tiktoken(ranks))
    ['tokenizer.json', 'tokenizer_config.json']
    """
    tokens = []
    for number, line in enumerate(data.splitlines()):
        try:
            text, digits = line.split()
            token, rank = base64.b64decode(text, validate=True), int(digits)
        except ValueError as error:
            raise invalid(f"{MODEL}:{number + 1}: expected base64 SPACE rank.", line=line[:80]) from error
        if rank != number:
            raise invalid(f"{MODEL}:{number + 1}: expected the rank {number}.", line=line[:80])
        tokens.append(token)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise invalid(
            f"{MODEL}: expected distinct tokens, every single byte among them.",
            "The file may be cut short.",
            lines=len(tokens),
            distinct=len(ranks),
        )
    as_text = {byte: chr(code) for byte, code in _byte_characters().items()}
    names = ["".join(as_text[byte] for byte in token) for token in tokens]
    merges = [(names[ranks[left]], names[ranks[right]]) for left, right in _splits(tokens, ranks)]
    reserved = iter(range(256))
    control = [_LLAMA3_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    vocabulary = {name: i for i, name in enumerate(names)}
    added = {name: (len(names) + i, True) for i, name in enumerate(control)}
    roles = {"bos_token": control[0], "eos_token": control[1], "add_bos_token": True}
    return _byte_pair_files(vocabulary, merges, added, "llama-bpe", roles)


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
    roles: dict[str, Any],
) -> dict[str, bytes]:
    """The files of a byte-level tokenizer; `added` is text: (id, whether control)."""
    model = {
        "ignore_merges": words == "llama-bpe",  # some of Llama 3's tokens cannot be reached by merging
        "vocab": vocabulary,
        "merges": [list(pair) for pair in merges],
    }
    decoder = {**_BYTES, "add_prefix_space": True}
    return _json_files(model, added, roles, None, _PRE_TOKENIZERS[words], decoder)


def from_sentencepiece(model: bytes, roles: Mapping[str, Any]) -> dict[str, bytes]:
    """A SentencePiece model of byte pairs -> its file, and a `tokenizer.json` that gives the same ids.

    Transformers 5 reads a lone `tokenizer.model` in its own way, and drops a space that begins a text.

    Args:
        model: a `tokenizer.model` that leaves the text as it is, as LLaMA's does.
        roles: "bos_token" and its like, "add_bos_token", "add_eos_token", "chat_template".

    Raises:
        ValueError: for a model of another kind, such as unigram.
    """
    proto = parse_model(model)
    normalizer = proto.normalizer_spec
    if (
        proto.trainer_spec.model_type != proto.trainer_spec.BPE
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
    ):
        raise invalid(
            f"{MODEL}: expected byte pairs and an identity normalizer.",
            model_type=proto.trainer_spec.model_type,
            normalizer=normalizer.name,
        )
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    whole = (_CONTROL, _UNKNOWN, _USER)
    added = {p.piece: (i, p.type != _USER) for i, p in enumerate(proto.pieces) if p.type in whole}
    mergeable = sorted((p for p in proto.pieces if p.type in (_NORMAL, _UNUSED)), key=lambda p: -p.score)
    ranks = {piece.piece: rank for rank, piece in enumerate(mergeable)}
    document = {
        "unk_token": next((p.piece for p in proto.pieces if p.type == _UNKNOWN), None),
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "vocab": vocabulary,
        "merges": [list(pair) for pair in _splits(list(ranks), ranks)],
    }
    space: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer.add_dummy_prefix:
        space = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, space]}
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    decoder = {"type": "Sequence", "decoders": back}
    return {MODEL: model, **_json_files(document, added, roles, space, None, decoder)}


def _json_files(
    model: dict[str, Any],
    added: Mapping[str, tuple[int, bool]],
    roles: Mapping[str, Any],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> dict[str, bytes]:
    """`tokenizer.json` and the settings beside it."""
    options = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(text, token, control) for text, (token, control) in added.items()],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _template(roles, added),
        "decoder": decoder,
        "model": {**options, **model},
    }
    # A class that takes tokenizer.json as it is: "LlamaTokenizer" puts parts of its own in.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    return {JSON: _dump(document), SETTINGS: _dump(settings, indent=2)}


def _added(text: str, token: int, control: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": text, **flags, "special": control}


def _template(roles: Mapping[str, Any], added: Mapping[str, tuple[int, bool]]) -> dict[str, Any] | None:
    """The post-processor that begins and ends a text, as far as `roles` ask for it."""
    wanted = {role: str(roles.get(role)) for role in ("bos_token", "eos_token") if roles.get(f"add_{role}")}
    wanted = {role: text for role, text in wanted.items() if text in added}
    if not wanted:
        return None

    def frame(name: str, kind: int) -> list[dict[str, Any]]:
        piece: dict[str, Any] = {"Sequence": {"id": name, "type_id": kind}}
        ends = {role: [{"SpecialToken": {"id": text, "type_id": kind}}] for role, text in wanted.items()}
        return [*ends.get("bos_token", []), piece, *ends.get("eos_token", [])]

    return {
        "type": "TemplateProcessing",
        "single": frame("A", 0),
        "pair": frame("A", 0) + frame("B", 1),
        "special_tokens": {text: {"id": text, "ids": [added[text][0]], "tokens": [text]} for text in wanted.values()},
    }


def frame_ids(post_processor: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """Ids that the post-processor of a `tokenizer.json` puts before and after a text.

    It alone decides: Transformers 5 reads no "add_bos_token" of the settings beside a `tokenizer.json`.

    >>> frame_ids({"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]})
    ([0], [2])
    """
    before: list[int] = []
    after: list[int] = []
    for part in (post_processor or {}).get("processors", [post_processor or {}]):
        if part.get("type") in ("RobertaProcessing", "BertProcessing"):
            before, after = [part["cls"][1], *before], [*after, part["sep"][1]]
        elif part.get("type") == "TemplateProcessing":
            names = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in part["single"]]
            text = names.index(None)
            ids = {name: part["special_tokens"][name]["ids"] for name in names if name is not None}
            before = [i for name in names[:text] for i in ids[name]] + before
            after += [i for name in names[text + 1 :] for i in ids[name]]
    return before, after


def _dump(document: Any, indent: int | None = None) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=indent) + "\n").encode()


def from_gguf(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The `tokenizer.*` fields of a GGUF file -> Hugging Face's files.

    Raises:
        ValueError: for another kind of tokenizer than "llama" (SentencePiece) and "gpt2" (byte-level pairs),
            another `pre` than "llama-bpe", "smollm" and "gpt-2", or fields that do not fit together.

    >>> fields = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    >>> sorted(from_gguf({f"tokenizer.ggml.{name}": value for name, value in fields.items()}))
    ['tokenizer.json', 'tokenizer_config.json']
    """
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise invalid("Expected the GGUF field tokenizer.ggml.tokens, a list of strings.", type=type(tokens))
    kinds = fields.get("token_type") or [_NORMAL] * len(tokens)
    scores = fields.get("scores") or [-float(i) for i in range(len(tokens))]
    for name, column in (("token_type", kinds), ("scores", scores)):
        if not isinstance(column, list) or len(column) != len(tokens):
            raise invalid(f"Expected as many tokenizer.ggml.{name} as tokens, {len(tokens)}.", type=type(column))
    roles: dict[str, Any] = {}
    for role, name in _ROLES.items():
        token = fields.get(f"{name}_token_id")
        if token is not None:
            if not isinstance(token, int) or not 0 <= token < len(tokens):
                raise invalid(f"Expected tokenizer.ggml.{name}_token_id inside the vocabulary.", id=token)
            roles[role] = tokens[token]
    if "tokenizer.chat_template" in metadata:
        roles["chat_template"] = metadata["tokenizer.chat_template"]
    if fields.get("model") == "llama":
        model = _sentencepiece_model(tokens, scores, kinds, roles, fields.get("add_space_prefix", True))
        roles["add_bos_token"] = fields.get("add_bos_token", True)
        roles["add_eos_token"] = fields.get("add_eos_token", False)
        return from_sentencepiece(model, roles)
    words = fields.get("pre", "gpt-2")
    if fields.get("model") != "gpt2" or words not in _PRE_TOKENIZERS:
        raise invalid(
            f'Expected a GGUF tokenizer "llama", or "gpt2" with `pre` of {sorted(_PRE_TOKENIZERS)}.',
            "Other ways to cut text into words would give other ids.",
            model=fields.get("model"),
            pre=fields.get("pre"),
        )
    roles["add_bos_token"] = fields.get("add_bos_token", words == "llama-bpe")  # llama.cpp's defaults
    roles["add_eos_token"] = fields.get("add_eos_token", False)
    named = enumerate(zip(tokens, kinds, strict=True))
    added = {token: (i, kind == _CONTROL) for i, (token, kind) in named if kind in (_CONTROL, _USER)}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("merges", [])]
    for i, pair in enumerate(merges):
        if "".join(pair) not in vocabulary or not all(part in vocabulary for part in pair) or len(pair) != 2:
            raise invalid("Expected tokenizer.ggml.merges to pair two tokens into a third.", index=i, merge=pair)
    return _byte_pair_files(vocabulary, merges, added, words, roles)


def parse_model(model: bytes) -> Any:
    """A SentencePiece model as its protocol buffer.

    Raises:
        ValueError: if it is none.
    """
    from google.protobuf.message import DecodeError

    proto = _new_model()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise invalid(f"{MODEL}: expected a SentencePiece model.", str(error), size=len(model)) from error
    return proto


def _new_model() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    classes: Any = sentencepiece_model_pb2  # made when it is imported
    return classes.ModelProto()


def _sentencepiece_model(tokens, scores, kinds, roles, add_space_prefix) -> bytes:
    """A SentencePiece model of byte pairs with these tokens."""
    model = _new_model()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in kinds
    for role, name in {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "pad"}.items():
        present = role in roles
        setattr(trainer, f"{name}_id", tokens.index(roles[role]) if present else -1)
        if present:
            setattr(trainer, f"{name}_piece", roles[role])
    if "unk_token" not in roles and _UNKNOWN in kinds:
        trainer.unk_id = kinds.index(_UNKNOWN)
        trainer.unk_piece = tokens[trainer.unk_id]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = add_space_prefix
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def to_gguf(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Hugging Face's files -> the `tokenizer.*` fields of a GGUF file.

    Raises:
        ValueError: for a tokenizer that GGUF has no name for.

    >>> fields = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    >>> to_gguf(from_gguf({f"tokenizer.ggml.{name}": value for name, value in fields.items()}))["tokenizer.ggml.pre"]
    'gpt-2'
    """
    roles = settings(files)
    if MODEL in files and not is_tiktoken(files[MODEL]):
        fields = _sentencepiece_fields(files[MODEL], roles)
    elif JSON in files:
        document = read_json(files, JSON)
        try:
            fields = _json_fields(document)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise invalid(f"{JSON}: expected a tokenizer.", repr(error), keys=sorted(document)) from error
    else:
        raise invalid(f"Expected {MODEL} or {JSON} among the tokenizer's files.", files=sorted(files))
    for role, name in _ROLES.items():
        if roles.get(role) in fields["tokens"]:
            fields[f"{name}_token_id"] = fields["tokens"].index(roles[role])
    found = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    template = chat_template(files)
    return found if template is None else {**found, "tokenizer.chat_template": template}


def chat_template(files: Mapping[str, bytes]) -> str | None:
    """The Jinja template of `chat_template.jinja` or of `tokenizer_config.json`, `None` if there is none.

    >>> chat_template({"tokenizer_config.json": b'{"chat_template": [{"name": "default", "template": "Hi"}]}'})
    'Hi'

    Raises:
        ValueError: for a template that is no text.
    """
    name = "chat_template.jinja"
    if name in files:
        try:
            return files[name].decode()
        except UnicodeDecodeError as error:
            raise invalid(f"{name}: expected UTF-8.", str(error), size=len(files[name])) from error
    template = settings(files).get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise invalid(f"{SETTINGS}: expected a chat template that is a string.", chat_template=template)
    return template


def _sentencepiece_fields(model: bytes, roles: Mapping[str, Any]) -> dict[str, Any]:
    proto = parse_model(model)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise invalid("GGUF's llama.cpp takes SentencePiece models of byte pairs.", model_type="unigram or other")
    tokens, scores, kinds = ([getattr(p, name) for p in proto.pieces] for name in ("piece", "score", "type"))
    more = {int(i): added for i, added in roles.get("added_tokens_decoder", {}).items() if int(i) >= len(tokens)}
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
        "add_bos_token": roles.get("add_bos_token", True) is True,
        "add_eos_token": roles.get("add_eos_token", False) is True,
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
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    before, after = frame_ids(document.get("post_processor"))
    adds = {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    if model.get("byte_fallback"):
        return {**_fallback_fields(document, tokens, kinds, merges), **adds}
    words = [name for name, found in _PRE_TOKENIZERS.items() if _same(found, document.get("pre_tokenizer"))]
    if not words or document.get("normalizer"):
        raise invalid(
            f"GGUF has names for the pre-tokenizers {sorted(_PRE_TOKENIZERS)} only, without a normalizer.",
            "llama.cpp would cut the text into other words.",
            pre_tokenizer=document.get("pre_tokenizer"),
            normalizer=document.get("normalizer"),
        )
    return {
        "model": "gpt2",
        "pre": words[0],
        "tokens": tokens,
        "token_type": kinds,
        "merges": [" ".join(merge) for merge in merges],
        "add_space_prefix": False,
        **adds,
    }


def _same(expected: Any, found: Any) -> bool:
    """Whether two pre-tokenizers cut alike: options that move no word are left out."""
    if isinstance(expected, dict) and isinstance(found, dict):
        idle = {"trim_offsets", "add_prefix_space"} if found.get("add_prefix_space") is not True else {"trim_offsets"}
        keys = (set(expected) | set(found)) - idle
        return all(_same(expected.get(key), found.get(key)) for key in keys)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(_same, expected, found))
    return expected == found


def _fallback_fields(document, tokens, kinds, merges) -> dict[str, Any]:
    """A SentencePiece vocabulary that lives in a `tokenizer.json`: the order of the merges becomes scores."""
    model = document["model"]
    for i, text in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kinds[i] = _BYTE
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        kinds[unknown] = _UNKNOWN
    ids = {text: i for i, text in enumerate(tokens) if kinds[i] == _NORMAL}
    merges = [pair for pair in merges if "".join(pair) in ids]
    order = {text: rank for rank, text in enumerate(dict.fromkeys(map("".join, merges)))}
    ranks = [order["".join(pair)] for pair in merges]
    if ranks != sorted(ranks) or set(merges) != set(_splits(list(ids), ids)):
        raise invalid(
            "GGUF takes every way to make a token of two, those of one token side by side.",
            f"Keep {MODEL} beside {JSON}.",
            merges=len(merges),
        )
    last = len(order)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [-float(order.get(text, last)) if text in ids else 0.0 for text in tokens],
        "token_type": kinds,
        "add_space_prefix": _space_prefix(document),
    }


def _space_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space that is not its own, in the two ways that files write it."""
    normalizer, words = document.get("normalizer") or {}, document.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    if kinds in (["Prepend", "Replace"], ["Replace"]) and not words and steps[-1]["content"] == _SPACE:
        return "Prepend" in kinds
    if not kinds and words.get("type") == "Metaspace" and not words.get("split"):
        return words.get("prepend_scheme") != "never"
    raise invalid(
        f"GGUF takes a {JSON} that only turns spaces into {_SPACE}.", normalizer=normalizer, pre_tokenizer=words
    )
