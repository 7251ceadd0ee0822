"""One local engine behind the `EngineClient` protocol: journal, demultiplexing, restart and hand-over.

The engine may die at any moment: its live sequences go to the next one as prompt and received tokens, and
their consumers only see a pause. What they must never see is a token twice, or one missing.

A new sequence that comes while an engine is replaced waits in the journal for the next one, as those that
were admitted before do. Only where engines die one after another, with no token between them, is it refused.
"""

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

import msgspec

from app.client.engine_client import EngineState, EngineStatus
from app.client.handover import blame, in_parts, suspects_first
from app.client.journal import Journal, LiveSequence
from app.client.memory import MemoryKeeper
from app.client.process import EngineLaunch, EngineProcess
from app.client.quarantine import Quarantine
from app.client.reserve import DescriptorReserve
from app.client.restart import RestartBudget
from app.client.settings import Supervision
from app.client.supervisor import EngineDeath, EngineLife
from app.core.config import EngineConfig
from app.core.errors import ConfigurationError, EngineFailed, EngineUnavailable, InvalidRequest
from app.core.types import EngineLimits, EngineOutput, EngineRequest, FinishReason, StepStats
from app.ipc.messages import Abort, Add, Ready, StepOutputs
from app.ipc.transport import FrameError

logger = logging.getLogger("headwater.client")

UNKNOWN_LOAD_SECONDS = 4.0
"""What a load is taken to last before the first one was seen."""

CONVICTED = (
    "This request ended the engine twice: in a step with others, and then in a step that computed nothing else. "
    "It was ended and is in quarantine; do not send it again."
)
TOO_LARGE = (
    "This request is too large to be sent to the engine: send one with a shorter grammar, prompt or lists of ids."
)
OUTGREW = "This request became too large to be handed over to another engine with the tokens that it has brought."
QUARANTINED = "This request ended the engine before and is in quarantine: it is not tried again for ten minutes."

WOKEN_AT_ONCE = 32
"""Consumers that get an output in one turn of the event loop."""

StepObserver = Callable[[int, StepStats], None]
"""Takes the generation and the figures of each step, in order, on the event loop's thread."""


