"""The engine's side of grammars: prepares them off the step thread, hands masks to a step, follows its tokens.

Light until the first grammar: nothing is imported, loaded or started before. The step thread calls everything
here; a thread of its own compiles. Masks are computed when the forward pass has been started: on a device it is
still running then, on a CPU its cores are free again and share them.

Invariants: a sequence's state exists from `begin` until `forget`, through preemptions, and follows from its
grammar and its output tokens alone; a failure in it ends that sequence and no other.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.core.plan import PlanEntry, RowResult, StepPlan, StepResult
from app.core.types import EngineRequest
from app.grammar.errors import GrammarError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from app.grammar.matching import MaskMaker, Matchers, MatchState


PREPARATION_SECONDS = 30.0
"""With no grammar prepared for so long, the one in preparation ends: far longer than its limits let one take."""


class Prepared(msgspec.Struct, frozen=True):
    """A sequence's grammar is ready, or will never be."""

    request_id: str
    error: str | None
    """One sentence for the client; None: it is ready."""


class _Sequence:
    """What is known of one constrained sequence."""

    __slots__ = ("job", "request", "row", "state")

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.row = -1
        self.job: Future[None] | None = None
        """Prepares it."""
        self.state: MatchState | None = None
        """None while it is prepared."""


class Constraints:
    """Grammars of live sequences, by request id and by row."""

    def __init__(
        self,
        model_dir: Path,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        wake: Callable[[], None],
        note_preparing: Callable[[str | None], None],
        preparation_seconds: float = PREPARATION_SECONDS,
    ) -> None:
        """Both are called from another thread: `wake` when `take_prepared` has something to tell,
        `note_preparing` with the request id before a grammar is prepared and with None after it.
        """
        self._new_preparer = partial(
            _Preparer, model_dir, vocab_size=vocab_size, eos_token_ids=eos_token_ids, note=note_preparing
        )
        self._preparer = self._new_preparer()
        self._preparation_seconds = preparation_seconds
        self._prepared_at = 0.0
        """When a preparation last ended, or the first of those under way began."""
        self._wake = wake
        self._mask_maker: MaskMaker | None = None
        self._sequences: dict[str, _Sequence] = {}
        self._by_row: dict[int, _Sequence] = {}
        self._prepared: deque[tuple[_Sequence, MatchState | str]] = deque()

    @property
    def is_preparing(self) -> bool:
        """Some grammar is not ready yet."""
        return any(sequence.state is None for sequence in self._sequences.values())

    def begin(self, request: EngineRequest, *, wait: bool = False) -> None:
        """Compile the request's grammar and follow its output so far, in another thread; nothing without a grammar.

        `wait`: return when that is done.
        """
        if request.params.grammar is None:
            return
        if not self.is_preparing:
            self._prepared_at = time.monotonic()
        sequence = self._sequences[request.request_id] = _Sequence(request)
        job = self._submit(sequence)
        if wait:
            job.result()

    def take_prepared(self) -> list[Prepared]:
        """Those that became ready, or failed, since the last call; the failed ones are forgotten."""
        ready: list[Prepared] = []
        while self._prepared:
            self._prepared_at = time.monotonic()
            sequence, outcome = self._prepared.popleft()
            request_id = sequence.request.request_id
            if self._sequences.get(request_id) is not sequence or sequence.state is not None:
                continue  # aborted meanwhile, or prepared by two threads
            if isinstance(outcome, str):
                del self._sequences[request_id]
                ready.append(Prepared(request_id, outcome))
            else:
                sequence.state = outcome
                ready.append(Prepared(request_id, None))
        return ready + self._take_overdue()

    def forget(self, request_ids: Iterable[str]) -> None:
        """Their sequences have ended."""
        if not self._sequences:
            return
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is None:
                continue
            if sequence.job is not None:
                sequence.job.cancel()  # where it has not begun, nobody needs it any more
            if self._by_row.get(sequence.row) is sequence:
                del self._by_row[sequence.row]

    def masks(
        self, plan: StepPlan, guesses: Callable[[], Mapping[int, int]] = dict
    ) -> "Mapping[int, NDArray[np.int32]] | None":
        """By row, what each constrained sequence that draws in this step may draw. None: nobody is constrained.

        `guesses`: see `ModelRunner.guesses`; a row whose guess is allowed gets a mask of that token alone, at a
        twentieth of the cost. Called once for each plan, in order. A row that is over, or failed, may draw anything:
        `accept` drops it.
        """
        if not self._sequences:
            return None
        self._follow_rows(plan)
        if not self._by_row:
            return None
        states = {entry.row: state for entry in plan.entries if (state := self._state_of(entry)) is not None}
        unknown = {row: state for row, state in states.items() if state.goes_on and state.mask is None}
        guessed = {
            row: unknown[row].only(token_id)
            for row, token_id in (guesses() if unknown else {}).items()
            if row in unknown and unknown[row].allows(token_id)
        }
        self._compute([state for row, state in unknown.items() if row not in guessed and state.goes_on])
        known = {row: state.mask for row, state in states.items() if state.goes_on and state.mask is not None}
        return known | guessed

    def accept(self, plan: StepPlan, result: StepResult) -> StepResult:
        """Follow the drawn tokens; the result with the ends and the failures that the grammars bring."""
        if not self._by_row:
            return result
        rows = list(result.rows)
        for index, entry in enumerate(plan.entries):
            state = self._state_of(entry)
            if state is not None:
                rows[index] = _follow(state, rows[index])
        return msgspec.structs.replace(result, rows=tuple(rows))

    def _take_overdue(self) -> list[Prepared]:
        """Give up the one in preparation where nothing comes of it; those behind it begin anew in another thread."""
        now = time.monotonic()
        if not self.is_preparing or now - self._prepared_at < self._preparation_seconds:
            return []
        at_work = self._preparer.at_work
        if at_work is None or self._prepared:  # looked at in this order: what it is at is not what it was at
            return []
        self._preparer.abandon()
        self._preparer, self._prepared_at = self._new_preparer(), now
        overdue = [one.request.request_id for one in self._sequences.values() if one.request is at_work]
        self.forget(overdue)
        for sequence in self._sequences.values():
            if sequence.state is None:
                self._submit(sequence)
        error = f"the grammar could not be prepared within {self._preparation_seconds:g} s: send a simpler one"
        return [Prepared(request_id, error) for request_id in overdue]

    def _submit(self, sequence: _Sequence) -> "Future[None]":
        sequence.job = self._preparer.submit(sequence.request, lambda outcome: self._finish(sequence, outcome))
        return sequence.job

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

    def _compute(self, states: "list[MatchState]") -> None:
        if self._mask_maker is None:
            from app.grammar.matching import MaskMaker  # loaded already, by the thread that prepared the states

            self._mask_maker = MaskMaker()
        self._mask_maker.compute(states)

    def _state_of(self, entry: PlanEntry) -> "MatchState | None":
        """Of an entry that draws and is constrained."""
        sequence = self._by_row.get(entry.row) if entry.sample else None
        return None if sequence is None else sequence.state


