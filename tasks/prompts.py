"""Prompts of a language model that answers questions: contexts cut to leave room, and the question behind them."""

from tasks import common


def fitted(model, args, rows, contexts):
    """(context, question) of each row: the `contexts` found for it, as much as leaves room for an answer.

    How many were cut is told.
    """
    found = ["\n".join(texts) for texts in contexts]
    questions = [f"\n\n{row.question}\n" for row in rows]
    kept = [_cut(model, args, *pair) for pair in zip(found, questions, strict=True)]
    if cut := sum(part != whole for part, whole in zip(kept, found, strict=True)):
        print(f"{cut} of {len(rows)} contexts are cut: a prompt has {_room(model, args)} tokens.")
    return list(zip(kept, questions, strict=True))


def learned(model, args, rows):
    """What `fit` takes of the rows that have an answer: a prompt that holds it, and a response; the others are told."""
    rows = [row for row in rows if row.answers]
    asked = fitted(model, args, rows, [[row.context] for row in rows])
    pairs = [
        (context + question, answer["text"])
        for (context, question), row in zip(asked, rows, strict=True)
        for answer in [a for a in row.answers if a["text"] in context][:1]
    ]
    if len(pairs) < len(rows):
        print(f"{len(rows) - len(pairs)} of {len(rows)} questions are left out: their answer was cut off.")
    if not pairs:
        raise common.DataError("Expected prompts that hold their answer. Received: none. Raise --sequence-length.")
    if model.preprocessor.tokenizer.chat_template:
        return [{"messages": [_said(prompt), {"role": "assistant", "content": text}]} for prompt, text in pairs]
    return [{"prompt": prompt, "response": text} for prompt, text in pairs]


def _said(prompt):
    return {"role": "user", "content": prompt}


def _room(model, args):
    """Tokens of a prompt."""
    return model.preprocessor.sequence_length - args.max_answer_length


def _cut(model, args, context, question):
    """As much of a context as fits into a prompt before a question."""
    tokenizer = model.preprocessor.tokenizer
    (ids,) = tokenizer.encode([context])
    size, text = len(ids), context
    while (over := _tokens(model.preprocessor, text + question) - _room(model, args)) > 0:
        size -= over
        if size < 1:
            raise common.DataError(
                f"--sequence-length {model.preprocessor.sequence_length}: expected room for a question, some of its "
                f"context, and --max-answer-length {args.max_answer_length}. Received: {question.strip()[:80]!r}."
            )
        text = tokenizer.decode([ids[:size]])[0].rstrip("\ufffd")  # half a character
    return text


def _tokens(text, prompt):
    """How many tokens a model reads of a prompt, those of a chat template among them."""
    if text.tokenizer.chat_template:
        return len(text.tokenizer.encode_chat([_said(prompt)]))
    return len(text.begin) + len(text.tokenizer.encode([prompt])[0])
