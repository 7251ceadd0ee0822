"""Decides what each step computes, and keeps the account of every live sequence.

One idea: each sequence has `num_computed_tokens` chasing `len(token_ids)`. A step hands one token budget
first to running sequences, in the order in which they were admitted, then to waiting ones. That is
chunked prefill, decode, prefix-cache hits and preemption by recompute; there are no modes.

Invariants:
- a sequence is in exactly one place: the waiting queue, the queue of those on probation, one of the two
  gates, or the running list;
- the oldest running sequence is never preempted, and its context fits the pool, so each step makes progress;
- blocks and row of a sequence in a step that has not come back are given to nobody else, aborted or not;
- every sequence is answered with exactly one finish reason, unless it is aborted.
"""

from collections import Counter
from collections.abc import Iterable

import msgspec

from app.core.plan import PlanEntry, RowResult, StepPlan, StepResult
from app.core.types import EngineOutput, EngineRequest, FinishReason
from app.kv.manager import KVManager, PrefixMatch
from app.kv.record import BlockRecord
from app.scheduler.config import SchedulerConfig
from app.scheduler.finish import Finish, FinishRules
from app.scheduler.gates import PrefixGate, PreparationGate, num_common_blocks
from app.scheduler.probation import Probation, num_lone_tokens
from app.scheduler.queue import WaitingQueue
from app.scheduler.rows import Rows
from app.scheduler.sequence import Sequence
from app.scheduler.shares import Shares
from app.scheduler.step import Step

ROW_SHARE = 4
"""Times the rows that are left free, at most so many has a tenant with a name (`app.api.admission` says why)."""


class SchedulerCounts(msgspec.Struct, frozen=True):
    """The scheduler's share of `StepStats`. Totals count from its construction."""

    num_running: int
    num_waiting: int
    num_kv_blocks_used: int
    """Blocks that sequences hold; free blocks that can still be found by hash are not among them."""
    total_preemptions: int
    total_prefix_query_tokens: int
    """Tokens of sequences at their first admission, as far as they may come from the cache."""
    total_prefix_hit_tokens: int
    num_kv_blocks_shared: int
    """Those of the held blocks that several sequences hold."""
    num_kv_blocks_cached: int
    """Free blocks that can still be found by hash."""


