"""Tokenizers: the same ids as the reference, exact round trips, control tokens, and what is refused."""

import functools
import json
import pickle

import numpy as np
import pytest
import vocabularies

import keras_llama
from keras_llama import tokenizer_files
from keras_llama.checkpoints import gguf_tokenizer
from keras_llama.opening import open_tokenizer
from keras_llama.subword import BytePairTokenizer, SentencePieceTokenizer

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("text", vocabularies.TEXTS)
def test_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode([text])) == [text if text != "▁" else " "]


def test_control_tokens_are_not_read_out_of_text(tokenizer):
    ids = tokenizer.encode(["</s><s>"])[0]
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


def test_special_tokens_on_request(tokenizer):
    plain, marked = (tokenizer.encode(["film"], add_bos=on, add_eos=on)[0] for on in (False, True))
    assert marked == [tokenizer.bos_id, *plain, tokenizer.eos_id]


def test_ids_lie_in_the_vocabulary_and_specials_are_distinct(tokenizer):
    assert max(max(row) for row in tokenizer.encode(vocabularies.TEXTS)) < tokenizer.vocabulary_size <= 300
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, 0}) == 4


def test_chinese_characters_may_stay_apart():
    texts = ["我们说 good day 我们", "我们 day after day"] * 20
    joined, apart = (keras_llama.SentencePieceTokenizer.train(texts, 300, split_ideographs=x) for x in (False, True))
    together = [
        any(len(t.token(i).strip("▁")) > 1 and t.token(i).strip("▁") in "我们说" for i in range(260, t.vocabulary_size))
        for t in (joined, apart)
    ]
    assert together == [True, False]
    pieces = {apart.token(i) for i in range(apart.vocabulary_size)}
    assert "▁day" in pieces
    assert not any("\ue000" in piece for piece in pieces)  # the border that the training texts were given
    assert apart.decode(apart.encode(texts)) == texts


def test_training_is_reproducible_and_merges():
    texts = ["ab ab ab abc"] * 20
    first, second = (keras_llama.SentencePieceTokenizer.train(texts, 270) for _ in range(2))
    assert first.encode(texts[:1]) == second.encode(texts[:1])
    assert len(first.encode(["ab ab"])[0]) == 2


def test_a_long_line_is_learned_from():
    """SentencePiece drops lines over 4,192 bytes unless told otherwise."""
    tokenizer = keras_llama.SentencePieceTokenizer.train(["xyzzy " * 2000], 270)
    assert len(tokenizer.encode(["xyzzy xyzzy"])[0]) <= 3


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_refuses_to_train_on_nothing(texts):
    with pytest.raises(ValueError, match="at least one text"):
        keras_llama.SentencePieceTokenizer.train(texts)


def _spelled():
    return keras_llama.SpelledTokenizer.train(vocabularies.TEXTS * 4, 400)


def _rust():
    return BytePairTokenizer(SentencePieceTokenizer.train(vocabularies.TEXTS * 4, 400).files)


@pytest.mark.parametrize("make", ["tokenizer", "chat_tokenizer", _spelled, _rust])
@pytest.mark.parametrize("text", [*vocabularies.HARD[:-1], "\ud55c\u3000 \U0001f600x"])
def test_offsets_say_where_each_token_stands(request, make, text):
    tokenizer = make() if callable(make) else request.getfixturevalue(make)
    ((ids, offsets),) = tokenizer.encode_with_offsets([text])
    assert ids == tokenizer.encode([text])[0]
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert offsets == sorted(offsets)
    assert {i for start, end in offsets for i in range(start, end)} == set(range(len(text)))  # every character
    for token, (start, end) in zip(ids, offsets, strict=True):
        written = tokenizer.decode([[token]])[0].strip()
        if "\ufffd" in written:  # a byte has the place of its character
            assert text[start:end]
        elif written:  # no space before the text
            assert written == text[start:end].strip().strip("\u2581")


