"""Tokenizers as Hugging Face's files: what they say, and tiktoken and SentencePiece models turned into them.

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
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
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
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens, in SentencePiece and GGUF
SPACE = "▁"  # U+2581 stands for a space in SentencePiece
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
    as_text = {byte: chr(code) for byte, code in byte_characters().items()}
    names = ["".join(as_text[byte] for byte in token) for token in tokens]
    merges = [(names[ranks[left]], names[ranks[right]]) for left, right in splits(tokens, ranks)]
    reserved = iter(range(256))
    control = [_LLAMA3_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    vocabulary = {name: i for i, name in enumerate(names)}
    added = {name: (len(names) + i, True) for i, name in enumerate(control)}
    roles = {"bos_token": control[0], "eos_token": control[1], "add_bos_token": True}
    return byte_pair_files(vocabulary, merges, added, "llama-bpe", roles)


def splits(tokens: list[Any], ranks: Mapping[Any, int]) -> Iterable[tuple[Any, Any]]:
    """Every split of a token into two tokens, in the order of the tokens, then of the parts' ranks."""
    for token in tokens:
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        found = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        yield from sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def byte_characters() -> dict[int, int]:
    """The printable character that stands for each byte in byte-level vocabularies, since GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}


def byte_pair_files(
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
    return _json_files(model, added, roles, None, PRE_TOKENIZERS[words], decoder)


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
    whole = (CONTROL, UNKNOWN, USER)
    added = {p.piece: (i, p.type != USER) for i, p in enumerate(proto.pieces) if p.type in whole}
    mergeable = sorted((p for p in proto.pieces if p.type in (NORMAL, UNUSED)), key=lambda p: -p.score)
    ranks = {piece.piece: rank for rank, piece in enumerate(mergeable)}
    document = {
        "unk_token": next((p.piece for p in proto.pieces if p.type == UNKNOWN), None),
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "vocab": vocabulary,
        "merges": [list(pair) for pair in splits(list(ranks), ranks)],
    }
    space: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer.add_dummy_prefix:
        space = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, space]}
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
    return {JSON: dump(document), SETTINGS: dump(settings, indent=2)}


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


def dump(document: Any, indent: int | None = None) -> bytes:
    """A document as a JSON file holds it."""
    return (json.dumps(document, ensure_ascii=False, indent=indent) + "\n").encode()


def parse_model(model: bytes) -> Any:
    """A SentencePiece model as its protocol buffer.

    Raises:
        ValueError: if it is none.
    """
    from google.protobuf.message import DecodeError

    proto = new_model()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise invalid(f"{MODEL}: expected a SentencePiece model.", str(error), size=len(model)) from error
    return proto


def new_model() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    classes: Any = sentencepiece_model_pb2  # made when it is imported
    return classes.ModelProto()


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
