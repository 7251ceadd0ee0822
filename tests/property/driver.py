"""Drives a `Scheduler` over a `FakeRunner` and checks, after every step, all that must always hold.

Used by the state machine, by the seeded random runs and by the unit tests of the scheduler.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec

from app.core.plan import PlanEntry, StepPlan
from app.core.types import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from app.kv.record import KEY_BYTES, BlockRecord, size_of
from app.scheduler import Scheduler, SchedulerConfig
from app.scheduler.sequence import NO_ROW, Sequence
from tests.fakes import Continuation, FakeForward, FakeRunner, continuation

REFUSAL = "the grammar cannot be served"


def make_config(
    *,
    num_kv_blocks: int = 16,
    block_size: int = 4,
    max_model_len: int = 48,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    min_prefill_tokens: int = 0,
    vocab_size: int = 50,
    eos_token_ids: tuple[int, ...] = (0,),
    enable_prefix_caching: bool = True,
) -> SchedulerConfig:
    """A small engine."""
    return SchedulerConfig(
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        min_prefill_tokens=min_prefill_tokens,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        enable_prefix_caching=enable_prefix_caching,
    )


@dataclass
class Answer:
    """What a request has brought so far."""

    request: EngineRequest
    expected: Continuation
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: EngineOutput | None = None
    """Its output with a finish reason."""
    num_cached_tokens: int | None = None


class Driver:
    """A scheduler, a runner, and what each request must bring.

    `lag` is how many steps are in flight while the next one is planned. With `draft`, decoding rows are
    given guesses, some right and some wrong, where their blocks have room.
    """

    def __init__(self, config: SchedulerConfig, *, lag: int = 0, draft: bool = False) -> None:
        self.config = config
        self._record = bytearray(size_of(config.num_kv_blocks))
        self.scheduler = self._new_scheduler()
        self.num_crashes = 0
        self.runner = FakeRunner(
            num_kv_blocks=config.num_kv_blocks,
            block_size=config.block_size,
            vocab_size=config.vocab_size,
            max_model_len=config.max_model_len,
        )
        self.answers: dict[str, Answer] = {}
        self.num_steps = 0
        self.num_held = 0
        """Sequences that the gate held, summed over steps, while the step was in flight."""
        self.num_prepared = 0
        """Sequences with a grammar that were let go on."""
        self._preparing: dict[str, int] = {}
        """Steps until the grammar of a sequence is ready, or refused."""
        self._lag = lag
        self._draft = draft
        self._in_flight: deque[tuple[StepPlan, FakeForward]] = deque()

    @property
    def live_ids(self) -> list[str]:
        """Requests that were added and neither finished nor were aborted."""
        return [request_id for request_id, answer in self.answers.items() if answer.last is None]

    def add(self, request: EngineRequest) -> EngineOutput | None:
        """Add a request whose id is new and which fits the engine."""
        expected = continuation(
            request,
            vocab_size=self.config.vocab_size,
            eos_token_ids=self.config.eos_token_ids,
            max_sequence_len=self.config.max_sequence_len,
        )
        self.answers[request.request_id] = Answer(request, expected)
        output = self.scheduler.add(request, 0.0)
        if output is not None:
            self._take(output)
        elif request.params.grammar is not None:
            self._preparing[request.request_id] = len(request.prompt_token_ids) % 5
        return output

    def abort(self, request_id: str) -> None:
        """Abort a live request; nothing more may come of it."""
        assert self.scheduler.abort([request_id]) == 1
        del self.answers[request_id]
        self._preparing.pop(request_id, None)
        self.check()

    def crash(self) -> None:
        """The engine is killed: the next one has what stands in the pool and its record, and what was received."""
        self.num_crashes += 1
        self._in_flight.clear()
        self._preparing.clear()
        self.runner.forget_rows()
        self.scheduler = self._new_scheduler()
        for request_id in self.live_ids:
            answer = self.answers[request_id]
            answer.num_cached_tokens = None
            if not answer.token_ids:
                answer.prompt_logprobs.clear()  # they come again, and the journal skips them
            output = self.scheduler.add(_hand_over(answer), 0.0)
            if output is not None:
                self._take(output)
            elif answer.request.params.grammar is not None:
                self._preparing[request_id] = len(answer.request.prompt_token_ids) % 5
        self.check()

    def fail(self, request_id: str) -> None:
        """Let the request's row fail from the next step on."""
        self.runner.failing.add(request_id)

    def step(self) -> StepPlan | None:
        """Plan a step, and finish the oldest one in flight where that is due. Returns the plan."""
        self._prepare()
        oldest = self.scheduler._running[:1]
        num_running = len(self.scheduler._running)
        num_preemptions = self.scheduler.counts().total_preemptions
        plan = self.scheduler.schedule(0.0)
        if plan is not None and self.scheduler.counts().total_preemptions > num_preemptions:
            assert not any(entry.start_row for entry in plan.entries), "admitted while others had to give way"
        assert self.scheduler._running[: len(oldest)] == oldest, "the oldest running sequence was preempted"
        if plan is None:
            is_quiet = not self.scheduler.has_work or self._preparing
            assert self._in_flight or is_quiet, "sequences are live and nothing is planned"
        else:
            assert plan.num_tokens <= self._most_tokens(num_running)
            self._check_plan(plan)
            plan = self._with_drafts(plan) if self._draft else plan
            self._in_flight.append((plan, self.runner.forward(plan)))
            self.num_steps += 1
            self.num_held += len(self.scheduler._gate)
        if self._in_flight and (plan is None or len(self._in_flight) > self._lag):
            self._finish_step()
        self.check()
        return plan

    def run_until_idle(self) -> None:
        """Step until nothing is live; fails where that takes longer than one sequence after the other would."""
        bound = len(self._preparing) * 5 + (len(self.live_ids) + 1) * (self.config.max_sequence_len + 2) * (
            self._lag + 2
        )
        for _ in range(bound):
            if not self.scheduler.has_work and not self._in_flight:
                break
            self.step()
        counts = self.scheduler.counts()
        assert not self.live_ids, f"still live after {bound} steps: {self.live_ids}"
        assert (counts.num_running, counts.num_waiting, counts.num_kv_blocks_used) == (0, 0, 0)

    def check(self) -> None:
        """Everything that must hold between any two calls."""
        holders = [*self.scheduler._running, *self._zombies()]
        self._check_places()
        self._check_blocks(holders)
        rows = [sequence.row for sequence in holders]
        assert len(set(rows)) == len(rows), "two sequences have one row"
        assert all(0 <= row < self.config.max_num_seqs for row in rows)

    def _new_scheduler(self) -> Scheduler:
        record = BlockRecord(self._record, self.config.num_kv_blocks, key=bytes(KEY_BYTES))
        return Scheduler(self.config, record=record)

    def _prepare(self) -> None:
        """Grammars become ready, or turn out to be wrong, some steps after their requests came."""
        for request_id, num_left in list(self._preparing.items()):
            if num_left:
                self._preparing[request_id] -= 1
                continue
            del self._preparing[request_id]
            if len(self.answers[request_id].request.prompt_token_ids) % 7 == 0:
                output = self.scheduler.refuse_prepared(request_id, REFUSAL)
                assert output is not None
                self._take(output)
            else:
                self.scheduler.admit_prepared(request_id)
                self.num_prepared += 1

    def _finish_step(self) -> None:
        plan, forward = self._in_flight.popleft()
        for output in self.scheduler.apply(plan, self.runner.sample(plan, forward), 0.0):
            self._take(output)

    def _take(self, output: EngineOutput) -> None:
        answer = self.answers[output.request_id]
        assert answer.last is None, "an output after the last one"
        answer.token_ids += output.token_ids
        answer.logprobs += output.logprobs
        answer.prompt_logprobs += output.prompt_logprobs
        assert answer.num_cached_tokens in (None, output.num_cached_tokens), "num_cached_tokens changed"
        answer.num_cached_tokens = output.num_cached_tokens
        expected = answer.expected
        assert tuple(answer.token_ids) == expected.token_ids[: len(answer.token_ids)]
        assert tuple(answer.logprobs) == expected.logprobs[: len(answer.logprobs)]
        assert tuple(answer.prompt_logprobs) == expected.prompt_logprobs[: len(answer.prompt_logprobs)]
        if output.finish_reason is not None:
            answer.last = output
            self._check_end(answer, output)

    def _check_end(self, answer: Answer, output: EngineOutput) -> None:
        if output.error == REFUSAL:
            assert not answer.token_ids
            return
        if output.finish_reason is FinishReason.ERROR:
            assert output.request_id in self.runner.failing, output.error
            assert output.error == "logits are not finite"
            return
        expected = answer.expected
        assert tuple(answer.token_ids) == expected.token_ids
        assert tuple(answer.logprobs) == expected.logprobs
        assert tuple(answer.prompt_logprobs) == expected.prompt_logprobs
        assert (output.finish_reason, output.stop_token_id) == (expected.finish_reason, expected.stop_token_id)

    def _most_tokens(self, num_running: int) -> int:
        """The budget, stretched where the rows that ran before the step leave no room for prefill."""
        budget, min_prefill_tokens = self.config.max_num_batched_tokens, self.config.min_prefill_tokens
        return max(budget, num_running + min_prefill_tokens) if min_prefill_tokens else budget

    def _check_plan(self, plan: StepPlan) -> None:
        assert plan.num_tokens > 0
        assert all(entry.token_ids for entry in plan.entries)
        rows = [entry.row for entry in plan.entries]
        assert len(set(rows)) == len(rows), "a sequence twice in one step"
        assert len(rows) == 1 or not any(s.is_on_probation for s in self.scheduler._in_flight[plan.step_id]), (
            "a sequence on probation has company"
        )
        in_flight_blocks = {
            block for other, _ in self._in_flight for entry in other.entries for block in entry.block_table
        }
        pool = self.scheduler._kv.pool
        for entry in plan.entries:
            for block_id in self._written_blocks(entry):
                assert pool.ref_count(block_id) == 1 and pool.hash_of(block_id) is None, "a shared block is written"
                assert block_id not in in_flight_blocks, "a block is written by two steps in flight"

    def _written_blocks(self, entry: PlanEntry) -> tuple[int, ...]:
        return entry.block_table[entry.start // self.config.block_size :]

    def _with_drafts(self, plan: StepPlan) -> StepPlan:
        return msgspec.structs.replace(plan, entries=tuple(self._draft_entry(entry) for entry in plan.entries))

    def _draft_entry(self, entry: PlanEntry) -> PlanEntry:
        """Append as many guesses as fit the entry's blocks: right ones, but for each seventh position."""
        sequence = next(s for s in self.scheduler._running if s.row == entry.row)
        end = entry.start + len(entry.token_ids)
        room = len(entry.block_table) * self.config.block_size - end
        if not entry.sample or room == 0:
            return entry
        expected = self.answers[sequence.request_id].expected.token_ids
        num_received = end - sequence.num_prompt_tokens - len(sequence.request.output_token_ids)
        guesses = list(expected[num_received : num_received + room])
        guesses = [0 if (end + i) % 7 == 0 else guess for i, guess in enumerate(guesses)]
        return msgspec.structs.replace(entry, token_ids=(*entry.token_ids, *guesses), num_draft_tokens=len(guesses))

    def _zombies(self) -> list[Sequence]:
        """Aborted sequences whose step has not come back."""
        in_flight = self.scheduler._in_flight.values()
        return [sequence for sequences in in_flight for sequence in sequences if sequence.is_aborted]

    def _check_places(self) -> None:
        scheduler = self.scheduler
        waiting = list(scheduler._queue)
        on_probation = list(scheduler._probation._queue)
        held = scheduler._gate._producer_of_held
        preparing = scheduler._preparation._held
        places = [*scheduler._running, *waiting, *on_probation, *held, *preparing.values()]
        assert sorted(sequence.request_id for sequence in places) == sorted(scheduler._sequences)
        assert set(scheduler._sequences) == set(self.live_ids)
        assert set(preparing) == set(self._preparing)
        idle = [*waiting, *on_probation, *held, *preparing.values()]
        assert all(sequence.row == NO_ROW and not sequence.blocks.block_ids for sequence in idle)
        assert all(sequence.num_computed_tokens == 0 for sequence in idle)
        assert not any(s.is_on_probation for s in waiting) and all(s.is_on_probation for s in on_probation)
        assert [s for s in scheduler._running if s.is_on_probation] == (
            [] if scheduler._probation.trial is None else [scheduler._probation.trial]
        )
        for group in (scheduler._queue._preempted, *scheduler._queue._by_tenant.values()):
            assert [s.queue_key for s in group] == sorted(s.queue_key for s in group)
        assert scheduler._num_rows_of == Counter(s.request.tenant for s in scheduler._running)
        running = set(scheduler._running)
        assert all(producer in running for producer in held.values()), "held for a sequence that does not run"
        assert all(s.num_computed_tokens < len(s.token_ids) for s in running)

    def _check_blocks(self, holders: list[Sequence]) -> None:
        pool = self.scheduler._kv.pool
        if self.config.enable_prefix_caching:
            entries = BlockRecord(self._record, self.config.num_kv_blocks, key=bytes(KEY_BYTES)).entries()
            assert dict(entries) == pool._hash_of, "the record does not say what is sealed"
        assert pool.num_free + pool.num_held == pool.num_blocks == self.config.num_kv_blocks
        assert self.scheduler.counts().num_kv_blocks_used == pool.num_held
        references = Counter(block_id for sequence in holders for block_id in sequence.blocks.block_ids)
        assert len(references) == pool.num_held
        assert sum(count > 1 for count in references.values()) == pool.num_shared
        assert all(pool.ref_count(block_id) == count for block_id, count in references.items())
        shared = {block_id for block_id, count in references.items() if count > 1}
        if shared:
            self._check_shared(holders, shared)

    def _check_shared(self, holders: list[Sequence], shared: set[int]) -> None:
        """Only full, sealed blocks are shared, at one index, behind one prefix, under one salt."""
        block_size = self.config.block_size
        contents: dict[int, tuple[int, str, list[int]]] = {}
        for sequence in holders:
            for index, block_id in enumerate(sequence.blocks.block_ids):
                if block_id not in shared:
                    continue
                end = (index + 1) * block_size
                assert index < sequence.blocks.num_sealed and end <= sequence.num_computed_tokens
                assert self.scheduler._kv.pool.hash_of(block_id) is not None
                content = (index, sequence.request.cache_salt, sequence.token_ids[:end])
                assert contents.setdefault(block_id, content) == content


def _hand_over(answer: Answer) -> EngineRequest:
    """As the journal does it."""
    request, params = answer.request, answer.request.params
    if answer.token_ids:
        params = msgspec.structs.replace(params, num_prompt_logprobs=None)
    output_token_ids = (*request.output_token_ids, *answer.token_ids)
    return msgspec.structs.replace(request, params=params, output_token_ids=output_token_ids)
