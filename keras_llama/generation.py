"""The token loop: prefill, steps, stop set, streaming, beams. It sees token ids only.

Shapes: B batch, T prompt length, S columns of the cache, V vocabulary, n beams.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_llama import backend
from keras_llama import cache as kv_cache
from keras_llama.beams import Beams
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
        self._advance = backend.CompiledLoop(_ended, self._next, variables)
        self._prefill_beams = backend.Compiled(self._expand_prompts, variables, prefill)
        self._step_beams = backend.Compiled(self._expand_beams, variables, True, donate=(0,))

    @property
    def traces(self) -> int:
        """How often a function was traced, and so compiled or listed, for new shapes."""
        functions = (self._start, self._next_step, self._advance, self._prefill_beams, self._step_beams)
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
        copies, shown, column = None, first, first + 1
        while True:
            end = min(shown + (chunk or max_new_tokens), last)
            # The first token is there already, and waits for no copies and no compilation; it may have ended all rows.
            if end > column and not bool(ops.all(state.done)):
                copies = self._kernels.make(len(prompts), backend.bucket(max_new_tokens)) if copies is None else copies
                state = self._run(state, end, copies, context, settings, stops, uniforms)
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
        most = self.config.vocabulary_size // _width(1, len(stop_ids))
        if num_beams > most:
            hint = "A beam needs one token that goes on for each that stops."
            given = {"num_beams": num_beams, "stop_tokens": len(stop_ids)}
            raise invalid(f"`num_beams` must be at most {most} with this vocabulary.", hint, **given)
        tokens, mask, seen, total = self._prompt_arrays(prompts, max_new_tokens)
        first = tokens.shape[1]
        search = Beams(len(prompts), num_beams, length_penalty, sorted(stop_ids), self.config.vocabulary_size)
        options = (np.float32(penalty), np.array(search.stop_ids or [-1], "int32"))
        cache, *found = self._prefill_beams(tokens, mask, seen, context, search.scores, *options)
        mask, seen = (np.repeat(x, num_beams, axis=0) for x in (mask, seen))
        copies = self._kernels.make(len(mask), backend.bucket(max_new_tokens))
        for column in range(first, first + max_new_tokens):
            rows = search.update(*(ops.convert_to_numpy(x) for x in found))
            if search.settled() or column == first + max_new_tokens - 1:
                break
            if column == mask.shape[1]:
                room = _room(column, total)
                cache, mask = kv_cache.grow(cache, room), np.pad(mask, [[0, 0], [0, room - column]])
            ids, seen = search.last_ids(), seen[rows]
            mask[:, column] = 1
            seen[np.arange(len(rows)), ids] = True
            cache, *found = self._step_beams(
                cache, rows, ids[:, None], mask, np.int32(column), seen, copies, context, search.scores, *options
            )
        return search.best()

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
        return backend.repeat(_ended, self._next, state, more, {}, context, *sampling).tokens[:, first:]

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

    def _run(self, state, end, copies, context, settings, stops, uniforms):
        """Steps until column `end`, or until all rows are done; filled arrays grow. `uniforms` has all columns."""
        while True:
            room = state.mask.shape[1]
            reach = min(end, room)
            sampling = (settings, stops, uniforms[:, :room])
            state = self._advance(state, reach - int(state.column), copies, context, *sampling)
            if reach == end or bool(ops.all(state.done)):
                return state
            state = _grown(state, _room(room, uniforms.shape[1]))

    def _prefill(self, prompts, mask, context):
        """Logits of the first new token (B, V), and the cache, from prompts (B, T) and mask (B, S)."""
        rows, columns = ops.shape(mask)
        cache = kv_cache.make(self.config, rows, columns, self.dtype)
        return self.start(prompts, mask, cache, 0, *context)

    def _prefill_and_choose(self, prompts, mask, seen, context, settings, stops, uniforms):
        logits, cache = self._prefill(prompts, mask, context)
        rows, column = ops.shape(prompts)
        tokens = ops.pad(prompts, [[0, 0], [0, ops.shape(mask)[1] - column]])
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

    def _expand_prompts(self, prompts, mask, seen, context, scores, penalty, stops):
        """Cache of every beam, and the best first tokens: log-probabilities and ids (B, width)."""
        logits, cache = self._prefill(prompts, mask, context)
        rows, num_beams = scores.shape
        found, ids = ops.top_k(self._log_probabilities(logits, seen, penalty), _width(num_beams, stops.shape[0]))
        return kv_cache.reorder(cache, ops.repeat(ops.arange(rows, dtype="int32"), num_beams)), found, ids

    def _expand_beams(self, cache, rows, last, mask, column, seen, copies, context, scores, penalty, stops):
        """Cache of the chosen rows, and the best continuations over all beams of a prompt (B, width)."""
        logits, cache = self._next_step(copies, last, mask, kv_cache.reorder(cache, rows), column, *context)
        total = self._log_probabilities(logits, seen, penalty) + ops.reshape(scores, (-1, 1))
        prompts, num_beams = scores.shape
        found, ids = ops.top_k(ops.reshape(total, (prompts, -1)), _width(num_beams, stops.shape[0]))
        return cache, found, ids

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


def _grown(state, columns):
    """The state with empty columns behind its own."""
    tokens, mask = (ops.pad(x, [[0, 0], [0, columns - x.shape[1]]]) for x in (state.tokens, state.mask))
    return state._replace(tokens=tokens, mask=mask, cache=kv_cache.grow(state.cache, columns))


def _ended(state):
    """Whether every row has met a stop token, bool ()."""
    return ops.all(state.done)


def _width(num_beams, stops):
    """How many continuations to look at: enough that `num_beams` of them do not stop."""
    return max(2, 1 + stops) * num_beams