class LocalEngineClient:
    """Supervises one engine process at a time. All methods belong to the event loop's thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        first: EngineProcess | None = None,
        launch: EngineLaunch | None = None,
        load_timeout: float | None = None,
        supervision: Supervision | None = None,
        on_step: StepObserver | None = None,
        generations: Iterator[int] | None = None,
    ) -> None:
        """`first` is an engine that was spawned already, with the same config and the first of `generations`, the
        numbers that engines get (1, 2, ...; clients of one server share them).

        `load_timeout` is `Supervision.load_seconds`, the one of these limits that operators set.
        """
        supervision = Supervision() if supervision is None else supervision
        if load_timeout is not None:
            supervision = msgspec.structs.replace(supervision, load_seconds=load_timeout)
        self._config = config
        self._first = first
        self._memory = MemoryKeeper() if first is None else first.memory
        self._launch = launch
        self._supervision = supervision
        self._on_step = on_step
        self._journal = Journal()
        self._quarantine = Quarantine()
        self._reserve = DescriptorReserve()
        self._budget = RestartBudget(supervision)
        self._state = EngineState.STARTING
        self._detail = "the first engine is loading"
        self._generations = itertools.count(1) if generations is None else generations
        self._generation = 0
        self._life: EngineLife | None = None
        """The engine that takes messages; None while there is none."""
        self._limits: EngineLimits | None = None
        self._last_step: StepStats | None = None
        self._is_draining = False
        self._is_leaving = False
        self._awaits_ready = False
        """An engine serves, or is replaced at once: new sequences may count on it."""
        self._mistake: ConfigurationError | None = None
        self._settled = asyncio.Event()
        self._renewed = asyncio.Event()
        """An engine has become ready since this was cleared, or none will."""
        self._failed = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._supervising: asyncio.Task[None] | None = None

    @property
    def status(self) -> EngineStatus:
        """Where things stand now."""
        state, detail = self._state, self._detail
        if (self._is_draining or self._is_leaving) and state is not EngineState.FAILED:
            state, detail = EngineState.DRAINING, self._drain_detail
        life = self._life
        return EngineStatus(
            state,
            self._generation,
            detail,
            self._last_step,
            len(self._journal),
            self.engine_pid,
            last_step_age=None if life is None else life.last_step_age,
            is_stalled=life is not None and life.is_stalled,
            takes_requests=self._takes_requests,
        )

    @property
    def limits(self) -> EngineLimits | None:
        """Of the engine that was ready last; None before the first one was."""
        return self._limits

    @property
    def engine_pid(self) -> int | None:
        """The process to look at, or to kill; None while there is none."""
        return None if self._life is None else self._life.pid

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """See `EngineClient.generate`. The sequence is admitted by the first `anext`.

        A failure of the sequence inside the engine is an output with the finish reason `error`;
        EngineFailed is raised where engines could not be kept alive, or died by this sequence.
        Raises InvalidRequest where it is too large to be sent, ValueError where a live sequence has the same id.
        """
        sequence = self._admit(request)
        try:
            while True:
                output = await sequence.next_output()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._let_go(sequence)

    async def start(self) -> None:
        """Begin to supervise; returns at once. Raises RuntimeError the second time."""
        if self._supervising is not None:
            raise RuntimeError("this client was started already")
        self._supervising = asyncio.create_task(self._supervise(), name="supervise-engine")

    async def wait_ready(self, timeout: float) -> EngineLimits:
        """Wait for the first engine. Raises ConfigurationError or EngineUnavailable."""
        try:
            await asyncio.wait_for(self._settled.wait(), timeout)
        except TimeoutError:
            raise EngineUnavailable(f"the engine was not ready after {timeout:g} s: {self._detail}") from None
        if self._mistake is not None:
            raise self._mistake
        if self._limits is None or self._state is EngineState.FAILED:
            raise EngineUnavailable(f"no engine can be kept alive: {self._detail}")
        return self._limits

    async def wait_failed(self) -> None:
        """Wait until no engine will be started any more (state FAILED); `status.detail` says why."""
        await self._failed.wait()

    async def renew(self) -> bool:
        """Replace the engine by another one of the same model, to which live sequences are handed over; whether one
        is ready then. Where an engine is being replaced anyhow, that one is waited for.
        """
        self._renewed.clear()
        if self._life is not None and self._state is EngineState.READY:
            self._life.retire("it was renewed")
        await self._renewed.wait()
        return self._state is EngineState.READY

    def leave(self) -> None:
        """Say `draining` from now on, and take new sequences all the same until `drain`."""
        self._is_leaving = True

    def stay(self) -> None:
        """Take `leave` back."""
        self._is_leaving = False

    async def drain(self, timeout: float) -> None:
        """Refuse new sequences and wait until the live ones have finished or `timeout` seconds passed."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout)

    async def stop(self) -> None:
        """End the engine and every sequence still live (finish reason abort). Harmless the second time."""
        self._is_draining = True
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.wait({self._supervising})
        if self._first is not None:  # spawned, never taken over
            await EngineLife(self._first, supervision=self._supervision).end()
            self._first = None
        for sequence in self._journal.pop_all():
            sequence.end(FinishReason.ABORT)
        self._reserve.release()
        self._memory.close()
        self._empty.set()
        self._detail = "stopped"
        self._settled.set()
        self._renewed.set()

    # Sequences

    @property
    def _takes_requests(self) -> bool:
        return self._awaits_ready and not self._is_draining

    def _admit(self, request: EngineRequest) -> LiveSequence:
        if not self._takes_requests:
            raise self._refusal()
        if self._quarantine.holds(request):
            raise EngineFailed(QUARANTINED)
        sequence = self._journal.admit(request)
        self._empty.clear()
        if self._life is None or self._state is not EngineState.READY:
            return sequence  # the next engine gets it with the others
        try:
            self._life.send(Add((request,)))
        except Exception as error:  # it was not sent, so nobody will end it
            self._journal.remove(sequence)
            self._note_departures()
            if isinstance(error, FrameError):
                raise InvalidRequest(TOO_LARGE) from error
            raise
        sequence.was_sent = True
        self._life.has_live = True
        return sequence

    @property
    def _drain_detail(self) -> str:
        ends = "no new requests are taken" if self._is_draining else "new requests are taken for a last while"
        detail = f"the server ends: {ends}, sequences that may finish: {len(self._journal)}"
        return detail if self._state is EngineState.READY else f"{detail}; {self._detail}"

    def _refusal(self) -> EngineUnavailable:
        status = self.status
        retry_after = None
        if status.state in (EngineState.STARTING, EngineState.RESTARTING):
            load_seconds = UNKNOWN_LOAD_SECONDS if self._limits is None else self._limits.load_seconds
            retry_after = 1 + math.ceil(load_seconds)
        return EngineUnavailable(f"the engine is {status.state}: {status.detail}", retry_after=retry_after)

    def _let_go(self, sequence: LiveSequence) -> None:
        """The consumer is done: abort what is not finished, wherever it is."""
        if not self._journal.remove(sequence):
            return
        if self._life is not None:
            self._life.send(Abort((sequence.request.request_id,)))
        self._note_departures()

    def _note_departures(self) -> None:
        """Sequences may have left the journal."""
        is_empty = not len(self._journal)
        if is_empty:
            self._empty.set()
        if self._life is not None:
            self._life.has_live = not is_empty

    def _send_all(self, sequences: Iterable[LiveSequence]) -> None:
        if self._life is None:
            return
        for requests in in_parts(sequence.hand_over() for sequence in sequences):
            try:
                self._life.send(Add(requests))
            except FrameError:  # a lone one: several together are far from the limit
                for request in requests:
                    why = OUTGREW if request.output_token_ids else TOO_LARGE
                    self._journal.receive(EngineOutput(request.request_id, finish_reason=FinishReason.ERROR, error=why))

    # Engines

    async def _supervise(self) -> None:
        try:
            delay: float | None = 0.0
            while delay is not None:
                await asyncio.sleep(delay)
                delay = await self._run_engine()
        except Exception as error:
            logger.exception("the supervisor failed")
            self._give_up(f"the supervisor failed: {type(error).__name__}: {error}")

    async def _run_engine(self) -> float | None:
        """From start to death; returns the seconds to wait before the next one, None for no next one."""
        self._generation = next(self._generations)
        self._reserve.release()
        try:
            process = self._first or EngineProcess.spawn(
                self._generation, self._config, launch=self._launch, memory=self._memory
            )
        except OSError as error:
            return self._after_death(
                EngineDeath(f"the engine did not start: {error}", is_self_inflicted=False, leaves_memory_true=True),
                ready_seconds=0.0,
                counts=True,
            )
        finally:
            self._reserve.fill()
        self._first = None
        life = EngineLife(process, supervision=self._supervision)
        try:
            await life.begin()
            self._life = life
            while True:
                await self._handle(await life.receive())
        except EngineDeath as death:
            ready_seconds = life.ready_seconds
            self._life = None
            death = self._in_words(death)
            self._mark_dead(death)
            await life.end()
            is_explained = self._blame(death, life)
            # Whoever kills idle engines shows nothing about engines.
            counts = not is_explained and (death.is_self_inflicted or len(self._journal) > 0)
            return self._after_death(death, ready_seconds=ready_seconds, counts=counts)
        finally:
            self._life = None
            await life.end()

    async def _handle(self, message: Ready | StepOutputs) -> None:
        if isinstance(message, Ready):
            self._begin_serving(message)
            return
        self._last_step = message.stats
        has_tokens = has_ended = False
        for count, output in enumerate(message.outputs, start=1):
            if count % WOKEN_AT_ONCE == 0:
                await asyncio.sleep(0)  # a thousand streams that go on in one turn would hold up everybody else
            sequence = self._journal.receive(output)
            has_tokens = has_tokens or bool(output.token_ids)
            has_ended = has_ended or (sequence is not None and sequence.is_finished)
        if has_tokens:
            self._budget.forgive()
        if has_ended:
            self._note_departures()
        if self._on_step is not None:
            self._on_step(message.generation, message.stats)

    def _begin_serving(self, ready: Ready) -> None:
        if self._limits is not None and ready.limits.fingerprint != self._limits.fingerprint:
            self._fail_all("the model changed while its engine was replaced, so this answer cannot go on")
        if self._limits is None:
            self._pin(ready.limits)
        self._limits = ready.limits
        self._memory.retain(ready.limits.kept)
        self._state = EngineState.READY
        self._awaits_ready = True
        self._detail = f"generation {ready.generation} is ready"
        self._send_all(suspects_first(self._journal))
        self._note_departures()
        logger.info(
            "engine ready",
            extra={
                "facts": {
                    "generation": ready.generation,
                    "tier": ready.limits.tier,
                    "load_seconds": ready.limits.load_seconds,
                    "weights": "found packed" if ready.limits.kept.has_adopted_weights else "packed",
                    "kv_blocks_found": ready.limits.kept.num_adopted_blocks,
                    "handed_over": len(self._journal),
                }
            },
        )
        self._settled.set()
        self._renewed.set()

    def _pin(self, limits: EngineLimits) -> None:
        """Later engines get what the first one resolved: requests were checked by its context, whatever memory is free
        then; its KV pool is theirs; and its token budget need not be measured again."""
        self._config = msgspec.structs.replace(
            self._config,
            max_model_len=limits.max_model_len,
            num_kv_blocks=limits.num_kv_blocks,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )

    def _in_words(self, death: EngineDeath) -> EngineDeath:
        """A death as it is, or with what was asked of an engine that could not be like the first."""
        if self._limits is None or not death.is_configuration:
            return death
        return EngineDeath(
            f"no engine like the first one could be started ({self._config.max_model_len} tokens of context and "
            f"{self._config.num_kv_blocks} KV blocks): {death.reason}",
            is_configuration=True,
            is_self_inflicted=death.is_self_inflicted,
        )

    def _mark_dead(self, death: EngineDeath) -> None:
        """Readiness says so from now on."""
        self._state = EngineState.STARTING if self._limits is None else EngineState.RESTARTING
        self._detail = death.reason
        self._last_step = None
        logger.log(
            logging.INFO if death.is_planned else logging.ERROR,
            "engine retired" if death.is_planned else "engine died",
            extra={
                "facts": {"generation": self._generation, "reason": death.reason, "live": len(self._journal)},
            },
        )

    def _blame(self, death: EngineDeath, life: EngineLife) -> bool:
        """Put suspects on probation, or end the one that is proved; True where one suspect explains the death."""
        verdict = blame(self._journal, life.keys_at_death, is_self_inflicted=death.is_self_inflicted)
        facts: dict[str, object] = {"generation": life.generation, "suspects": len(verdict.suspects)}
        if (guilty := verdict.convicted) is not None:
            facts["quarantined"] = guilty.request.request_id
            self._quarantine.put(guilty.request)
            guilty.fail(CONVICTED)
            self._journal.remove(guilty)
            self._note_departures()
        if verdict.suspects or guilty is not None:
            logger.warning("requests blamed for the engine's death", extra={"facts": facts})
        return verdict.explains_death

    def _after_death(self, death: EngineDeath, *, ready_seconds: float, counts: bool) -> float | None:
        if death.is_configuration and self._limits is None:
            self._mistake = ConfigurationError(death.reason)
            self._give_up(death.reason)
            return None
        if death.is_planned:
            return 0.0
        delay = self._budget.next_delay(
            ready_seconds=ready_seconds, counts=counts, is_self_inflicted=death.is_self_inflicted
        )
        self._awaits_ready = self._awaits_ready and delay == 0.0
        self._settle_memory(death)
        if delay is None:
            self._give_up(f"{self._supervision.max_deaths} engines died without a token; the last: {death.reason}")
        return delay

    def _settle_memory(self, death: EngineDeath) -> None:
        """Drop what the next engine should not find."""
        if death.is_configuration or (death.is_self_inflicted and self._budget.num_of_own_making > 1):
            self._memory.drop()  # it may be what these engines have in common
        elif not death.leaves_memory_true:
            self._memory.drop_kv()

    def _give_up(self, reason: str) -> None:
        self._state = EngineState.FAILED
        self._awaits_ready = False
        self._detail = reason
        self._fail_all(f"the engine failed and cannot be replaced: {reason}")
        logger.error("no engine will be started any more", extra={"facts": {"reason": reason}})
        self._settled.set()
        self._renewed.set()
        self._failed.set()

    def _fail_all(self, message: str) -> None:
        for sequence in self._journal.pop_all():
            sequence.fail(message)
        self._empty.set()
