"""The engine's loop: take messages, schedule, forward, mask, sample, apply, send.

One thread. A row that fails ends alone (`RowResult.error`); an exception of the runner or the scheduler
leaves here and ends the process, because nobody knows what state it left behind: the engine is
disposable, and the client hands its sequences over to the next one.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import assert_never

from app.core.plan import StepPlan
from app.core.types import EngineOutput, EngineRequest
from app.engine.build import Engine
from app.engine.stats import StepWork, count_work, step_stats
from app.ipc.messages import Abort, Add, Start, StepOutputs, ToEngine
from app.ipc.progress import EnginePhase, ProgressWriter, request_key
from app.ipc.transport import EngineEnd, FrameError
from app.scheduler import SchedulerCounts

MAX_BACKLOG_BYTES = 4 * 1024 * 1024
"""With more unsent output than this the engine waits for the API process instead of stepping."""
STUCK_WAIT_SECONDS = 0.05
"""How long to wait for messages where sequences are live and none can be scheduled: their grammars are prepared."""


class EngineLoop:
    """Runs steps until the socket closes. Message number 0 is `Ready`; steps count on from there."""

    def __init__(self, engine: Engine, *, generation: int, channel: EngineEnd, progress: ProgressWriter) -> None:
        self._runner = engine.runner
        self._scheduler = engine.scheduler
        self._grammars = engine.grammars(wake=channel.wake, note_preparing=self._note_preparing)
        self._num_kv_blocks = engine.limits.num_kv_blocks
        self._generation = generation
        self._channel = channel
        self._progress = progress
        self._seq = 0
        self._last_step_id = 0
        self._told: SchedulerCounts | None = None
        """The counts that the API process heard last."""
        self._held: dict[str, EngineRequest] = {}
        """Those whose grammars wait for the trials of others, so that a compiler's crash is not a suspect's, nor a
        suspect's crash theirs."""
        self._row_keys: dict[int, int] = {}
        """Key of the request in each row, for the progress page."""

    @property
    def next_seq(self) -> int:
        """The number that the next message takes."""
        return self._seq + 1

    def run(self) -> None:
        """Raises ConnectionError when the API process is gone, and whatever a step raises."""
        wait = 0.0
        while True:
            ended = self._take_messages(wait)
            self._begin_held()
            ended += self._take_prepared()
            plan = self._scheduler.schedule(time.monotonic())
            if plan is not None:
                self._step(plan, ended)
            elif ended:
                self._send(ended, work=StepWork(self._last_step_id))
            elif self._grammars.is_preparing:
                self._progress.set_phase(EnginePhase.PREPARING)
            wait = 0.0 if plan is not None or ended else STUCK_WAIT_SECONDS

    def _step(self, plan: StepPlan, ended: list[EngineOutput]) -> None:
        began = time.monotonic()
        self._last_step_id = plan.step_id
        self._progress.begin_step(plan.step_id, num_tokens=plan.num_tokens, request_keys=self._keys(plan))
        forward = self._runner.forward(plan)
        masks = self._grammars.masks(plan, partial(self._runner.guesses, plan, forward))
        result = self._runner.sample(plan, forward, masks)
        result = self._grammars.accept(plan, result)
        now = time.monotonic()
        outputs = self._scheduler.apply(plan, result, now)
        self._grammars.forget(output.request_id for output in outputs if output.finish_reason is not None)
        self._send((*ended, *outputs), work=count_work(plan, now - began))

    def _send(self, outputs: Sequence[EngineOutput], *, work: StepWork) -> None:
        self._told = self._scheduler.counts()
        stats = step_stats(work, self._told, num_kv_blocks=self._num_kv_blocks)
        self._seq += 1
        self._channel.send(StepOutputs(self._generation, self._seq, tuple(outputs), stats))

    def _take_messages(self, wait: float) -> list[EngineOutput]:
        """Add and abort what has arrived, blocking while there is nothing to do; returns what ended at once."""
        ended = self._handle(self._channel.receive(wait))
        while not self._scheduler.has_work and not ended:
            if self._told is not None and self._told != self._scheduler.counts():
                self._send((), work=StepWork(self._last_step_id))  # an abort emptied the engine: say so
            self._progress.set_phase(EnginePhase.IDLE)
            ended += self._handle(self._channel.receive(None))
        while self._channel.backlog_bytes > MAX_BACKLOG_BYTES:
            self._progress.set_phase(EnginePhase.BLOCKED)
            ended += self._handle(self._channel.receive(None))
        return ended

    def _handle(self, messages: list[ToEngine]) -> list[EngineOutput]:
        ended: list[EngineOutput] = []
        for message in messages:
            match message:
                case Add(requests):
                    now = time.monotonic()
                    for request in requests:
                        if output := self._scheduler.add(request, now):
                            ended.append(output)
                        else:
                            self._begin_grammar(request)
                case Abort(request_ids):
                    self._scheduler.abort(request_ids)
                    self._grammars.forget(request_ids)
                    for request_id in request_ids:
                        self._held.pop(request_id, None)
                case Start():
                    raise FrameError("a second start message")
                case _:
                    assert_never(message)
        return ended

    def _begin_grammar(self, request: EngineRequest) -> None:
        if request.params.grammar is None:
            return
        if request.is_on_probation:  # tried alone, as its steps will be
            self._progress.begin_step(self._last_step_id, num_tokens=0, request_keys=[request_key(request.request_id)])
            self._grammars.begin(request, wait=True)
            self._progress.set_phase(EnginePhase.PREPARING)
        elif self._scheduler.has_suspects:
            self._held[request.request_id] = request
        else:
            # Said first: the thread that prepares it may take the interpreter's lock at once.
            self._progress.set_phase(EnginePhase.PREPARING)
            self._grammars.begin(request)

    def _begin_held(self) -> None:
        if self._held and not self._scheduler.has_suspects:
            held, self._held = self._held, {}
            for request in held.values():
                self._begin_grammar(request)

    def _note_preparing(self, request_id: str | None) -> None:
        """Called in the thread that prepares grammars."""
        self._progress.note_preparing(None if request_id is None else request_key(request_id))

    def _take_prepared(self) -> list[EngineOutput]:
        """Let sequences go whose grammar is ready; returns the ends of those whose grammar failed."""
        ended: list[EngineOutput] = []
        for prepared in self._grammars.take_prepared():
            if prepared.error is None:
                self._scheduler.admit_prepared(prepared.request_id)
            elif output := self._scheduler.refuse_prepared(prepared.request_id, prepared.error):
                ended.append(output)
        return ended

    def _keys(self, plan: StepPlan) -> list[int]:
        keys = self._row_keys
        for entry in plan.entries:
            if entry.start_row is not None:
                keys[entry.row] = request_key(entry.start_row.request_id)
        return [keys[entry.row] for entry in plan.entries]
