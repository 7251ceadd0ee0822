"""The engine's side of grammars: prepares them off the step thread, hands masks to a step, follows its tokens.

Light until the first grammar: nothing is imported, loaded or started before. The step thread calls everything
here. Two threads work for it: one compiles, one computes the masks of the next step while this one's result is
sent and the next forward pass runs.

Invariants: a sequence's state exists from `begin` until `forget`, through preemptions, and follows from its
grammar and its output tokens alone; a failure in it ends that sequence and no other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.core.plan import PlanEntry, RowResult, StepPlan, StepResult
from app.core.types import EngineRequest
from app.grammar.errors import GrammarError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from app.grammar.matching import Matchers, MatchState


class Prepared(msgspec.Struct, frozen=True):
    """A sequence's grammar is ready, or will never be."""

    request_id: str
    error: str | None
    """One sentence for the client; None: it is ready."""


class _Sequence:
    """What is known of one constrained sequence."""

    __slots__ = ("request", "row", "state")

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.row = -1
        self.state: MatchState | None = None
        """None while it is prepared."""


class Constraints:
    """Grammars of live sequences, by request id and by row."""

    def __init__(
        self, model_dir: Path, *, vocab_size: int, eos_token_ids: Sequence[int], wake: Callable[[], None]
    ) -> None:
        """`wake` is called, from another thread, when `take_prepared` has something to tell."""
        self._preparer = _Preparer(model_dir, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._wake = wake
        self._masker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-masks")
        self._masking: Future[None] | None = None
        self._sequences: dict[str, _Sequence] = {}
        self._by_row: dict[int, _Sequence] = {}
        self._prepared: deque[tuple[_Sequence, MatchState | str]] = deque()

    def begin(self, request: EngineRequest) -> None:
        """Compile the request's grammar and follow its output so far, in another thread; nothing without a grammar."""
        if request.params.grammar is None:
            return
        sequence = self._sequences[request.request_id] = _Sequence(request)
        self._preparer.submit(request, lambda outcome: self._finish(sequence, outcome))

    def take_prepared(self) -> list[Prepared]:
        """Those that became ready, or failed, since the last call; the failed ones are forgotten."""
        ready: list[Prepared] = []
        while self._prepared:
            sequence, outcome = self._prepared.popleft()
            request_id = sequence.request.request_id
            if self._sequences.get(request_id) is not sequence:
                continue  # aborted meanwhile
            if isinstance(outcome, str):
                del self._sequences[request_id]
                ready.append(Prepared(request_id, outcome))
            else:
                sequence.state = outcome
                ready.append(Prepared(request_id, None))
        return ready

    def forget(self, request_ids: Iterable[str]) -> None:
        """Their sequences have ended."""
        if not self._sequences:
            return
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None and self._by_row.get(sequence.row) is sequence:
                del self._by_row[sequence.row]

    def masks(self, plan: StepPlan) -> "Mapping[int, NDArray[np.int32]] | None":
        """By row, what each constrained sequence that draws in this step may draw. None: nobody is constrained.

        Called once for each plan, in order. A row that is over, or failed, may draw anything: `accept` drops it.
        """
        if not self._sequences:
            return None
        self._follow_rows(plan)
        if not self._by_row:
            return None
        self._collect()
        states = ((entry.row, self._state_of(entry)) for entry in plan.entries)
        return {row: state.mask for row, state in states if state is not None and state.goes_on}

    def accept(self, plan: StepPlan, result: StepResult) -> StepResult:
        """Follow the drawn tokens; the result with the ends and the failures that the grammars bring."""
        if not self._by_row:
            return result
        rows = list(result.rows)
        going_on: list[MatchState] = []
        for index, entry in enumerate(plan.entries):
            state = self._state_of(entry)
            if state is not None:
                rows[index] = _follow(state, rows[index])
                if state.goes_on:
                    going_on.append(state)
        if going_on:
            self._masking = self._masker.submit(_compute_masks, going_on)
        return msgspec.structs.replace(result, rows=tuple(rows))

    def _finish(self, sequence: _Sequence, outcome: "MatchState | str") -> None:
        """Called in the preparing thread."""
        self._prepared.append((sequence, outcome))
        self._wake()

    def _follow_rows(self, plan: StepPlan) -> None:
        for row in plan.released_rows:
            self._by_row.pop(row, None)
        for entry in plan.entries:
            if entry.start_row is not None and (sequence := self._sequences.get(entry.start_row.request_id)):
                sequence.row = entry.row
                self._by_row[entry.row] = sequence

    def _collect(self) -> None:
        if self._masking is not None:
            self._masking.result()
            self._masking = None

    def _state_of(self, entry: PlanEntry) -> "MatchState | None":
        """Of an entry that draws and is constrained."""
        sequence = self._by_row.get(entry.row) if entry.sample else None
        return None if sequence is None else sequence.state


class _Preparer:
    """The thread that compiles. What it needs is loaded there, with the first grammar."""

    def __init__(self, model_dir: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile-grammar")
        self._matchers: Matchers | None = None

    def submit(self, request: EngineRequest, tell: "Callable[[MatchState | str], None]") -> None:
        """Prepare a state and tell it, or the error, from the thread."""
        self._thread.submit(self._run, request, tell)

    def _run(self, request: EngineRequest, tell: "Callable[[MatchState | str], None]") -> None:
        try:
            outcome: MatchState | str = self._load().prepare(request)
        except GrammarError as error:
            outcome = f"the grammar cannot be served: {error}"
        except BaseException as error:  # a panic of the library is no Exception
            outcome = f"the grammar could not be compiled: {type(error).__name__}"
        tell(outcome)

    def _load(self) -> "Matchers":
        if self._matchers is None:
            from app.grammar.matching import Matchers  # numpy and llguidance: not before they are needed

            self._matchers = Matchers(self._model_dir, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids)
        return self._matchers


def _compute_masks(states: "Sequence[MatchState]") -> None:
    for state in states:
        state.compute_mask()


def _follow(state: "MatchState", row: RowResult) -> RowResult:
    """The row's result, with what the grammar makes of it."""
    if state.goes_on:
        if row.error is None:
            state.accept(row.token_ids)
        return _conclude(state, row)
    # It was found out while the mask was computed: what was drawn has no place any more.
    return _conclude(state, RowResult(row.row, prompt_logprobs=row.prompt_logprobs))


def _conclude(state: "MatchState", row: RowResult) -> RowResult:
    if state.error is not None:
        return RowResult(row.row, error=state.error)
    return msgspec.structs.replace(row, is_end=True) if state.is_end else row
