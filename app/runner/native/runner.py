"""The native tier as a ModelRunner: turns a plan into index arrays, makes a C call for the step and one for its draws.

Rule 2 of the design holds: the kernels fix each row's order of reduction by shape, the sampler looks at
one row, and neither sees who shares the step.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.core.plan import LogitsNeed, PlanEntry, RowResult, StepPlan, StepResult
from app.core.types import TokenLogprobs
from app.runner.base import Forward, RunnerInfo, StepMasks
from app.runner.native.draws import MOST_TOKENS, RowDraw, draw_rows
from app.runner.native.library import CStep, Library, address
from app.runner.native.model import BLOCK_SIZE, NativeModel
from app.runner.native.rows import Row, RowTable
from app.runner.sampling import RowError, score_prompt
from app.runner.sampling.logprobs import token_logprobs

_SCORE_ROWS = 32
"""Rows of logits that exist at once when a whole prompt is scored."""
_NOT_FINITE = "the model's logits are not finite; the sequence cannot go on"


@dataclass
class StepArrays:
    """The inputs of a step, and the outputs that its logits rows get."""

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    entry_starts: NDArray[np.int32]
    """(num_entries + 1,)"""
    block_tables: NDArray[np.int32]
    """(rows, blocks_per_row)"""
    table_starts: NDArray[np.int32]
    """(num_entries,): where an entry's row begins in the flat block tables."""

    def struct(self, wanted: "Wanted") -> CStep:
        """Pointers for one call; the arrays must outlive it."""
        return CStep(
            num_tokens=len(self.token_ids),
            num_entries=len(self.table_starts),
            num_logits=len(wanted.tokens),
            token_ids=address(self.token_ids),
            positions=address(self.positions),
            entry_starts=address(self.entry_starts),
            block_tables=address(self.block_tables),
            table_starts=address(self.table_starts),
            logits_tokens=address(wanted.tokens),
            logits_slots=address(wanted.slots),
            logits=address(wanted.logits),
            best_ids=address(wanted.best_ids),
            is_finite=address(wanted.is_finite),
        )


class Wanted:
    """Which tokens of a step need logits, and where they go."""

    def __init__(self, tokens: Sequence[int], slots: Sequence[int], stride: int) -> None:
        self.tokens = np.array(tokens, dtype=np.int32)
        self.slots = np.array(slots, dtype=np.int32)
        """Row of `logits` for each of `tokens`, or -1: only the best id is wanted."""
        self.logits = np.empty((int(self.slots.max(initial=-1)) + 1, stride), dtype=np.float32)
        self.best_ids = np.zeros(len(tokens), dtype=np.int32)
        self.is_finite = np.zeros(len(tokens), dtype=np.uint8)


@dataclass
class NativeForward:
    """A computed step: its arrays stay valid until the next forward."""

    arrays: StepArrays
    wanted: Wanted
    logits_rows: dict[int, int]
    """Entry index to row of `wanted`."""


