"""Compiled grammars at work: the state of each constrained sequence and the bitmask of its next token.

Imported in a thread when the first grammar arrives (numpy and llguidance with it). A `MatchState` belongs to one
thread at a time: to the one that prepares it, then to the step thread.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray

from app.core.types import EngineRequest, Grammar, SamplingParams
from app.grammar.compiler import compile_grammar
from app.grammar.errors import GrammarError, safe_message
from app.grammar.vocabulary import load_vocabulary

_MAX_THREADS = 8
_COMPILED = 64
"""Grammars kept ready for the next sequence that brings one of them."""


class MatchState:
    """Where one sequence stands in its grammar."""

    def __init__(
        self, matcher: LLMatcher, params: SamplingParams, *, ends: NDArray[np.int32], known: NDArray[np.int32]
    ) -> None:
        """(num_words,): the bits of the end-of-text ids, and of all ids that may be drawn without a grammar."""
        grammar = params.grammar
        assert grammar is not None
        self.matcher = matcher
        self.opened_by = grammar.opened_by
        """The token that begins reasoning in place of what the grammar asks for; None behind the first token."""
        self._after = grammar.after
        self.is_free = grammar.after is not None and grammar.opened_by is None
        """In reasoning, which ends with the token `after`: anything goes but an end of text."""
        self.free_mask = known & ~ends
        self.ends = ends
        """(num_words,): the bits of the end-of-text ids."""
        self.drops_ends = params.ignore_eos
        self.mask: NDArray[np.int32] | None = None
        """(num_words,), see `app.runner.base.Bitmask`; None until `compute_masks`, and again after each token."""
        self.is_end = False
        """Nothing may follow what is there."""
        self.error: str | None = None
        """Why the sequence cannot go on."""
        self.is_request_fault = False
        """With an error: the grammar itself brought it about."""

    @property
    def goes_on(self) -> bool:
        """A token can be drawn, as far as is known."""
        return self.error is None and not self.is_end

    def accept(self, token_ids: Sequence[int]) -> None:
        """Go on by drawn tokens; afterwards `is_end`, `error`, or a mask to compute."""
        self.mask = None
        with self.failing_alone():
            for token_id in self._behind_reasoning(token_ids):
                if not self.matcher.consume_token(token_id):
                    self.note_failure()
                    return
            self.is_end = not self.is_free and self.matcher.is_stopped()

    def allows(self, token_id: int) -> bool:
        """Whether the mask would have this token, and another than an end of text beside it.

        Without computing the mask, so False may also mean that only that would tell: ends of text, reasoning, failures.
        """
        if self.is_free or self.opened_by is not None or not has_bit(self.free_mask, token_id):
            return False  # the matcher fails for good where it is asked for a token that it does not know
        is_allowed = False
        with self.failing_alone():
            forced = self.matcher.compute_ff_tokens()  # where tokens are forced a mask has the first of them alone
            is_allowed = forced[0] == token_id if forced else self.matcher.validate_tokens([token_id]) == 1
        return is_allowed

    def only(self, token_id: int) -> NDArray[np.int32]:
        """(num_words,): a mask of this token alone."""
        mask = np.zeros_like(self.ends)
        mask.view(np.uint32)[token_id // 32] = 1 << token_id % 32
        return mask

    def take_over(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens that another engine drew. Raises GrammarError where they do not fit."""
        rest = self._behind_reasoning(token_ids)
        if self.matcher.try_consume_tokens(rest) != len(rest):
            raise GrammarError("the tokens handed over do not fit the grammar")
        self.is_end = not self.is_free and self.matcher.is_stopped() and not self.matcher.is_error()

    def _behind_reasoning(self, token_ids: Sequence[int]) -> list[int]:
        """Those of the tokens, which come next, that the grammar follows."""
        rest = list(token_ids)
        if rest and self.opened_by is not None:
            self.is_free = rest[0] == self.opened_by
            self.opened_by = None
        if self.is_free and self._after in rest:
            self.is_free = False
            return rest[rest.index(self._after) + 1 :]
        return [] if self.is_free else rest

    @contextmanager
    def failing_alone(self) -> Iterator[None]:
        """What the library raises inside ends this sequence and no other; its panics are no Exceptions."""
        try:
            yield
        except BaseException as error:
            self.error = f"the output cannot go on: the grammar's matcher failed ({type(error).__name__})"

    def note_failure(self) -> bool:
        """Whether the matcher has given up; `error` says why."""
        if self.matcher.is_error():
            reason = safe_message(self.matcher.get_error())
            self.error = f"the output cannot go on within the grammar's limits: {reason}"
            self.is_request_fault = True
        return self.error is not None


