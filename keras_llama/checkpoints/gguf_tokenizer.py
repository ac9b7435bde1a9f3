"""The tokenizer of a GGUF file, its `tokenizer.*` fields, as Hugging Face's files, and back."""

import re
from collections.abc import Mapping
from typing import Any

from keras_llama.config import invalid
from keras_llama.tokenizer_files import (
    BYTE,
    CONTROL,
    JSON,
    MODEL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER,
    byte_pair_files,
    chat_template,
    frame_ids,
    from_sentencepiece,
    is_tiktoken,
    new_model,
    parse_model,
    read_json,
    settings,
    splits,
)

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


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
    kinds = fields.get("token_type") or [NORMAL] * len(tokens)
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
    if fields.get("model") != "gpt2" or words not in PRE_TOKENIZERS:
        raise invalid(
            f'Expected a GGUF tokenizer "llama", or "gpt2" with `pre` of {sorted(PRE_TOKENIZERS)}.',
            "Other ways to cut text into words would give other ids.",
            model=fields.get("model"),
            pre=fields.get("pre"),
        )
    roles["add_bos_token"] = fields.get("add_bos_token", words == "llama-bpe")  # llama.cpp's defaults
    roles["add_eos_token"] = fields.get("add_eos_token", False)
    named = enumerate(zip(tokens, kinds, strict=True))
    added = {token: (i, kind == CONTROL) for i, (token, kind) in named if kind in (CONTROL, USER)}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("merges", [])]
    for i, pair in enumerate(merges):
        if "".join(pair) not in vocabulary or not all(part in vocabulary for part in pair) or len(pair) != 2:
            raise invalid("Expected tokenizer.ggml.merges to pair two tokens into a third.", index=i, merge=pair)
    return byte_pair_files(vocabulary, merges, added, words, roles)


def _sentencepiece_model(tokens, scores, kinds, roles, add_space_prefix) -> bytes:
    """A SentencePiece model of byte pairs with these tokens."""
    model = new_model()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in kinds
    for role, name in {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "pad"}.items():
        present = role in roles
        setattr(trainer, f"{name}_id", tokens.index(roles[role]) if present else -1)
        if present:
            setattr(trainer, f"{name}_piece", roles[role])
    if "unk_token" not in roles and UNKNOWN in kinds:
        trainer.unk_id = kinds.index(UNKNOWN)
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
        kinds.append(CONTROL if added.get("special") else USER if i in more else UNUSED)
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
    kinds = [UNUSED] * size
    for text, token in vocabulary.items():
        tokens[token], kinds[token] = text, NORMAL
    for added in document["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    before, after = frame_ids(document.get("post_processor"))
    adds = {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    if model.get("byte_fallback"):
        return {**_fallback_fields(document, tokens, kinds, merges), **adds}
    words = [name for name, found in PRE_TOKENIZERS.items() if _same(found, document.get("pre_tokenizer"))]
    if not words or document.get("normalizer"):
        raise invalid(
            f"GGUF has names for the pre-tokenizers {sorted(PRE_TOKENIZERS)} only, without a normalizer.",
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
            kinds[i] = BYTE
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    ids = {text: i for i, text in enumerate(tokens) if kinds[i] == NORMAL}
    merges = [pair for pair in merges if "".join(pair) in ids]
    order = {text: rank for rank, text in enumerate(dict.fromkeys(map("".join, merges)))}
    ranks = [order["".join(pair)] for pair in merges]
    if ranks != sorted(ranks) or set(merges) != set(splits(list(ids), ids)):
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
    if kinds in (["Prepend", "Replace"], ["Replace"]) and not words and steps[-1]["content"] == SPACE:
        return "Prepend" in kinds
    if not kinds and words.get("type") == "Metaspace" and not words.get("split"):
        return words.get("prepend_scheme") != "never"
    raise invalid(
        f"GGUF takes a {JSON} that only turns spaces into {SPACE}.", normalizer=normalizer, pre_tokenizer=words
    )