class NativeRunner:
    """See the module. One thread calls it. The public attributes are for benchmarks and tests."""

    def __init__(
        self, library: Library, model: NativeModel, info: RunnerInfo, *, eos_token_ids: Sequence[int], num_threads: int
    ) -> None:
        self.library = library
        self.model = model
        self._info = info
        blocks_per_row = -(-info.max_model_len // BLOCK_SIZE)
        self.rows = RowTable(vocab_size=info.vocab_size, eos_token_ids=eos_token_ids, blocks_per_row=blocks_per_row + 1)
        self.context: int | None = library.open(num_threads)
        if not self.context:
            raise MemoryError("no memory for the native tier's threads")

    @property
    def info(self) -> RunnerInfo:
        """Fixed from load to exit."""
        return self._info

    def forward(self, plan: StepPlan) -> NativeForward:
        """Compute the plan; returns when it is done. See ModelRunner."""
        self.rows.begin(plan)
        self.model.pool.reach(plan.entries)
        arrays = self._gather(plan.entries)
        forward = self._ask(plan.entries, arrays)
        self._call(self.library.forward, arrays, forward.wanted)
        return forward

    def guesses(self, plan: StepPlan, forward: Forward) -> dict[int, int]:
        """The largest logits of greedy rows of which nothing but a grammar is asked."""
        assert isinstance(forward, NativeForward)
        wanted, guesses = forward.wanted, dict[int, int]()
        for index, at in forward.logits_rows.items():
            row = self.rows[plan.entries[index].row]
            if row.guesses_largest and wanted.is_finite[at]:
                guesses[plan.entries[index].row] = int(wanted.best_ids[at])
        return guesses

    def sample(self, plan: StepPlan, forward: Forward, masks: StepMasks | None = None) -> StepResult:
        """Draw the next tokens of the step that `forward` computed, which must be the last one."""
        assert isinstance(forward, NativeForward)
        by_row: StepMasks = {} if masks is None else masks
        drawn = self.draw_rows(plan.entries, forward, by_row)
        rows = tuple(
            self._sample_entry(index, entry, forward, by_row.get(entry.row), drawn.get(index))
            for index, entry in enumerate(plan.entries)
        )
        return StepResult(step_id=plan.step_id, rows=rows)

    def close(self) -> None:
        """End the threads and give back scratch memory."""
        if self.context:
            self.library.close(self.context)
            self.context = None

    def _gather(self, entries: Sequence[PlanEntry]) -> StepArrays:
        counts = np.array([len(entry.token_ids) for entry in entries], dtype=np.int32)
        entry_starts = np.zeros(len(entries) + 1, dtype=np.int32)
        np.cumsum(counts, out=entry_starts[1:])
        begins = np.array([entry.start for entry in entries], dtype=np.int32) - entry_starts[:-1]
        total = int(entry_starts[-1])
        tables = self.rows.block_tables
        return StepArrays(
            token_ids=np.fromiter((t for entry in entries for t in entry.token_ids), dtype=np.int32, count=total),
            positions=np.arange(total, dtype=np.int32) + np.repeat(begins, counts),
            entry_starts=entry_starts,
            block_tables=tables,
            table_starts=np.array([entry.row for entry in entries], dtype=np.int32) * np.int32(tables.shape[1]),
        )

    def _ask(self, entries: Sequence[PlanEntry], arrays: StepArrays) -> NativeForward:
        tokens: list[int] = []
        slots: list[int] = []
        logits_rows: dict[int, int] = {}
        num_slots = 0
        for index, entry in enumerate(entries):
            if entry.num_draft_tokens:
                raise ValueError(f"the native tier takes no draft tokens and got {entry.num_draft_tokens}")
            if not entry.sample:
                continue
            logits_rows[index] = len(tokens)
            tokens.append(int(arrays.entry_starts[index + 1]) - 1)
            needs_logits = not self.rows[entry.row].takes_largest(_next_position(entry))
            slots.append(num_slots if needs_logits else -1)
            num_slots += needs_logits
        return NativeForward(arrays, Wanted(tokens, slots, self.model.logits_stride), logits_rows)

    def _call(self, function: "ctypes._NamedFuncPointer", arrays: StepArrays, wanted: Wanted) -> None:
        step = arrays.struct(wanted)
        if function(self.context, self.model.reference, ctypes.byref(step)) < 0:
            raise MemoryError(f"no memory for a step of {len(arrays.token_ids)} tokens; lower --max-num-batched-tokens")

    def draw_rows(self, entries: Sequence[PlanEntry], forward: NativeForward, masks: StepMasks) -> dict[int, int]:
        """Tokens by entry, of all rows whose logits were asked for, in one C call; what it cannot draw is left out."""
        wanted, stride = forward.wanted, self.model.logits_stride * 4
        begin, slots, best_ids = wanted.logits.ctypes.data, wanted.slots.tolist(), wanted.best_ids.tolist()
        draws: dict[int, RowDraw] = {}
        for index, at in forward.logits_rows.items():
            entry = entries[index]
            row = self.rows[entry.row]
            if slots[at] < 0 or not wanted.is_finite[at] or row.sampler.refusal is not None:
                continue
            mask = masks.get(entry.row)
            row.draw.aim(begin + slots[at] * stride, _next_position(entry), best_id=best_ids[at], mask=mask)
            draws[index] = row.draw
        if draws and self._info.vocab_size <= MOST_TOKENS:
            draw_rows(self.library, self.context, self._info.vocab_size, list(draws.values()))
            return {index: draw.token_id for index, draw in draws.items() if draw.token_id is not None}
        return {}

    def _sample_entry(
        self, index: int, entry: PlanEntry, forward: NativeForward, mask: NDArray[np.int32] | None, drawn: int | None
    ) -> RowResult:
        row = self.rows[entry.row]
        try:
            scored = self._score(index, entry, row, forward) if entry.logits is LogitsNeed.ALL else ()
            if not entry.sample:
                return RowResult(row=entry.row, prompt_logprobs=scored)
            token_id, logprobs = self._draw(index, entry, forward, mask, drawn)
        except RowError as error:
            return RowResult(row=entry.row, error=str(error), is_request_fault=error.is_request_fault)
        return RowResult(
            row=entry.row,
            token_ids=(token_id,),
            logprobs=() if logprobs is None else (logprobs,),
            prompt_logprobs=scored,
        )

    def _draw(
        self, index: int, entry: PlanEntry, forward: NativeForward, mask: NDArray[np.int32] | None, drawn: int | None
    ) -> tuple[int, TokenLogprobs | None]:
        row = self.rows[entry.row]
        wanted, at = forward.wanted, forward.logits_rows[index]
        if not wanted.is_finite[at]:
            raise RowError(_NOT_FINITE)
        if wanted.slots[at] < 0:
            token_id = int(wanted.best_ids[at])
            row.sampler.observe(token_id)
            return token_id, None
        logits = wanted.logits[wanted.slots[at], : self._info.vocab_size]
        if drawn is None:  # numpy draws, or says why nothing can be drawn
            return row.sampler.sample_row(logits, _next_position(entry), mask=mask)
        row.sampler.observe(drawn)
        num_logprobs = row.params.num_logprobs
        return drawn, None if num_logprobs is None else token_logprobs(logits, drawn, num_logprobs)

    def _score(self, index: int, entry: PlanEntry, row: Row, forward: NativeForward) -> tuple[TokenLogprobs, ...]:
        """Logprobs of the prompt positions start + 1 .. end, a few rows of logits at a time."""
        end = min(entry.start + len(entry.token_ids), len(row.prompt_token_ids) - 1)
        following = row.prompt_token_ids[entry.start + 1 : end + 1]
        num_top = row.params.num_prompt_logprobs or 0
        scored: list[TokenLogprobs] = []
        for logits in self.position_logits(forward, index, len(following)):
            part = following[len(scored) : len(scored) + len(logits)]
            scored.extend(score_prompt(logits, part, num_top))
        return tuple(scored)

    def position_logits(self, forward: NativeForward, index: int, count: int) -> Iterator[NDArray[np.float32]]:
        """Logits (a few rows, vocab_size) at the first `count` positions of an entry of the step computed last."""
        first = int(forward.arrays.entry_starts[index])
        for begin in range(first, first + count, _SCORE_ROWS):
            tokens = range(begin, min(begin + _SCORE_ROWS, first + count))
            wanted = Wanted(tokens, range(len(tokens)), self.model.logits_stride)
            self._call(self.library.score, forward.arrays, wanted)
            yield wanted.logits[:, : self._info.vocab_size]


def _next_position(entry: PlanEntry) -> int:
    """Where the token that an entry draws will stand."""
    return entry.start + len(entry.token_ids)