class MaskMaker:
    """Computes the masks of several states at once, on several cores where there are enough."""

    def __init__(self) -> None:
        num_threads = min(len(os.sched_getaffinity(0)) // 2, _MAX_THREADS)
        # With few cores a wait for another thread's turn is longer than its help.
        self._executor = LLExecutor(num_threads=num_threads) if num_threads > 1 else None

    def compute(self, states: Sequence[MatchState]) -> None:
        """Give each state its mask for the next token, or find that it is over. Releases the GIL."""
        for state in states:
            if state.is_free:
                state.mask = state.free_mask
        states = [state for state in states if not state.is_free]
        if not states:
            return
        ends = states[0].ends
        masks = np.zeros((len(states), len(ends)), dtype=np.int32)  # (num_states, num_words)
        self._fill(states, masks)
        # An end of text is drawn where something else could be too; else the sequence is over without it.
        others = masks & ~ends
        has_others = np.bitwise_or.reduce(others, axis=1).tolist()
        for index, state in enumerate(states):
            if state.error is None and not state.note_failure():
                state.is_end = not has_others[index]
                state.mask = others[index] if state.drops_ends else masks[index]
                if state.opened_by is not None:
                    word, bit = divmod(state.opened_by, 32)
                    state.mask.view(np.uint32)[word] |= np.uint32(1 << bit)

    def _fill(self, states: Sequence[MatchState], masks: NDArray[np.int32]) -> None:
        start, size = masks.ctypes.data, masks.strides[0]
        if self._executor is not None:
            matchers = [(state.matcher, index) for index, state in enumerate(states)]
            with suppress(BaseException):  # one of them failed: find out which, below
                self._executor.unsafe_compute_mask_ptr(matchers, start, size, len(states))
                return
        for index, state in enumerate(states):
            with state.failing_alone():
                state.matcher.unsafe_compute_mask_ptr(start + index * size, size)


class Matchers:
    """Makes states. Belongs to the thread that prepares sequences."""

    def __init__(self, model_dir: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._ends: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self._known: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._masks = MaskMaker()

    def prepare(self, request: EngineRequest) -> MatchState:
        """The state after the tokens that were handed over, its mask computed. Raises GrammarError."""
        params = request.params
        if params.grammar is None:
            raise ValueError(f"request {request.request_id!r} has no grammar")
        matcher = self._prototype(params.grammar).deep_copy()
        state = MatchState(matcher, params, ends=self._ends, known=self._known)
        state.take_over(request.output_token_ids)
        if state.goes_on:
            self._masks.compute([state])
        if state.error is not None:
            raise GrammarError(state.error)
        return state

    def _prototype(self, asked: Grammar) -> LLMatcher:
        grammar = Grammar(asked.kind, asked.source)
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = compile_grammar(grammar, self._load())
            compiled.compute_bitmask()  # its copies begin with what the lexer learns from it
            self._compiled[grammar] = compiled
            if len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return compiled

    def _load(self) -> LLTokenizer:
        if self._vocabulary is None:
            self._vocabulary = load_vocabulary(
                self._model_dir, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids
            )
            size = self._vocabulary.vocab_size
            self._ends, self._known = _bits((*self._vocabulary.eos_tokens,), size), _bits(range(size), size)
        return self._vocabulary


def has_bit(mask: NDArray[np.int32], token_id: int) -> bool:
    """Whether a mask lets a token through."""
    return bool(mask[token_id // 32] >> (token_id % 32) & 1)


def _bits(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    """(num_words,) with the bits of these ids set."""
    flags = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