class Scheduler:
    """The loop is: `add` and `abort` as they come, `schedule`, run the plan, `apply` its result.

    Further plans may be asked for before results are applied: sequences in such steps are passed over
    until theirs has come back. Times are passed in, in seconds of one clock.
    """

    def __init__(self, config: SchedulerConfig, *, record: BlockRecord | None = None) -> None:
        """`record` names the blocks that an earlier engine computed; see BlockRecord."""
        self._config = config
        self._kv = KVManager(
            config.num_kv_blocks,
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            record=record,
        )
        self._shares = Shares(config.max_num_batched_tokens)
        self._queue = WaitingQueue(self._shares)
        self._probation = Probation()
        self._gate = PrefixGate()
        self._preparation = PreparationGate()
        self._rows = Rows(config.max_num_seqs)
        self._running: list[Sequence] = []
        self._num_rows_of: Counter[str] = Counter()
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: dict[int, list[Sequence]] = {}
        self._num_added = 0
        self._num_steps = 0
        self._total_preemptions = 0
        self._total_prefix_query_tokens = 0
        self._total_prefix_hit_tokens = 0

    @property
    def num_adopted_blocks(self) -> int:
        """Blocks that it found computed at its construction."""
        return self._kv.pool.num_adopted

    @property
    def has_work(self) -> bool:
        """Whether any sequence is live."""
        return bool(self._sequences)

    @property
    def has_suspects(self) -> bool:
        """Whether any live sequence is on probation."""
        return any(sequence.is_on_probation for sequence in self._sequences.values())

    def counts(self) -> SchedulerCounts:
        """Where things stand now."""
        return SchedulerCounts(
            num_running=len(self._running),
            num_waiting=len(self._queue) + len(self._probation) + len(self._gate) + len(self._preparation),
            num_kv_blocks_used=self._kv.pool.num_held,
            total_preemptions=self._total_preemptions,
            total_prefix_query_tokens=self._total_prefix_query_tokens,
            total_prefix_hit_tokens=self._total_prefix_hit_tokens,
            num_kv_blocks_shared=self._kv.pool.num_shared,
            num_kv_blocks_cached=self._kv.pool.num_cached,
        )

    def add(self, request: EngineRequest, now: float) -> EngineOutput | None:
        """Take a sequence in. Returns its last output where it ends at once: refused, or over when handed over.

        One with a grammar waits until `admit_prepared`, or ends by `refuse_prepared`.
        """
        if refusal := self._refusal(request):
            return EngineOutput(request.request_id, finish_reason=FinishReason.ERROR, error=refusal)
        rules = FinishRules(
            request,
            eos_token_ids=self._config.eos_token_ids,
            max_sequence_len=self._config.max_sequence_len,
        )
        blocks = self._kv.new_table(request.cache_salt)
        sequence = Sequence(request, arrival=self._num_added, added_at=now, rules=rules, blocks=blocks)
        if request.output_token_ids and (finish := rules.check(sequence.token_ids)):
            return EngineOutput(request.request_id, finish_reason=finish.reason, stop_token_id=finish.stop_token_id)
        self._num_added += 1
        self._sequences[request.request_id] = sequence
        self._shares.forget_some(live.request.tenant for live in self._sequences.values())
        if self._preparation.concerns(request):
            self._preparation.hold(sequence)
        else:
            self._requeue([sequence])
        return None

    def admit_prepared(self, request_id: str) -> None:
        """What this sequence waited for is ready; nothing happens where it is gone."""
        if sequence := self._preparation.let_go(request_id):
            self._requeue([sequence])

    def refuse_prepared(self, request_id: str, message: str) -> EngineOutput | None:
        """What this sequence waited for cannot be made: its last output, or None where it is gone."""
        sequence = self._preparation.let_go(request_id)
        if sequence is None:
            return None
        del self._sequences[request_id]
        return _failure(sequence, message)

    def abort(self, request_ids: Iterable[str]) -> int:
        """Drop sequences without an answer; returns how many of them were live."""
        num_dropped = 0
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                self._drop(sequence)
                num_dropped += 1
        return num_dropped

    def schedule(self, now: float) -> StepPlan | None:
        """The next step's work, or None where there is nothing to compute now."""
        step = Step(self._budget())
        self._shares.begin_step(now, self._queue.tenants)
        for is_lone in self._probation.turns():
            if is_lone:
                self._continue_trial(step, now)
            else:
                self._continue_others(step, now)
            if step.entries:
                self._probation.note_step(is_lone=is_lone)
                break
        else:
            return None
        self._num_steps += 1
        self._in_flight[self._num_steps] = step.sequences
        return StepPlan(self._num_steps, tuple(step.entries), self._rows.pop_released())

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> tuple[EngineOutput, ...]:
        """Take a step's result in. Raises ValueError where it is not the result of a plan in flight."""
        sequences = self._take_in_flight(plan, result)
        outputs = []
        for sequence, entry, row in zip(sequences, plan.entries, result.rows, strict=True):
            sequence.is_in_flight = False
            if sequence.is_aborted:
                self._release(sequence)
            elif output := self._apply_row(sequence, entry, row):
                outputs.append(output)
                if output.finish_reason is not None:
                    self._end(sequence)
        return tuple(outputs)

    # Adding and aborting

    def _refusal(self, request: EngineRequest) -> str | None:
        """Why a request cannot run at all. The API process checks before; this keeps the engine whole."""
        if request.request_id in self._sequences:
            return f"request id {request.request_id!r} is in use by a live sequence: use a new one"
        if not request.prompt_token_ids:
            return "the prompt has no tokens: give at least one"
        highest = max(max(request.prompt_token_ids), max(request.output_token_ids, default=0))
        lowest = min(min(request.prompt_token_ids), min(request.output_token_ids, default=0))
        if lowest < 0 or highest >= self._config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            return f"token id {wrong} is outside the vocabulary: use 0 to {self._config.vocab_size - 1}"
        num_needed = len(request.prompt_token_ids) + min(request.params.max_tokens, 1)
        if num_needed > self._config.max_sequence_len:
            return (
                f"the prompt has {len(request.prompt_token_ids)} tokens and the context holds "
                f"{self._config.max_sequence_len}, the first new token included: shorten the prompt"
            )
        return None

    def _drop(self, sequence: Sequence) -> None:
        sequence.is_aborted = True
        if self._preparation.let_go(sequence.request_id):
            return
        if self._queue_of(sequence).discard(sequence) or self._gate.discard(sequence):
            return
        self._stop_running(sequence)
        self._requeue(self._gate.end(sequence))
        if not sequence.is_in_flight:  # otherwise the step may still write to its blocks: `apply` releases them
            self._release(sequence)

    # Scheduling

    def _continue_others(self, step: Step, now: float) -> None:
        """A step of all who are not on probation, in two turns where a tenant is ahead of others."""
        num_preemptions = self._total_preemptions
        self._take_turn(step, now, num_preemptions=num_preemptions)
        if self._shares.begin_second_turn():
            self._take_turn(step, now, num_preemptions=num_preemptions)

    def _take_turn(self, step: Step, now: float, *, num_preemptions: int) -> None:
        """Whoever runs and is not in the step yet, then whoever waits, as far as their tenants' parts go."""
        self._continue_running(step)
        if self._total_preemptions == num_preemptions:  # whoever came in now would be the next victim
            self._admit_waiting(step, now)

    def _continue_trial(self, step: Step, now: float) -> None:
        """A step of one sequence on probation alone."""
        trial = self._probation.trial or self._admit_trial(now)
        if trial is None or trial.is_in_flight:
            return
        num_tokens = num_lone_tokens(trial, step.num_tokens_for(trial))
        end = trial.num_computed_tokens + num_tokens
        if end <= trial.blocks.view_tokens or self._make_room(trial, end):
            self._compute(step, trial, num_tokens)

    def _admit_trial(self, now: float) -> Sequence | None:
        probation = self._probation
        probation.lacks_room = False
        while sequence := probation.front:
            match = self._kv.match(sequence.blocks, sequence.token_ids, limit=sequence.max_cached_tokens)
            if producer := self._gate.producer_of(match.missing):
                self._hold(sequence, producer, num_matched=match.num_blocks)
                continue
            probation.lacks_room = not (
                self._rows.has_free
                and self._kv.admit(sequence.blocks, sequence.token_ids, num_matched=match.num_blocks)
            )
            if probation.lacks_room:
                return None
            probation.discard(sequence)
            self._start(sequence, match, now)
            probation.trial = sequence
            return sequence
        return None

    def _budget(self) -> int:
        budget, min_prefill_tokens = self._config.max_num_batched_tokens, self._config.min_prefill_tokens
        return max(budget, len(self._running) + min_prefill_tokens) if min_prefill_tokens else budget

    def _continue_running(self, step: Step) -> None:
        running = self._running
        index = 0
        while index < len(running) and step.budget > 0:  # preemption shortens the list at its end
            sequence = running[index]
            index += 1
            if sequence.is_in_flight or sequence is self._probation.trial:
                continue
            num_tokens = self._num_tokens_for(step, sequence)
            if not num_tokens:
                continue
            end = sequence.num_computed_tokens + num_tokens
            if end <= sequence.blocks.view_tokens or self._make_room(sequence, end):
                self._compute(step, sequence, num_tokens)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Cover the tokens with blocks, at the cost of younger sequences, or else of this one."""
        while not self._kv.cover(sequence.blocks, num_tokens):
            victim = self._victim()
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _victim(self) -> Sequence | None:
        """The youngest running sequence whose blocks nobody is writing to; never the oldest."""
        for index in range(len(self._running) - 1, 0, -1):
            if not self._running[index].is_in_flight:
                return self._running[index]
        return None

    def _preempt(self, victim: Sequence) -> None:
        self._stop_running(victim)
        self._release(victim)
        self._total_preemptions += 1
        self._requeue([victim, *self._gate.end(victim)])

    def _admit_waiting(self, step: Step, now: float) -> None:
        if self._probation.lacks_room:
            return
        while step.budget > 0 and self._rows.has_free and (sequence := self._queue.front_but(self._is_passed_over)):
            match = self._kv.match(sequence.blocks, sequence.token_ids, limit=sequence.max_cached_tokens)
            if producer := self._gate.producer_of(match.missing):
                self._hold(sequence, producer, num_matched=match.num_blocks)
            elif self._kv.admit(sequence.blocks, sequence.token_ids, num_matched=match.num_blocks):
                self._queue.discard(sequence)
                self._shares.note_entry(sequence.request.tenant)
                self._start(sequence, match, now)
                num_tokens = self._num_tokens_for(step, sequence) or 1  # one that was preempted is never passed over
                self._kv.cover(sequence.blocks, sequence.num_computed_tokens + num_tokens)
                self._compute(step, sequence, num_tokens)
            else:
                return

    def _compute(self, step: Step, sequence: Sequence, num_tokens: int) -> None:
        """Put a sequence into the step, at its tenant's cost."""
        step.add(sequence, num_tokens)
        request = sequence.request
        num_charged = num_tokens + step.entries[-1].sample
        self._shares.charge(request.tenant, num_charged, weight=request.weight, is_prompt=num_tokens > 1)

    def _is_passed_over(self, tenant: str) -> bool:
        """Whether a tenant has its part of this step, or, where it waits alone, must leave one row in five free.

        That is rounded down: with fewer than five rows none is left.
        """
        if not tenant:
            return False
        if self._prompt_tokens_left(tenant) == 0:
            return True
        max_num_seqs, num_rows = self._config.max_num_seqs, self._num_rows_of[tenant]
        free = max_num_seqs - len(self._running)
        has_most = num_rows >= ROW_SHARE * (free - 1) and free <= max_num_seqs // (ROW_SHARE + 1)
        return self._queue.num_tenants < 2 and num_rows > 0 and has_most

    def _prompt_tokens_left(self, tenant: str) -> int:
        return self._shares.prompt_tokens_left(tenant, least=self._config.block_size)

    def _num_tokens_for(self, step: Step, sequence: Sequence) -> int:
        """Of a sequence's missing tokens, how many go into the step; 0: its tenant has its part already."""
        num_tokens = step.num_tokens_for(sequence)
        return num_tokens if num_tokens <= 1 else min(num_tokens, self._prompt_tokens_left(sequence.request.tenant))

    def _hold(self, sequence: Sequence, producer: Sequence, *, num_matched: int) -> None:
        """Let a sequence wait for the prefix that a running one is about to have computed."""
        block_size = self._config.block_size
        limit = sequence.max_cached_tokens // block_size
        num_blocks = num_common_blocks(sequence, producer, known=num_matched, limit=limit, block_size=block_size)
        self._queue_of(sequence).discard(sequence)
        self._gate.hold(sequence, producer, num_blocks=num_blocks)

    def _start(self, sequence: Sequence, match: PrefixMatch, now: float) -> None:
        """Give a sequence its row, and what the cache has of it."""
        num_hit_tokens = match.num_blocks * self._config.block_size
        if not sequence.was_admitted:
            sequence.num_cached_tokens = min(num_hit_tokens, sequence.num_prompt_tokens)
            self._total_prefix_query_tokens += sequence.max_cached_tokens
            self._total_prefix_hit_tokens += num_hit_tokens
            sequence.queue_seconds = now - sequence.added_at
        sequence.was_admitted = True
        sequence.num_computed_tokens = num_hit_tokens
        sequence.row = self._rows.take()
        sequence.is_new_row = True
        self._running.append(sequence)
        self._num_rows_of[sequence.request.tenant] += 1
        self._advance_gate(sequence)

    # Applying

    def _take_in_flight(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        if result.step_id != plan.step_id or plan.step_id not in self._in_flight:
            raise ValueError(f"result of step {result.step_id} for plan {plan.step_id}, which is not in flight")
        if [row.row for row in result.rows] != [entry.row for entry in plan.entries]:
            raise ValueError(f"the result of step {plan.step_id} does not have the rows of its plan, in its order")
        return self._in_flight.pop(plan.step_id)

    def _apply_row(self, sequence: Sequence, entry: PlanEntry, row: RowResult) -> EngineOutput | None:
        """Advance a sequence by what the step brought, and say it where the client should know."""
        if row.error is not None:
            return _failure(sequence, row.error, is_request_fault=row.is_request_fault)
        if bool(row.token_ids) != entry.sample and not (row.is_end and entry.sample):
            message = f"the runner drew {len(row.token_ids)} tokens where {int(entry.sample)} or more were asked for"
            return _failure(sequence, message)
        sequence.num_computed_tokens += len(entry.token_ids) - entry.num_draft_tokens + row.num_accepted
        num_new, finish = self._take_tokens(sequence, row.token_ids, is_end=row.is_end)
        if sequence.num_computed_tokens >= sequence.blocks.next_seal:
            self._seal(sequence)
        prompt_logprobs = row.prompt_logprobs
        if prompt_logprobs:
            prompt_logprobs = sequence.take_prompt_logprobs(entry.start, prompt_logprobs)
        if not (num_new or finish or prompt_logprobs):
            return None
        return EngineOutput(
            sequence.request_id,
            row.token_ids[:num_new],
            row.logprobs[:num_new],
            prompt_logprobs,
            finish.reason if finish else None,
            finish.stop_token_id if finish else None,
            sequence.num_cached_tokens,
            None,
            sequence.take_queue_seconds(),
        )

    def _take_tokens(
        self, sequence: Sequence, token_ids: tuple[int, ...], *, is_end: bool
    ) -> tuple[int, Finish | None]:
        """Append drawn tokens up to the one that ends the sequence; returns how many, and the end.

        With `is_end` the last one completes the output, also where it is the last that max_tokens allows.
        """
        if token_ids and sequence.is_on_probation:
            sequence.is_on_probation = False
            self._probation.end(sequence)
        for count, token_id in enumerate(token_ids, start=1):
            sequence.token_ids.append(token_id)
            finish = sequence.rules.check(sequence.token_ids)
            is_complete = is_end and count == len(token_ids)
            if finish and not (is_complete and finish.reason is FinishReason.LENGTH):
                return count, finish
        if is_end:
            return len(token_ids), Finish(FinishReason.STOP)
        if sequence.is_scoring and sequence.num_computed_tokens == len(sequence.token_ids):
            return 0, Finish(FinishReason.LENGTH)
        return len(token_ids), None

    def _seal(self, sequence: Sequence) -> None:
        """Let others share the blocks that are now full."""
        num_computed_tokens = min(sequence.num_computed_tokens, len(sequence.token_ids))
        self._kv.seal(sequence.blocks, sequence.token_ids, num_computed_tokens=num_computed_tokens)
        self._advance_gate(sequence)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._stop_running(sequence)
        self._requeue(self._gate.end(sequence))
        self._release(sequence)

    # Shared

    def _advance_gate(self, sequence: Sequence) -> None:
        next_hash = self._kv.next_hash(sequence.blocks, sequence.token_ids)
        self._requeue(self._gate.advance(sequence, next_hash=next_hash))

    def _release(self, sequence: Sequence) -> None:
        """Take blocks and row of a sequence that no step is working on."""
        self._kv.free(sequence.blocks)
        self._rows.release(sequence.row)
        sequence.leave_row()

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        tenant = sequence.request.tenant
        self._num_rows_of[tenant] -= 1
        if not self._num_rows_of[tenant]:
            del self._num_rows_of[tenant]
        self._probation.end(sequence)

    def _requeue(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._queue_of(sequence).push(sequence)

    def _queue_of(self, sequence: Sequence) -> WaitingQueue | Probation:
        return self._probation if sequence.is_on_probation else self._queue


def _failure(sequence: Sequence, message: str, *, is_request_fault: bool = False) -> EngineOutput:
    return EngineOutput(
        sequence.request_id,
        finish_reason=FinishReason.ERROR,
        num_cached_tokens=sequence.num_cached_tokens,
        error=message,
        queue_seconds=sequence.take_queue_seconds(),
        is_request_fault=is_request_fault,
    )
