"""Questions about texts: what users pass -> checked rows -> windows of token ids, and logits of windows -> answers.

Shapes: T tokens of a window, C those of them that are the context's, W windows of a question.
"""

import numbers
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_llama.config import invalid
from keras_llama.preprocessing import TextPreprocessor, check_texts

_FORMS = '{"question": ..., "context": ..., "answers": ...}'


class Question(NamedTuple):
    """A question about a context, and its answers as far as they are known: none where the context has none.

    Attributes:
        spans: of each place of an answer in the context, the first character and that behind its last one.
    """

    question: str
    context: str
    answers: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()


def questions(x: Any, y: Any = None, argument: str = "x", found: Counter | None = None) -> list[Question]:
    """The rows of `x` as `Question`s.

    Args:
        x: a list of dicts with `question`, `context` and, unless `y` has them, `answers` or `answer`; or a dict of such
            columns. An answer is a string, or a dict of `text` and `answer_start` as SQuAD has it; answers are one, a
            list of them, or a dict of columns. "" and [] say that the context has none.
        y: answers of each row.
        found: counts `answers`, and `repaired`, those that did not stand where their `answer_start` says: the nearest
            place is taken. What is not counted is warned of.

    Raises:
        ValueError: for a row in another form, an empty question or context, or an answer that is not in its context.

    >>> questions([{"question": "Who sat?", "context": "The cat sat.", "answers": "The cat"}])[0].spans
    ((0, 7),)
    """
    if isinstance(x, (list, tuple)) and x and all(isinstance(row, Question) for row in x):
        return list(x)
    columns = _columns(x, argument)
    if y is None:
        y = columns.get("answers", columns.get("answer"))
    texts = {name: check_texts(columns[name], name) for name in ("question", "context")}
    y = [None] * len(texts["question"]) if y is None else list(y)
    if len({len(y), *map(len, texts.values())}) > 1:
        lengths = {name: len(rows) for name, rows in {**texts, "answers": y}.items()}
        raise invalid("There must be a context and answers for each question.", **lengths)
    counted = Counter() if found is None else found
    rows = []
    for i, (question, context, given) in enumerate(zip(*texts.values(), y, strict=True)):
        for name, text in {"question": question, "context": context}.items():
            if not text.strip():
                raise invalid(f"`{name}[{i}]` must not be blank.", "Drop the row.", **{name: text})
        rows.append(Question(question, context, *_answers(given, context, f"answers[{i}]", counted)))
    if found is None and counted["repaired"]:
        warnings.warn(
            f"{counted['repaired']} of {counted['answers']} answers do not stand where their `answer_start` says; the "
            "nearest place in the context is taken.",
            stacklevel=2,
        )
    return rows


def _columns(x: Any, argument: str) -> Mapping[str, Any]:
    if isinstance(x, (list, tuple)) and x and all(isinstance(row, Mapping) for row in x):
        columns = {name: [row.get(name) for row in x] for name in ("question", "context")}
        x = {**columns, "answers": [row.get("answers", row.get("answer")) for row in x]}
    if not isinstance(x, Mapping) or not {"question", "context"} <= set(x):
        shown = sorted(x) if isinstance(x, Mapping) else x[:1] if isinstance(x, (list, tuple)) else x
        raise invalid(f"`{argument}` must be a list of {_FORMS}, or a dict of such columns.", **{argument: shown})
    return x


_LISTS = (list, tuple, np.ndarray)


def _answers(given: Any, context: str, place: str, counted: Counter) -> tuple[tuple[str, ...], tuple]:
    """The distinct answers, and all the places where they may stand, without blanks at their ends."""
    texts: dict[str, None] = {}
    spans: dict[tuple[int, int], None] = {}
    for text, start in _records(given, place):
        spoken = text.strip()
        if not spoken:
            continue
        found = _places(context, text, start)
        if not found:
            raise invalid(
                f"`{place}` must stand in its context, word for word.",
                "Drop the row.",
                answer=text,
                context=context[:99],
            )
        counted.update(answers=1, repaired=int(start is not None and found[0] != start))
        texts[text] = None
        blanks = len(text) - len(text.lstrip())
        spans |= dict.fromkeys((at + blanks, at + blanks + len(spoken)) for at in found)
    return tuple(texts), tuple(spans)