def test_blank_tokens_are_known(tokenizer):
    ids = tokenizer.encode([" \n film"])[0]
    blank = [i in tokenizer.blank_ids for i in ids]
    assert blank[:-1] == [True] * (len(ids) - 1)
    assert not blank[-1]
    assert {tokenizer.bos_id, tokenizer.eos_id} <= tokenizer.blank_ids


@pytest.mark.parametrize("make", ["tokenizer", "chat_tokenizer", _spelled, _rust])
def test_tokens_within_a_character_are_known(request, make):
    tokenizer = make() if callable(make) else request.getfixturevalue(make)
    text = "x\U0001f680y\ubeef"  # in no vocabulary: four bytes and three
    ids = tokenizer.encode([text])[0]
    assert sum(i in tokenizer.within_ids for i in ids) == 5
    characters = []
    for i in ids:
        if i in tokenizer.within_ids:
            characters[-1].append(i)
        else:
            characters.append([i])
    assert "".join(tokenizer.decode(characters)) == text


@pytest.mark.parametrize("size", [10, 262])
def test_refuses_a_vocabulary_that_cannot_hold_the_characters(size):
    with pytest.raises(ValueError, match="vocabulary_size="):
        keras_llama.SentencePieceTokenizer.train(["abcdefghijklmnopqrstuvwxyz"], size)


def test_without_a_vocabulary_it_says_so():
    with pytest.raises(ValueError, match="no vocabulary"):
        keras_llama.SentencePieceTokenizer().encode(["a"])


def test_reviews_come_back_unchanged():
    data = pytest.importorskip("tasks.data")
    texts = [text for text, *_ in data.review_rows()[::20]]
    tokenizer = keras_llama.SentencePieceTokenizer.train(texts, 4000)
    assert tokenizer.decode(tokenizer.encode(texts)) == texts
    assert np.mean([len(row) for row in tokenizer.encode(texts)]) < np.mean([len(text) for text in texts])


def test_short_texts_are_enough_to_learn_from():
    tokenizer = keras_llama.SentencePieceTokenizer.train(["好", "坏"], 264)
    assert tokenizer.decode(tokenizer.encode(["好坏"])) == ["好坏"]


@pytest.mark.parametrize("kind", ["tokenizer", "chat_tokenizer"])
def test_decoding_takes_any_ids(request, kind):
    tokenizer = request.getfixturevalue(kind)
    (ids,) = tokenizer.encode(["a film"])
    beyond = [*ids, tokenizer.vocabulary_size, 10**6]
    assert tokenizer.decode([ids, [], beyond, np.array(ids), tuple(beyond)]) == ["a film", "", *["a film"] * 3]
    assert tokenizer.decode(np.array([ids])) == ["a film"]
    assert tokenizer.decode([]) == []


