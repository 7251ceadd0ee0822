"""The runner protocol over an Executor: rows, their samplers, results.

On a CPU the numpy sampler draws, row by row; on a device all rows are drawn there, in batches of static sizes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from app.core.plan import LogitsNeed, PlanEntry, RowResult, RowStart, StepPlan, StepResult
from app.core.types import TokenLogprobs
from app.runner.base import Forward, RunnerInfo, StepMasks
from app.runner.sampling import RowError, RowSampler, score_prompt
from app.runner.torch.executor import Executor, StepLogits
from app.runner.torch.sampling.batch import DeviceSampler, Drawn, DrawRequest
from app.runner.torch.sizes import passes

_SCORE_ROWS = 64
"""Rows of float32 logits that scoring a prompt holds at once."""


@dataclass
class _Row:
    start: RowStart
    sampler: RowSampler


class TorchRunner:
    """A transformers model behind `app.runner.base.ModelRunner`."""

    def __init__(
        self,
        executor: Executor,
        *,
        info: RunnerInfo,
        eos_token_ids: tuple[int, ...],
        sampler: DeviceSampler | None = None,
    ) -> None:
        """Without a `sampler` the definition draws, in numpy."""
        self._executor: Executor | None = executor
        self._sampler = sampler
        self._info = info
        self._eos_token_ids = eos_token_ids
        self._rows: dict[int, _Row] = {}

    @property
    def info(self) -> RunnerInfo:
        """Fixed from load to exit."""
        return self._info

    def forward(self, plan: StepPlan) -> Forward:
        """See `ModelRunner.forward`."""
        if self._executor is None:
            raise RuntimeError("the runner is closed")
        for row in plan.released_rows:
            self._rows.pop(row, None)
        for entry in plan.entries:
            if entry.start_row is not None:
                sampler = RowSampler(entry.start_row, self._info.vocab_size, self._eos_token_ids)
                self._rows[entry.row] = _Row(entry.start_row, sampler)
        return self._executor.run(plan)

    def guesses(self, plan: StepPlan, forward: Forward) -> dict[int, int]:
        """None: a device is still computing."""
        return {}

    def sample(self, plan: StepPlan, forward: Forward, masks: StepMasks | None = None) -> StepResult:
        """See `ModelRunner.sample`."""
        assert isinstance(forward, StepLogits)
        drawn = self._draw(plan, forward, {} if masks is None else masks)
        rows = (
            self._result(entry, forward, span, drawn.get(entry.row))
            for entry, span in zip(plan.entries, forward.spans, strict=True)
        )
        return StepResult(plan.step_id, tuple(rows))

    def close(self) -> None:
        """Drop the model and the KV pool."""
        self._executor = None
        self._rows.clear()

    def _draw(self, plan: StepPlan, forward: StepLogits, masks: StepMasks) -> dict[int, Drawn]:
        """The next token of each row that the plan samples."""
        sampled = [
            (entry, span.stop - 1) for entry, span in zip(plan.entries, forward.spans, strict=True) if entry.sample
        ]
        if not sampled:
            return {}
        requests = [
            DrawRequest(self._rows[entry.row].sampler, entry.start + len(entry.token_ids), masks.get(entry.row))
            for entry, _ in sampled
        ]
        drawn = self._draw_rows(forward, [last for _, last in sampled], requests)
        return {entry.row: one for (entry, _), one in zip(sampled, drawn, strict=True)}

    def _draw_rows(self, forward: StepLogits, last: list[int], requests: list[DrawRequest]) -> list[Drawn]:
        """A draw for each of the rows `last` of the logits."""
        device = forward.states.device
        if self._sampler is None:
            return _draw_in_numpy(forward.rows(torch.tensor(last, device=device)).numpy(), requests)
        drawn: list[Drawn] = []
        for part, size in passes(len(last), self._sampler.sizes):
            padded = last[part] + last[:1] * (size - (part.stop - part.start))
            drawn += self._sampler.draw(forward.rows(torch.tensor(padded, device=device)), requests[part])
        return drawn

    def _result(self, entry: PlanEntry, forward: StepLogits, span: slice, drawn: Drawn | None) -> RowResult:
        if drawn is not None and drawn.error is not None:
            return RowResult(entry.row, error=drawn.error, is_request_fault=drawn.is_request_fault)
        try:
            prompt_logprobs = self._score(entry, forward, span.start)
        except RowError as error:
            return RowResult(entry.row, error=str(error))
        if drawn is None:
            return RowResult(entry.row, prompt_logprobs=prompt_logprobs)
        logprobs = () if drawn.logprobs is None else (drawn.logprobs,)
        return RowResult(entry.row, (drawn.token_id,), logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _score(self, entry: PlanEntry, forward: StepLogits, first_row: int) -> tuple[TokenLogprobs, ...]:
        """Prompt logprobs of the positions after the entry's first, as far as they are in the prompt."""
        start = self._rows[entry.row].start
        num_top = start.params.num_prompt_logprobs
        if entry.logits is not LogitsNeed.ALL or num_top is None:
            return ()
        next_ids = start.prompt_token_ids[entry.start + 1 : entry.start + len(entry.token_ids) + 1]
        scored: list[TokenLogprobs] = []
        for first in range(0, len(next_ids), _SCORE_ROWS):
            ids = next_ids[first : first + _SCORE_ROWS]
            logits = forward.rows(slice(first_row + first, first_row + first + len(ids)))
            scored.extend(score_prompt(logits.cpu().numpy(), ids, num_top))
        return tuple(scored)


def _draw_in_numpy(logits: NDArray[np.float32], requests: list[DrawRequest]) -> list[Drawn]:
    """Row by row, by the definition. `logits` is (num_rows, vocab_size)."""
    drawn = []
    for row, request in zip(logits, requests, strict=True):
        try:
            drawn.append(Drawn(*request.sampler.sample_row(row, request.position, mask=request.mask)))
        except RowError as error:
            drawn.append(Drawn(error=str(error), is_request_fault=error.is_request_fault))
    return drawn