def _records(given: Any, place: str) -> Iterator[tuple[str, int | None]]:
    """The text of each answer, and where it stands if that is known."""
    forms = "a string, a dict of text and answer_start, a list of these, or a dict of such columns"
    if isinstance(given, Mapping) and isinstance(given.get("text"), _LISTS):
        columns = {name: given[name] for name in ("text", "answer_start") if name in given}
        if not all(isinstance(rows, _LISTS) for rows in columns.values()) or len({*map(len, columns.values())}) > 1:
            raise invalid(f"`{place}` must be {forms} of one length.", answers=given)
        given = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    given = [] if given is None else [given] if isinstance(given, (str, Mapping)) else given
    if not isinstance(given, _LISTS):
        raise invalid(f"`{place}` must be {forms}.", 'Write "" or [] where the context has none.', answers=given)
    for answer in given:
        record = answer if isinstance(answer, Mapping) else {"text": answer}
        text, start = record.get("text"), record.get("answer_start")
        if not isinstance(text, str):
            raise invalid(f"`{place}` must hold strings, or dicts of text and answer_start.", answer=answer)
        if isinstance(start, bool) or not isinstance(start, (numbers.Integral, type(None))):
            raise invalid(f"`{place}` must have integers as answer_start.", answer_start=start)
        yield text, None if start is None else int(start)


def _places(context: str, text: str, start: int | None) -> list[int]:
    """Where a text stands in its context: at `start` or as near to it as possible, or everywhere if that is unknown."""
    places = []
    at = context.find(text)
    while at >= 0:
        places.append(at)
        at = context.find(text, at + 1)
    return places if start is None else sorted(places, key=lambda at: abs(at - start))[:1]


class Window(NamedTuple):
    """A question with a part of its context, as a row of token ids: `[begin] question end context end`.

    Attributes:
        row: the number of its question.
        token_ids: int32 (T,). The last one, behind all of the rest, stands for "no answer here".
        first: place of the first token of the context.
        offsets: where each of its tokens stands in the context, int32 (C, 2).
        possible: whether an answer can begin with each of them, and whether it can end, bool (C, 2): not with blanks,
            and not within a character that several tokens spell.
    """

    row: int
    token_ids: np.ndarray
    first: int
    offsets: np.ndarray
    possible: np.ndarray


class Windows(list[Window]):
    """The windows of some questions, in their order."""


def windows(rows: Sequence[Question], preprocessor: TextPreprocessor, stride: int) -> Windows:
    """Windows of at most `sequence_length` tokens over the contexts, all of them but the shorter ones full.

    A question may take half of a window; what is longer is cut, with a warning. Each window shares `stride` tokens of
    the context, or half of what the question leaves it, with the one before, and the last one more where it is full.
    """
    tokenizer = preprocessor.tokenizer
    longest, end = longest_question(preprocessor), separator(preprocessor)
    asked = tokenizer.encode([row.question for row in rows])
    if cut := sum(len(ids) > longest for ids in asked):
        warnings.warn(f"{cut} of {len(rows)} questions were cut to {longest} tokens, half of a window.", stacklevel=2)
    contexts = list(dict.fromkeys(row.context for row in rows))
    encoded = {context: _encode(tokenizer, context) for context in contexts}
    found = Windows()
    for i, (row, question) in enumerate(zip(rows, asked, strict=True)):
        ids, offsets, possible = encoded[row.context]
        head = [*preprocessor.begin, *question[:longest], end]
        room = preprocessor.sequence_length - len(head) - 1
        for start in starts(len(ids), room, stride):
            part = slice(start, start + room)
            token_ids = np.concatenate([head, ids[part], [end]]).astype("int32")
            found.append(Window(i, token_ids, len(head), offsets[part], possible[part]))
    return found


