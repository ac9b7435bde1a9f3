"""The token loop: prefill, steps, stop set, streaming, beams. It sees token ids only.

Shapes: B batch, T prompt length, S columns of the cache, V vocabulary, n beams.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_llama import backend, beams
from keras_llama import cache as kv_cache
from keras_llama.config import LlamaConfig, invalid
from keras_llama.projections import KernelCopies
from keras_llama.samplers import choose, penalize

_ROOM = 1024  # columns to begin with, full or empty: each number of them is one more program (docs/decisions.md)


class State(NamedTuple):
    """What one step hands to the next.

    Attributes:
        tokens: int32 (B, S), prompts padded on the left, then what was generated.
        mask: int32 (B, S), 1 for the tokens of a text.
        cache: keys and values of the columns before `column` - 1.
        seen: bool (B, V), tokens that a text holds already.
        done: bool (B,), rows that have met a stop token.
        column: int32 (), the next column to write.
    """

    tokens: Any
    mask: Any
    cache: Any
    seen: Any
    done: Any
    column: Any

    def over(self):
        """Whether every row has met a stop token, bool ()."""
        return ops.all(self.done)

    def grown(self, columns: int) -> "State":
        """The same with empty columns behind its own."""
        tokens, mask = (kv_cache.widened(x, columns) for x in (self.tokens, self.mask))
        return self._replace(tokens=tokens, mask=mask, cache=kv_cache.grow(self.cache, columns))


class TokenLoop:
    """Generates token ids with a model's step, compiled once per bucket of lengths.

    Prompts are padded on the left to a bucket, so that every row's next token stands in the same
    column; positions come from the mask, so padding changes nothing.

    Args:
        step: (token_ids (B, T), padding_mask (B, S), cache, index, *context) -> float32 logits of the last
            column (B, V), cache. `context` is what does not change while a text grows, such as a source.
        config: sizes of the cache and of the vocabulary.
        variables: the weights that `step` reads.
        dtype: of the cache.
        groups: the layers that a step reads, as `KernelCopies` takes them.
        by_compiler: says whether torch compiles a step (`backend.Flattened`).
        start: what runs the prompts, as `step` at index 0 would, where they hold more than tokens; else `step` does.
    """

    def __init__(
        self,
        step: Callable,
        config: LlamaConfig,
        variables: Sequence,
        dtype: str,
        groups: Sequence[tuple],
        by_compiler: Callable[[], bool],
        start: Callable | None = None,
    ):
        self.step, self.config, self.dtype = step, config, dtype
        self.start = start or step
        self._kernels = KernelCopies(groups, variables)
        self._next_step = backend.Flattened(self._step_by_copies, variables, by_compiler)
        # A prompt is few large products, which XLA would compile anew for each bucket and run no faster on a CPU; a
        # step is many small operations, whose own cost XLA takes away.
        prefill = backend.resolve_jit("auto")
        self._start = backend.Compiled(self._prefill_and_choose, variables, prefill)
        self._advance = backend.CompiledLoop(State.over, self._next, variables)
        self._start_beams = backend.Compiled(self._prefill_beams, variables, prefill)
        self._advance_beams = backend.CompiledLoop(beams.Beams.over, self._next_beams, variables)

    @property
    def traces(self) -> int:
        """How often a function was traced, and so compiled or listed, for new shapes."""
        functions = (self._start, self._next_step, self._advance, self._start_beams, self._advance_beams)
        return sum(function.traces for function in functions)

    def generate(
        self, prompts, max_new_tokens, settings, stop_ids, seeds, context=(), chunk=None, finished=None
    ) -> Iterator:
        """Yields new token ids as they come: int32 (B, at most `chunk`), and rows done, bool (B,).

        Args:
            prompts: rows of token ids, none empty.
            max_new_tokens: at least 1.
            settings: `samplers.Settings`, as arrays.
            stop_ids: ids that end a row; they are yielded, what follows in the row is padding.
            seeds: of the uniform numbers that sampling takes, integers for each row.
            context: arrays with a row for each prompt, handed to `step`.
            chunk: tokens per yield; all at once unless given.
            finished: called after each chunk with the new ids so far (B, t) -> bool (B,), rows to stop.
        """
        tokens, mask, seen, total = self._prompt_arrays(prompts, max_new_tokens)
        stops = _filled_up(stop_ids)
        first = tokens.shape[1]
        uniforms = _uniforms(seeds, first, total - first)
        last = first + max_new_tokens
        state = self._start(tokens, mask, seen, context, settings, stops, uniforms[:, : mask.shape[1]])
        copies, shown = self._copies_when_asked(len(prompts), max_new_tokens), first

        def given(room):
            return copies(), context, settings, stops, uniforms[:, :room]

        while True:
            state = self._run(self._advance, state, min(shown + (chunk or max_new_tokens), last), total, given)
            column = int(state.column)
            written = ops.convert_to_numpy(state.tokens)[:, first:column]
            done = ops.convert_to_numpy(state.done)
            if finished is not None:
                done = np.logical_or(done, finished(written))
                state = state._replace(done=ops.convert_to_tensor(done))
            yield written[:, shown - first :], done
            shown = column
            if column == last or done.all():
                return

    def beam_search(
        self, prompts, max_new_tokens, num_beams, penalty, length_penalty, stop_ids, context=()
    ) -> list[list[int]]:
        """The best of `num_beams` continuations of each prompt, by log-probability / tokens ** `length_penalty`.

        Beam search as Transformers runs it with `early_stopping=False`. `context` has a row for each prompt,
        whatever the number of beams: `step` is then given n rows of tokens for each of its rows.
        """
        most = self.config.vocabulary_size // beams.width(1, len(stop_ids))
        if num_beams > most:
            hint = "A beam needs one token that goes on for each that stops."
            message = f"`num_beams` must be at most {most} with this vocabulary."
            raise invalid(message, hint, num_beams=num_beams, stop_tokens=len(stop_ids))
        tokens, mask, seen, total = self._prompt_arrays(prompts, max_new_tokens)
        first = tokens.shape[1]
        stops = np.array(sorted(stop_ids) or [-1], "int32")
        rules = beams.Rules(stops, np.float32(length_penalty), np.int32(first))
        options = (np.float32(penalty), rules)
        scores = np.zeros((len(prompts), num_beams), "float32")
        state = self._start_beams(tokens, mask, seen, context, scores, *options)
        copies = self._copies_when_asked(len(prompts) * num_beams, max_new_tokens)

        def given(_):
            return copies(), context, *options

        state = self._run(self._advance_beams, state, first + max_new_tokens, total, given)
        return beams.best(state, rules)

    def in_graph(self, prompts, mask, seen, max_new_tokens, settings, stop_ids, uniforms, context=()):
        """New token ids int32 (B, S - T) inside somebody's graph, where all sizes may be open.

        Args:
            prompts: int32 (B, T), padded on the left.
            mask: int32 (B, S), the prompts' and 0 for at least `max_new_tokens` behind them.
            seen: bool (B, V), tokens of the prompts, for the repetition penalty.
            max_new_tokens: most tokens to add; an integer or a scalar tensor.
            settings: `samplers.Settings` as arrays or tensors.
            stop_ids: ids that end a row; what follows them in a row is padding.
            uniforms: float32 (B, S), of the sampling.
            context: as in `generate`.
        """
        first = ops.shape(prompts)[1]
        sampling = (settings, ops.convert_to_tensor(np.array(sorted(stop_ids) or [-1], "int32")), uniforms)
        state = self._prefill_and_choose(prompts, mask, seen, context, *sampling)
        more = ops.cast(max_new_tokens - 1, "int32")
        return backend.repeat(State.over, self._next, state, more, {}, context, *sampling).tokens[:, first:]

    def _prompt_arrays(self, prompts, max_new_tokens):
        """Tokens (B, T), mask (B, S), seen (B, V), and the columns that all new tokens would need."""
        first = backend.bucket(max(len(prompt) for prompt in prompts))
        total = first + backend.bucket(max_new_tokens)
        tokens = np.zeros((len(prompts), first), "int32")
        mask = np.zeros((len(prompts), _room(first, total)), "int32")
        seen = np.zeros((len(prompts), self.config.vocabulary_size), bool)
        for i, prompt in enumerate(prompts):
            tokens[i, first - len(prompt) :] = prompt
            mask[i, first - len(prompt) : first] = 1
            seen[i, np.asarray(prompt)] = True
        return tokens, mask, seen, total

    def _copies_when_asked(self, rows, max_new_tokens):
        """A function that makes the copies of the kernels once: what the prompts alone give waits for none."""
        return functools.cache(lambda: self._kernels.make(rows, backend.bucket(max_new_tokens)))

    def _run(self, advance, state, end, total, given):
        """Steps until column `end`, or until the state is over; filled arrays grow, to `total` columns at most.

        `given` says what a step takes beside the state when there are so many columns.
        """
        while int(state.column) < end and not bool(state.over()):
            if int(state.column) == state.mask.shape[1]:
                state = state.grown(_room(state.mask.shape[1], total))
            room = state.mask.shape[1]
            state = advance(state, min(end, room) - int(state.column), *given(room))
        return state

    def _prefill(self, prompts, mask, context):
        """Logits of the first new token (B, V), and the cache, from prompts (B, T) and mask (B, S)."""
        rows, columns = ops.shape(mask)
        cache = kv_cache.make(self.config, rows, columns, self.dtype)
        return self.start(prompts, mask, cache, 0, *context)

    def _prefill_and_choose(self, prompts, mask, seen, context, settings, stops, uniforms):
        logits, cache = self._prefill(prompts, mask, context)
        rows, column = ops.shape(prompts)
        tokens = kv_cache.widened(prompts, ops.shape(mask)[1])
        done = ops.zeros((rows,), "bool")
        state = State(tokens, mask, cache, seen, done, ops.convert_to_tensor(column, "int32"))
        return self._write(state, logits, settings, stops, uniforms)

    def _step_by_copies(self, copies, *args):
        with self._kernels.used(copies):
            return self.step(*args)

    def _next(self, state, copies, context, settings, stops, uniforms):
        """One more token for each row."""
        last = backend.columns(state.tokens, state.column - 1, 1)
        logits, cache = self._next_step(copies, last, state.mask, state.cache, state.column - 1, *context)
        return self._write(state._replace(cache=cache), logits, settings, stops, uniforms)

    def _write(self, state, logits, settings, stops, uniforms):
        """Chooses the next tokens and writes them into their column; rows that are done get padding."""
        uniform = ops.squeeze(backend.columns(uniforms, state.column, 1), 1)
        ids = ops.where(state.done, 0, choose(logits, state.seen, settings, uniform))
        real = ops.cast(ops.logical_not(state.done), "int32")
        return State(
            tokens=backend.write(state.tokens, ids[:, None], state.column),
            mask=backend.write(state.mask, real[:, None], state.column),
            cache=state.cache,
            seen=backend.mark(state.seen, ids),
            done=ops.logical_or(state.done, ops.any(ids[:, None] == stops[None, :], axis=-1)),
            column=state.column + 1,
        )

    def _prefill_beams(self, prompts, mask, seen, context, scores, penalty, rules):
        """The beams' state with the first tokens, from `scores` of empty beams (B, n)."""
        logits, cache = self._prefill(prompts, mask, context)
        column = prompts.shape[1]
        tokens = kv_cache.widened(prompts, mask.shape[1])
        state = beams.begin(tokens, mask, cache, seen, ops.convert_to_tensor(column, "int32"), scores)
        # All beams of a prompt are alike so far: one of them is asked.
        found, ids = ops.top_k(self._log_probabilities(logits, seen, penalty), rules.width(scores.shape[1]))
        return beams.advance(state, state.cache, found, ids, rules)

    def _next_beams(self, state, copies, context, penalty, rules):
        """One more token for each beam: the best continuations over all beams of a prompt."""
        last = backend.columns(state.tokens, state.column - 1, 1)
        logits, cache = self._next_step(copies, last, state.mask, state.cache, state.column - 1, *context)
        total = self._log_probabilities(logits, state.seen, penalty) + ops.reshape(state.scores, (-1, 1))
        prompts, num_beams = state.scores.shape
        found, ids = ops.top_k(ops.reshape(total, (prompts, -1)), rules.width(num_beams))
        return beams.advance(state, cache, found, ids, rules)

    def _log_probabilities(self, logits, seen, penalty):
        return penalize(ops.log_softmax(logits, axis=-1), seen, penalty)


def _filled_up(stop_ids):
    """Stop ids int32, and -1 behind them up to a bucket: each number of them is one more program."""
    return np.array([*sorted(stop_ids), *[-1] * (backend.bucket(len(stop_ids)) - len(stop_ids))], "int32")


def _uniforms(seeds, first, count):
    """Numbers in [0, 1), float32 (B, first + count): a row's are those of its seed, whatever column they begin in."""
    # Drawn in float32: numbers of float64 next to 1 would be rounded to 1.
    drawn = [np.random.default_rng(seed).random(count, "float32") for seed in seeds]
    return np.pad(drawn, [[0, 0], [first, 0]])


def _room(filled, total):
    """Columns to have when `filled` of `total` are in use: twice these, or all where that is at most half as many more.

    A step reads all columns that there are, and each number of them is compiled.
    """
    room = max(_ROOM, 2 * filled)
    return room if total > room * 3 // 2 else total
