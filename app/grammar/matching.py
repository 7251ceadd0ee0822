"""Compiled grammars at work: the state of each constrained sequence and the bitmask of its next token.

Imported in a thread when the first grammar arrives (numpy and llguidance with it). A `MatchState` belongs to one
thread at a time: to the one that prepares it, then to the step thread, which lends it to the mask thread from
`Constraints.accept` to the next `Constraints.masks`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from app.core.types import EngineRequest, Grammar, SamplingParams
from app.grammar.compiler import compile_grammar
from app.grammar.errors import GrammarError, safe_message
from app.grammar.vocabulary import load_vocabulary

_COMPILED = 64
"""Grammars kept ready for the next sequence that brings one of them."""


class MatchState:
    """Where one sequence stands in its grammar. `compute_mask` has been called for the next token, or it is over."""

    def __init__(self, matcher: LLMatcher, params: SamplingParams, *, ends: NDArray[np.int32], num_words: int) -> None:
        self._matcher = matcher
        self._ends = ends
        self._drops_ends = params.ignore_eos
        self.mask: NDArray[np.int32] = np.zeros(num_words, dtype=np.int32)
        """(num_words,): see `app.runner.base.Bitmask`."""
        self.is_end = False
        """Nothing may follow what is there."""
        self.error: str | None = None
        """Why the sequence cannot go on."""

    @property
    def goes_on(self) -> bool:
        """A token can be drawn."""
        return self.error is None and not self.is_end

    def compute_mask(self) -> None:
        """Fill `mask` for the next token. Releases the GIL for most of it."""
        if self._matcher.is_stopped() and not self._matcher.is_error():
            self.is_end = True  # the tokens handed over were all of it
            return
        self._matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        if self._fails():
            return
        # An end of text is drawn where something else could be too; else the sequence is over without it.
        others = self.mask & ~self._ends
        self.is_end = not others.any()
        if self._drops_ends:
            self.mask = others

    def accept(self, token_ids: Sequence[int]) -> None:
        """Go on by drawn tokens; afterwards `is_end`, `error`, or a mask to compute."""
        for token_id in token_ids:
            if not self._matcher.consume_token(token_id):
                self._fails()
                return
        self.is_end = self._matcher.is_stopped()

    def _fails(self) -> bool:
        if self._matcher.is_error():
            reason = safe_message(self._matcher.get_error())
            self.error = f"the output cannot go on within the grammar's limits: {reason}"
            self.is_end = False
        return self.error is not None


class Matchers:
    """Makes states. Belongs to the thread that prepares sequences."""

    def __init__(self, model_dir: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._ends: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def prepare(self, request: EngineRequest) -> MatchState:
        """The state after the tokens that were handed over, its first mask computed. Raises GrammarError."""
        params = request.params
        if params.grammar is None:
            raise ValueError(f"request {request.request_id!r} has no grammar")
        matcher = self._prototype(params.grammar).deep_copy()
        output = list(request.output_token_ids)
        if matcher.try_consume_tokens(output) != len(output):
            raise GrammarError("the tokens handed over do not fit the grammar")
        state = MatchState(matcher, params, ends=self._ends, num_words=len(self._ends))
        state.compute_mask()
        if state.error is not None:
            raise GrammarError(state.error)
        return state

    def _prototype(self, grammar: Grammar) -> LLMatcher:
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
            self._ends = _bits((*self._vocabulary.eos_tokens,), self._vocabulary.vocab_size)
        return self._vocabulary


def _bits(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    """(num_words,) with the bits of these ids set."""
    flags = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