def _encode(tokenizer: Any, context: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, their places, and whether an answer can begin and end with each."""
    ((ids, places),) = tokenizer.encode_with_offsets([context])
    offsets = np.array(places, "int32").reshape(-1, 2)
    first, last = np.ones((2, len(ids)), bool)
    first[1:] = [token not in tokenizer.within_ids for token in ids[1:]]
    last[:-1] = first[1:]
    parts = zip(offsets[first, 0], offsets[last, 1], strict=True)
    spoken = np.array([bool(context[start:end].strip()) for start, end in parts], bool)[np.cumsum(first) - 1]
    spoken &= np.array([token not in tokenizer.blank_ids for token in ids], bool)
    return np.array(ids, "int32"), offsets, np.stack([first & spoken, last & spoken], axis=1)


def longest_question(preprocessor: TextPreprocessor) -> int:
    """Most tokens of a question: half of what a window has beside its other three."""
    return (preprocessor.sequence_length - len(preprocessor.begin) - 2) // 2


def starts(tokens: int, room: int, stride: int) -> list[int]:
    """Where windows of `room` tokens begin that share at least `stride`, or half of them.

    >>> starts(10, 4, 1), starts(3, 4, 1), starts(9, 4, 100)
    ([0, 3, 6], [0], [0, 2, 4, 5])
    """
    last = max(tokens - room, 0)
    step = room - min(stride, room // 2)
    return [min(start, last) for start in range(0, last + step, step)]


def separator(preprocessor: TextPreprocessor) -> int:
    """The token between question and context, and behind both: the vocabulary's end of text, or its begin.

    Raises:
        ValueError: if it has neither, or the preprocessor's `sequence_length` leaves no room.
    """
    tokenizer = preprocessor.tokenizer
    found = tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.bos_id
    if found < 0:
        known = sorted(tokenizer.special_tokens)
        raise invalid("The tokenizer must have a token that begins or ends a text, to part two.", special_tokens=known)
    if (length := preprocessor.sequence_length) < 8:
        raise invalid(
            "`sequence_length` must be at least 8, for question, context and three more.", sequence_length=length
        )
    return found


def span_targets(window: Window, spans: Sequence[tuple[int, int]]) -> np.ndarray | None:
    """Targets of `SpanCrossentropy`, int32 (2, T), for a window of a question whose answers stand at `spans`.

    A window without an answer is to say so by its last token. One that holds but a part of each answer teaches nothing:
    `None`.
    """
    targets = np.zeros((2, len(window.token_ids)), "int32")
    targets[:, window.first : -1] = window.possible.T
    targets[:, -1] = 1
    begins, ends = window.offsets.T
    first, last = window.possible.T
    held = partly = False
    for start, end in spans:
        opening = np.flatnonzero(first & (begins <= start) & (start < ends))
        closing = np.flatnonzero(last & (begins < end) & (end <= ends))
        if opening.size and closing.size:
            held = True
            targets[(0, 1), (window.first + opening[0], window.first + closing[-1])] = 2
        elif ((ends > start) & (begins < end)).any():
            partly = True
    if partly and not held:
        return None
    if not held:
        targets[:, -1] = 2
    return targets


def training_columns(rows: Sequence[Question], found: Windows, streamed: bool = False) -> dict[str, list[np.ndarray]]:
    """Rows of `token_ids`, and of targets `starts` and `ends`, int32 (T,) each, for the windows that teach something.

    A batch that is `streamed` may hold none: then it is a window of which every place is right, so that loss and
    gradient are 0.

    Raises:
        ValueError: if none of those in memory does.
    """
    pairs = [(window, span_targets(window, rows[window.row].spans)) for window in found]
    kept = [(window.row, window.token_ids, *targets) for window, targets in pairs if targets is not None]
    lost = len(rows) - len({row for row, *_ in kept})
    hint = "Raise the preprocessor's `sequence_length`, or `stride`."
    if not kept and streamed:
        nothing = np.zeros((2, len(found[0].token_ids)), "int32")
        nothing[:, found[0].first : -1] = 2 * found[0].possible.T
        nothing[:, -1] = 2
        kept = [(0, found[0].token_ids, *nothing)]
    if not kept:
        raise invalid("An answer must fit into a window.", hint, answer=rows[0].answers[0])
    if lost:
        warnings.warn(
            f"{lost} of {len(rows)} questions are left out: no window holds their answer. {hint}", stacklevel=2
        )
    _, *columns = map(list, zip(*kept, strict=True))
    return dict(zip(("token_ids", "starts", "ends"), columns, strict=True))


class Span(NamedTuple):
    """The best answer of a window: the logarithms of its probability and of that of none, and its place."""

    score: float
    none: float
    start: int
    end: int


def best_span(window: Window, logits: np.ndarray, longest: int) -> Span:
    """The most probable span of at most `longest` tokens of the context, by logits float32 (T, 2) of a window."""
    context = slice(window.first, window.first + len(window.possible))
    known = np.concatenate([np.where(window.possible, logits[context], -np.inf), logits[None, context.stop]])
    known = known.astype("float64")
    shifted = known - known.max(axis=0)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=0))
    begins, ends = log_probs[:-1].T
    best = Span(-np.inf, float(log_probs[-1].sum()), 0, 0)
    for more in range(min(longest, len(begins))):
        sums = begins[: len(begins) - more] + ends[more:]
        i = int(sums.argmax())
        if sums[i] > best.score:
            place = int(window.offsets[i, 0]), int(window.offsets[i + more, 1])
            best = Span(float(sums[i]), best.none, *place)
    return best


def best_answers(
    rows: Sequence[Question], found: Windows, logits: np.ndarray, longest: int, threshold: float | None
) -> Iterator[dict[str, Any]]:
    """The answer to each question, the best of all its windows; see `LlamaQuestionAnswering.answer`."""
    by_row: dict[int, list[Span]] = {i: [] for i in range(len(rows))}
    for window, values in zip(found, logits, strict=True):
        by_row[window.row].append(best_span(window, values, longest))
    for row, spans in zip(rows, by_row.values(), strict=True):
        best, none = max(spans, key=lambda span: span.score), min(span.none for span in spans)
        unsure = threshold is not None and none - best.score > threshold
        if unsure or np.isinf(best.score):  # no span is as short as `longest`
            yield {"text": "", "start": None, "end": None, "score": float(np.exp(none))}
            continue
        text = row.context[best.start : best.end]
        start = best.start + len(text) - len(text.lstrip())
        text = text.strip()
        yield {"text": text, "start": start, "end": start + len(text), "score": float(np.exp(best.score))}