def test_the_unknown_token_has_no_text_but_its_sign_has(tokenizer):
    (ids,) = tokenizer.encode(["⁇ film"])
    assert tokenizer.decode([ids, [0, *ids, 0]]) == ["⁇ film", "⁇ film"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode("a film"), "list of strings"),
        (lambda t: t.encode([None]), "list of strings"),
        (lambda t: t.decode([[-1]]), "must not be negative"),
        (lambda t: t.train(["a", None]), "strings only"),
    ],
)
def test_what_is_no_text_and_no_id_is_refused(tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


# ---- The same ids as the reference. Files and vocabularies are read once for all tests.


def _differences(texts, ours, theirs):
    return [pair for pair in zip(texts, ours, theirs, strict=True) if pair[1] != pair[2]][:3]


@pytest.mark.parametrize(("name", "kind"), [("llama2", "spm"), ("llama3", "bpe"), ("llama2 through GGUF", "spm")])
def test_golden_ids(shared_data, name, kind):
    name, _, through = name.partition(" ")
    tokenizer = vocabularies.load(shared_data, name)
    if through:
        fields = gguf_tokenizer.to_gguf(tokenizer.files)
        tokenizer = open_tokenizer(gguf_tokenizer.from_gguf(fields))
        assert isinstance(tokenizer, BytePairTokenizer)
    texts, golden = vocabularies.goldens(shared_data, name, kind)
    assert not _differences(texts, tokenizer.encode(texts), golden)
    assert tokenizer.decode(golden) == texts


def test_llama2_as_sentencepiece_has_it(shared_data):
    import sentencepiece

    texts = vocabularies.shared_lines(shared_data) + vocabularies.HARD
    raw = sentencepiece.SentencePieceProcessor(model_proto=vocabularies.model(shared_data, "llama2"))
    tokenizer = vocabularies.load(shared_data, "llama2")
    ids = tokenizer.encode(texts)
    assert not _differences(texts, ids, raw.encode(texts))
    assert tokenizer.decode(ids) == [text.replace("▁", " ") for text in texts]
    rust = open_tokenizer(tokenizer_files.from_sentencepiece(vocabularies.model(shared_data, "llama2"), {}))
    assert not _differences(texts, rust.encode(texts), ids)
    assert rust.decode(ids) == tokenizer.decode(ids)


def _tiktoken(ranks):
    """tiktoken's algorithm by the book: in each word, join the pair of the lowest rank until there is none."""
    regex = pytest.importorskip("regex")
    # The pattern of Llama 3's own tokenizer.py.
    words = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    @functools.cache
    def encode_word(word):
        if word in ranks:
            return [ranks[word]]
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            found = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
            best = min(found)
            if best == len(ranks):
                break
            i = found.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [ranks[part] for part in parts]

    return lambda text: [i for word in words.findall(text) for i in encode_word(word.encode())]


def test_llama3_as_tiktoken_has_it(shared_data):
    import base64

    lines = vocabularies.model(shared_data, "llama3").splitlines()
    reference = _tiktoken({base64.b64decode(line.split()[0]): i for i, line in enumerate(lines)})
    texts = vocabularies.shared_lines(shared_data) + vocabularies.HARD
    tokenizer = vocabularies.load(shared_data, "llama3")
    ids = tokenizer.encode(texts)
    assert not _differences(texts, ids, map(reference, texts))
    assert tokenizer.decode(ids) == texts
    assert tokenizer.vocabulary_size == 128_256
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>", "<|python_tag|>"]
    assert [tokenizer.special_tokens[name] for name in names] == [128_000, 128_001, 128_004, 128_009, 128_010]
    assert tokenizer.token(128_255) == "<|reserved_special_token_247|>"
    assert tokenizer.default_add_bos
    assert not tokenizer.default_add_eos


def test_smollm2_as_tokenizers_has_it(shared_data):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    fields = vocabularies.smollm2_fields()
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    raw = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    raw.decoder = decoders.ByteLevel()
    texts = vocabularies.shared_lines(shared_data) + vocabularies.HARD
    ids = vocabularies.smollm2().encode(texts)
    assert not _differences(texts, ids, (row.ids for row in raw.encode_batch(texts)))
    assert vocabularies.smollm2().decode(ids) == texts


# ---- What is written opens in Transformers.


def _write(tokenizer, path):
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_assets(path)
    return path


def test_a_vocabulary_trained_here_gives_transformers_the_same_ids(shared_data, tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = vocabularies.shared_lines(shared_data)[::20]
    tokenizer = SentencePieceTokenizer.train(texts, 4000)
    theirs = transformers.AutoTokenizer.from_pretrained(_write(tokenizer, tmp_path))
    texts = [*texts, *vocabularies.HARD, "  two spaces first", " one"]
    reference = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not _differences(texts, tokenizer.encode(texts), reference)
    marked = ["<s>hello</s> world <pad> x</s>", "a</s> b<unk>"]
    ids = tokenizer.encode(marked, parse_special=True)
    assert not _differences(marked, ids, theirs(marked, add_special_tokens=False)["input_ids"])
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == [theirs.decode(row, skip_special_tokens=skip) for row in ids]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(theirs, name) for name in names] == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert theirs("film")["input_ids"] == tokenizer.encode(["film"], add_bos=True)[0]
    again = open_tokenizer(tokenizer.files)
    assert isinstance(again, BytePairTokenizer)
    assert again.proto == tokenizer.proto
    assert not _differences(texts, tokenizer.encode(texts), again.encode(texts))


def _small(frame=None, like="bytes"):
    """A `tokenizer.json` with a post-processor."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    characters = pre_tokenizers.ByteLevel.alphabet() if like == "bytes" else "▁abcdefghijklmnopqrstuvwxyz"
    raw = tokenizers.Tokenizer(models.BPE({c: i + 3 for i, c in enumerate(sorted(characters))} | {"<unk>": 0}, []))
    if like == "bytes":
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    raw.add_special_tokens(["<s>", "</s>"])
    if frame is not None:
        special = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
        raw.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    return raw.to_str().encode()


@pytest.mark.parametrize("like", ["bytes", "spaces"])
@pytest.mark.parametrize("frame", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_default_special_tokens_are_those_of_transformers(tmp_path, like, frame):
    transformers = pytest.importorskip("transformers")
    document = _small(frame, like)
    cases = [
        {"tokenizer_class": kind} | {name: flag for name, flag in flags.items() if flag is not None} | roles
        for kind in ("PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast")
        for flags in (
            {"add_bos_token": bos, "add_eos_token": eos} for bos in (None, True, False) for eos in (None, True)
        )
        for roles in ({"bos_token": "<s>", "eos_token": "</s>"}, {})
    ]
    for i, settings in enumerate(cases):
        files = {"tokenizer.json": document, "tokenizer_config.json": json.dumps(settings).encode()}
        tokenizer = open_tokenizer(files)
        theirs = transformers.AutoTokenizer.from_pretrained(_write(tokenizer, tmp_path / str(i)))
        framed, plain = (theirs("q", add_special_tokens=on)["input_ids"] for on in (True, False))
        flags = framed[0] != plain[0], framed[-1] != plain[-1]
        assert (tokenizer.default_add_bos, tokenizer.default_add_eos) == flags, settings
        assert tokenizer.encode(["q"], add_bos=flags[0], add_eos=flags[1])[0] == framed, settings


# ---- Control tokens.


@pytest.fixture(params=["llama2", "llama3", "smollm2", "trained"])
def any_tokenizer(request):
    if request.param == "smollm2":
        return vocabularies.smollm2()
    if request.param == "trained":
        return request.getfixturevalue("tokenizer")
    return vocabularies.load(request.getfixturevalue("shared_data"), request.param)


def test_control_tokens_are_parsed_only_when_asked(any_tokenizer):
    for text, token in list(any_tokenizer.special_tokens.items())[:12]:
        marked = f"a{text}b"
        plain, parsed = (any_tokenizer.encode([marked], parse_special=on)[0] for on in (False, True))
        assert token not in plain
        assert token in parsed
        assert any_tokenizer.token(token) == text
        assert any_tokenizer.decode([plain]) == [marked]
        assert any_tokenizer.decode([parsed], skip_special_tokens=False)[0].replace(" ", "") == marked
        assert any_tokenizer.decode([parsed])[0].replace(" ", "") == "ab"


def test_what_was_derived_survives_pickling_and_assets(any_tokenizer, tmp_path):
    texts = vocabularies.HARD[:5]
    ids = any_tokenizer.encode(texts, parse_special=True)
    again = pickle.loads(pickle.dumps(any_tokenizer))
    assert again.encode(texts, parse_special=True) == ids
    loaded = type(any_tokenizer).from_config(any_tokenizer.get_config())
    loaded.load_assets(_write(any_tokenizer, tmp_path))
    assert loaded.files == any_tokenizer.files
    assert loaded.encode(texts, parse_special=True) == ids
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (again.bos_id, again.eos_id, again.pad_id)


def test_other_files_replace_all_that_was_derived(tokenizer, chat_tokenizer, tmp_path):
    changed = open_tokenizer({"tokenizer.json": _small()})
    before = changed.special_tokens, changed.vocabulary_size, changed.encode(["good"])
    changed.load_assets(_write(chat_tokenizer, tmp_path))
    assert changed.encode(["good"]) == chat_tokenizer.encode(["good"])
    assert (changed.special_tokens, changed.vocabulary_size) == (
        chat_tokenizer.special_tokens,
        chat_tokenizer.vocabulary_size,
    )
    assert before[1] != changed.vocabulary_size


def test_added_tokens_count_and_have_names(tokenizer):
    files = {"tokenizer.model": tokenizer.proto, "added_tokens.json": b'{"<|sep|>": 310}'}
    more = open_tokenizer(files)
    assert isinstance(more, SentencePieceTokenizer)
    assert more.vocabulary_size == 311
    assert more.encode(["a<|sep|>b"], parse_special=True)[0].count(310) == 1
    assert 310 not in more.encode(["a<|sep|>b"])[0]
    assert more.token(310) == "<|sep|>"
    assert more.token(305) == ""
    assert more.decode([[310, 305]]) == [""]


def test_roles_come_from_either_file_and_either_spelling(tokenizer):
    files = {"tokenizer.json": _small()}
    assert open_tokenizer(files).bos_id == open_tokenizer(files).eos_id == -1
    assert open_tokenizer(files).pad_id == 0
    files["special_tokens_map.json"] = b'{"eos_token": {"content": "</s>", "lstrip": false}, "pad_token": "<s>"}'
    small = open_tokenizer(files)
    assert (small.token(small.eos_id), small.token(small.pad_id), small.bos_id) == ("</s>", "<s>", -1)
    files["tokenizer_config.json"] = b'{"pad_token": null}'
    assert open_tokenizer(files).pad_id == small.eos_id


# ---- What is refused.


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer.json or tokenizer.model"),
        ({"vocab.json": b"{}"}, "tokenizer.json or tokenizer.model"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json: expected"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json: expected"),
        ({"tokenizer.json": b"[" * 100_000}, "tokenizer.json: expected"),
        ({"tokenizer.model": b""}, "tokenizer.model: expected"),
        ({"tokenizer.model": b"\x00\x01 what"}, "tokenizer.model: expected"),
        ({"tokenizer.model": b"IQ== 0\nIg== x\n"}, "tokenizer.model:2"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "every single byte"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"{"}, "tokenizer_config.json: expected"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"[]"}, "tokenizer_config.json: expected"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"[" * 100_000}, "tokenizer_config.json: expected"),
        ({"tokenizer.json": None, "special_tokens_map.json": b"1"}, "special_tokens_map.json: expected"),
    ],
)
def test_broken_files_are_named(files, message):
    with pytest.raises(ValueError, match=message):
        open_tokenizer({name: _small() if data is None else data for name, data in files.items()})


@pytest.mark.parametrize("cls", [BytePairTokenizer, SentencePieceTokenizer])
def test_no_vocabulary_yet(cls, tmp_path):
    empty = pickle.loads(pickle.dumps(cls()))
    assert empty.proto is None
    for call in (lambda: empty.encode(["a"]), lambda: empty.vocabulary_size, lambda: empty.save_assets(tmp_path)):
        with pytest.raises(ValueError, match="no vocabulary yet"):
            call()


def test_text_that_utf8_cannot_hold(any_tokenizer):
    with pytest.raises(ValueError, match="surrogate"):
        any_tokenizer.encode(["fine", "half \ud83d"])


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_outside_the_vocabulary(any_tokenizer, token):
    with pytest.raises(ValueError, match="must lie from 0"):
        any_tokenizer.token(token)


def test_an_embedding_may_have_more_rows_than_there_are_tokens(any_tokenizer):
    ids = any_tokenizer.encode(["a film"])[0]
    assert any_tokenizer.decode([[*ids, 10**6], [10**6]]) == ["a film", ""]
