"""Text around the token loop: cut at the stop set, in pieces that never hold half a character."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_llama.generation import TokenLoop
from keras_llama.heads.plan import Plan

_HALF = "\ufffd"  # what a decoder writes for bytes that are no character yet


class Completion:
    """What was generated for one prompt.

    Args:
        tokenizer: decodes ids.
        prompt: token ids of the prompt; the text of a token depends on the one before.
        stop_ids: ids that end the text; they are no part of it.
        stop_texts: strings that end the text; they are no part of it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop_ids: set[int], stop_texts: Sequence[str]):
        self.tokenizer, self.prompt = tokenizer, list(prompt)
        self.stop_ids, self.stop_texts = stop_ids, stop_texts
        self.done, self.text, self._shown = False, "", 0
        self._before = tokenizer.decode([self.prompt])[0]

    def update(self, ids: Sequence[int]) -> None:
        """Takes all ids generated so far."""
        if self.done:
            return
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        ids = [int(i) for i in ids[:end]]
        whole = self.tokenizer.decode([self.prompt + ids])[0]
        after = whole.startswith(self._before)
        self.text = whole[len(self._before) :] if after else self.tokenizer.decode([ids])[0]
        found = [place for text in self.stop_texts if (place := self.text.find(text)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        self.done = bool(found) or end is not None

    def show(self, finished: bool) -> str:
        """The text that has come since the last call and will not change; all of it once `finished`."""
        end = len(self.text) if finished or self.done else self._settled()
        new, self._shown = self.text[self._shown : end], max(end, self._shown)
        return new

    def _settled(self) -> int:
        """How much of the text no later token can change: no open character, no start of a stop string."""
        settled = self.text.rstrip(_HALF)
        held = 0
        for stop in self.stop_texts:
            sizes = range(1, min(len(stop), len(settled) + 1))
            held = max([held, *(size for size in sizes if settled.endswith(stop[:size]))])
        return len(settled) - held


def new_ids(
    loop: TokenLoop, prompts: list[list[int]], plan: Plan, tokenizer: Any = None, context: tuple = ()
) -> list[list[int]]:
    """Token ids that continue each prompt, up to and with the first stop token."""
    if plan.num_beams > 1:
        penalty = plan.settings.repetition_penalty
        options = (plan.max_new_tokens, plan.num_beams, penalty, plan.length_penalty, plan.stop_ids, context)
        return loop.beam_search(prompts, *options)
    parts = [written for written, _ in _chunks(loop, prompts, plan, tokenizer, context, 8 if plan.stop_texts else None)]
    return [_through_stop(row.tolist(), plan.stop_ids) for row in np.concatenate(parts, axis=1)]


def texts(loop: TokenLoop, prompts: list[list[int]], plan: Plan, tokenizer: Any, context: tuple = ()) -> list[str]:
    """The completion of each prompt."""
    completions = [Completion(tokenizer, prompt, plan.stop_ids, plan.stop_texts) for prompt in prompts]
    for completion, ids in zip(completions, new_ids(loop, prompts, plan, tokenizer, context), strict=True):
        completion.update(ids)
    return [completion.text for completion in completions]


def stream(
    loop: TokenLoop, prompts: list[list[int]], plan: Plan, tokenizer: Any, context: tuple = ()
) -> Iterator[list[str]]:
    """The completions piece by piece, `plan.stream` tokens at a time; a piece may be empty.

    A beam search knows its text at the end and gives it as one piece.
    """
    if plan.num_beams > 1:
        yield texts(loop, prompts, plan, tokenizer, context)
        return
    completions = [Completion(tokenizer, prompt, plan.stop_ids, plan.stop_texts) for prompt in prompts]
    left = plan.max_new_tokens
    for written, done in _chunks(loop, prompts, plan, tokenizer, context, plan.stream, completions):
        left -= written.shape[1]
        yield [completion.show(finished=left == 0 or bool(done.all())) for completion in completions]


def _chunks(loop, prompts, plan, tokenizer, context, chunk, completions=None):
    """The loop's chunks; rows whose text meets a stop string are stopped."""
    if completions is None and plan.stop_texts:
        completions = [Completion(tokenizer, prompt, plan.stop_ids, plan.stop_texts) for prompt in prompts]

    def finished(written):
        for completion, row in zip(completions, written, strict=True):
            completion.update(row.tolist())
        return np.array([completion.done for completion in completions])

    return loop.generate(
        prompts,
        plan.max_new_tokens,
        plan.settings,
        plan.stop_ids,
        [(plan.seed, row) for row in plan.rows],
        context,
        chunk,
        None if completions is None else finished,
    )


def _through_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
