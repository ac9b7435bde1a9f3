"""The questions that the question answering recipe reads: files in the format of SQuAD."""

import json
import pathlib
from typing import NamedTuple

from tasks import common

PASSAGES = pathlib.Path(__file__).with_name("passages.json")  # written for this project


class Row(NamedTuple):
    """A question about a context.

    Attributes:
        references: all answers that the file gives, to score by.
        answers: those that stand in the context, with their places, to learn from.
        place: file and question, for error messages.
    """

    context: str
    question: str
    references: list[str]
    answers: list[dict]
    place: str


def read(path=PASSAGES):
    """The rows of a file in the format of SQuAD 1.1 or 2.0, which CMRC 2018 and DRCD have, too.

    Answers whose `answer_start` is wrong, those that are not in their context, and empty questions, of which CMRC 2018
    has one, are counted and told.
    """
    rows: list[Row] = []
    counts = {"answers": 0, "moved": 0, "absent": 0, "empty": 0}
    for context, asked in _paragraphs(path):
        place = f"{path}: question {asked.get('id', len(rows))}"
        question = asked.get("question")
        if question == "":
            counts["empty"] += 1
            continue
        given = _records(asked, place)
        texts = [answer.get("text") for answer in given]
        for name, text in (("context", context), ("question", question), *(("answer", text) for text in texts)):
            if not isinstance(text, str) or not text.strip():
                raise common.DataError(f"{place}: expected {name} to be a text. Received: {text!r}.")
        here = [answer for answer in given if answer["text"] in context]
        placed = [answer for answer in here if answer.get("answer_start") is not None]
        moved = [a for a in placed if not context.startswith(a["text"], max(a["answer_start"], 0))]
        found = {"answers": len(given), "moved": len(moved), "absent": len(given) - len(here)}
        counts = {name: count + found.get(name, 0) for name, count in counts.items()}
        rows.append(Row(context, question, texts, here, place))
    if not rows:
        raise common.DataError(f"{path}: expected at least one question. Received: none.")
    if counts["moved"] or counts["absent"] or counts["empty"]:
        print(
            f"{path}: of {counts['answers']} answers {counts['moved']} do not stand where they should (the nearest "
            f"place is taken), and {counts['absent']} are not in their context; {counts['empty']} questions are empty. "
            "These are left out."
        )
    return rows


def _records(asked, place):
    """The answers of a question, a list of text and answer_start, which Hugging Face's data sets have as two columns.

    A question that has no `answers` says by `is_impossible` that there are none: else it is of a blind test.
    """
    given = asked.get("answers", [] if asked.get("is_impossible") is True else None)
    if isinstance(given, dict):
        texts, starts = (given.get(name) for name in ("text", "answer_start"))
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    good = isinstance(given, list) and all(isinstance(answer, dict) for answer in given)
    if not good or not all(type(answer.get("answer_start")) in (int, type(None)) for answer in given):
        raise common.DataError(
            f"{place}: expected answers, a list of text and answer_start, [] for none. Received: {str(given)[:80]}."
        )
    return given


def _paragraphs(path):
    try:
        document = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                yield from ((paragraph["context"], dict(asked)) for asked in paragraph["qas"])
    except OSError as error:
        raise common.DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise common.DataError(
            f"{path}: expected SQuAD's JSON, data > paragraphs > context and qas ({error!r})."
        ) from error


def apart(rows, test):
    """The rows whose context the test data have not; says how many are left out."""
    known = {row.context for row in test}
    kept = [row for row in rows if row.context not in known]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} training questions left out: their context is in the test data.")
    return kept


def learnable(rows):
    """The rows that teach something: answered in their context, or known to have no answer."""
    return [row for row in rows if row.answers or not row.references]


def texts_of(rows):
    """Each context and question once."""
    return list(dict.fromkeys(text for row in rows for text in (row.context, row.question)))


def pieces(rows, length):
    """The texts of rows, cut to what a row of a language model holds."""
    return [text[i : i + length - 2] for text in texts_of(rows) for i in range(0, len(text), length - 2)]