class _Preparer:
    """The thread that compiles. What it needs is loaded there, with the first grammar."""

    def __init__(
        self, model_dir: Path, *, vocab_size: int, eos_token_ids: Sequence[int], note: Callable[[str | None], None]
    ) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._note = note
        self._is_abandoned = False
        self.at_work: EngineRequest | None = None
        """Whose grammar it prepares; also one whose sequence was forgotten."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile-grammar")
        self._matchers: Matchers | None = None

    def submit(self, request: EngineRequest, tell: "Callable[[MatchState | str], None]") -> "Future[None]":
        """Prepare a state and tell it, or the error, from the thread."""
        return self._thread.submit(self._run, request, tell)

    def abandon(self) -> None:
        """Begin no other preparation; the one under way is left to itself."""
        self._is_abandoned = True
        self._note(None)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, request: EngineRequest, tell: "Callable[[MatchState | str], None]") -> None:
        if self._is_abandoned:
            return
        self.at_work = request
        self._note(request.request_id)
        try:
            outcome: MatchState | str = self._load().prepare(request)
        except GrammarError as error:
            outcome = f"the grammar cannot be served: {error}"
        except BaseException as error:  # a panic of the library is no Exception
            outcome = f"the grammar could not be compiled: {type(error).__name__}"
        if not self._is_abandoned:  # another thread prepares now, and notes that
            self._note(None)
        tell(outcome)
        self.at_work = None

    def _load(self) -> "Matchers":
        if self._matchers is None:
            from app.grammar.matching import Matchers  # numpy and llguidance: not before they are needed

            self._matchers = Matchers(self._model_dir, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids)
        return self._matchers


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
        return RowResult(row.row, error=state.error, is_request_fault=state.is_request_fault)
    return msgspec.structs.replace(row, is_end=True) if state.is_end else row
