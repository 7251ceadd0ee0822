"""One engine from its start to its death: receives its messages, checks them, watches its progress.

Invariant: after `end`, the process is dead (or beyond SIGKILL's reach, which is logged) and its socket
closed; an engine is not replaced before.
"""

import asyncio
import logging
import signal
import time

from app.client.autopsy import MemoryWatch, find_kill_counter, is_self_inflicted, is_stopped, leaves_memory_true
from app.client.process import EngineProcess, describe_returncode
from app.client.settings import Supervision
from app.client.stall import StallWatch
from app.client.starvation import RunQueueWait
from app.ipc.api_end import ApiEnd
from app.ipc.messages import Fatal, FromEngine, Ready, StepOutputs, ToEngine
from app.ipc.transport import FrameError

logger = logging.getLogger("headwater.client")

SIGKILL_WAIT_SECONDS = 5.0
SOCKET_TO_EXIT_SECONDS = 1.0
"""The kernel closes a dying process's socket a little before there is an exit status."""
EXIT_POLL_SECONDS = 0.01


class EngineDeath(Exception):
    """An engine can no longer be used."""

    def __init__(
        self,
        reason: str,
        *,
        is_configuration: bool = False,
        is_self_inflicted: bool = True,
        leaves_memory_true: bool = False,
        is_planned: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_self_inflicted = is_self_inflicted
        """What it computed may have ended it; False where somebody outside did."""
        self.leaves_memory_true = leaves_memory_true
        """The next engine may believe what this one had sealed in the KV pool."""
        self.is_planned = is_planned
        """Its client ended it, to start another one."""
        self.is_configuration = is_configuration
        """The engine says that a restart would fail the same way."""


class EngineLife:
    """A running engine as its client sees it."""

    def __init__(self, process: EngineProcess, *, supervision: Supervision) -> None:
        self._process = process
        self._supervision = supervision
        self._stall = StallWatch(supervision)
        self._run_queue = RunQueueWait(process.pid)
        self._last_step_at: float | None = None
        self._end: ApiEnd | None = None
        self._watching: asyncio.Task[None] | None = None
        self._memory = MemoryWatch(find_kill_counter().read, time.monotonic())
        self._accusation: EngineDeath | None = None
        self._next_seq = 0
        self._ready_at: float | None = None
        self._keys_at_death: tuple[int, ...] = ()
        self._is_closed = False
        self.has_live = False
        """Whether sequences are with this engine; its client says so."""

    @property
    def generation(self) -> int:
        return self._process.generation

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ready_seconds(self) -> float:
        """How long it has been ready."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def retire(self, reason: str) -> None:
        """Kill the engine where it stands; `receive` raises a planned EngineDeath with this reason."""
        if self._accusation is None:
            self._accusation = EngineDeath(reason, is_self_inflicted=False, leaves_memory_true=True, is_planned=True)
        self._process.kill()

    async def begin(self) -> None:
        """Take over the socket and start to watch."""
        self._end = await ApiEnd.open(self._process.socket)
        self._watching = asyncio.create_task(self._watch(), name=f"watch-engine-{self.generation}")

    def send(self, message: ToEngine) -> None:
        """Never waits and never fails: a death shows in `receive`."""
        if self._end is not None:
            self._end.send(message)

    async def receive(self) -> Ready | StepOutputs:
        """The next message of this engine, checked. Raises EngineDeath."""
        assert self._end is not None
        while True:
            try:
                message = await self._end.receive()
            except FrameError as error:
                raise EngineDeath(f"the engine sent what is no message: {error}") from error
            if message is None:
                raise await self._explain_end()
            if message.generation < self.generation:
                continue  # a late message of an engine that was replaced
            self._check(message)
            if isinstance(message, Fatal):
                raise EngineDeath(message.reason, is_configuration=message.is_configuration)
            if isinstance(message, StepOutputs):
                stats = message.stats
                self._stall.times.note(stats.num_prefill_tokens + stats.num_decode_tokens, stats.step_seconds)
                self._last_step_at = time.monotonic()
            return message

    @property
    def last_step_age(self) -> float | None:
        """Seconds since the engine told of a step; None before the first."""
        return None if self._last_step_at is None else time.monotonic() - self._last_step_at

    @property
    def is_stalled(self) -> bool:
        """It will be replaced unless it makes progress soon: it hangs, or somebody stopped it."""
        return self._ready_at is not None and self._stall.is_suspicious

    @property
    def keys_at_death(self) -> tuple[int, ...]:
        """Keys of the sequences that the engine was computing when it died; known after `end`."""
        return self._keys_at_death

    async def end(self) -> None:
        """Kill the process, wait until it is gone, close what we hold of it. Harmless the second time."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
            if not self._watching.cancelled() and (error := self._watching.exception()):
                logger.error("the watch over the engine failed", exc_info=error)
            self._watching = None
        self._process.kill()
        if self._end is not None:
            self._end.close()
        if not await self._wait_for_exit(SIGKILL_WAIT_SECONDS):
            facts = {"pid": self._process.pid}
            logger.error("the engine outlives SIGKILL: its memory is not free", extra={"facts": facts})
        if not self._is_closed:
            self._is_closed = True
            progress = self._process.progress.read()
            if progress is not None:
                self._keys_at_death = progress.keys_at_work
            self._process.close()

    def _check(self, message: FromEngine) -> None:
        if message.generation != self.generation:
            raise EngineDeath(f"a message of generation {message.generation} came from engine {self.generation}")
        if message.seq != self._next_seq:
            raise EngineDeath(f"message {message.seq} of the engine came where {self._next_seq} was due")
        self._next_seq += 1
        if isinstance(message, Ready):
            if self._ready_at is not None:
                raise EngineDeath("the engine said twice that it is ready")
            self._ready_at = time.monotonic()
        elif isinstance(message, StepOutputs) and self._ready_at is None:
            raise EngineDeath("the engine sent outputs before it was ready")

    async def _watch(self) -> None:
        """End an engine that hangs, and notice one whose socket outlives it in a child of its own."""
        while True:
            await asyncio.sleep(self._supervision.tick_seconds)
            progress = self._process.progress.read()
            accusation = self._stall.look(
                progress,
                time.monotonic(),
                is_ready=self._ready_at is not None,
                has_live=self.has_live,
                is_stopped=is_stopped(self._process.pid),
                starved_seconds=self._run_queue.take(),
            )
            self._memory.tick(time.monotonic())
            if accusation is not None:
                if self._accusation is None:  # what is seen while the process goes is not what it is killed for
                    self._accusation = self._accuse(accusation)
                self._process.kill()
            if self._process.returncode is not None:
                await asyncio.sleep(self._supervision.tick_seconds)  # let what it had sent be read
                if self._end is not None:
                    self._end.close()
                return

    def _accuse(self, accusation: str) -> EngineDeath:
        if is_stopped(self._process.pid):
            reason = f"{accusation}: somebody had stopped it"
            return EngineDeath(reason, is_self_inflicted=False, leaves_memory_true=True)
        return EngineDeath(accusation, leaves_memory_true=True)  # we killed it, where it stood

    async def _explain_end(self) -> EngineDeath:
        """Why the socket closed: our own verdict where our kill was the end, else how the process ended."""
        await self._wait_for_exit(SOCKET_TO_EXIT_SECONDS)
        returncode = self._process.returncode
        was_out_of_memory = returncode == -signal.SIGKILL and self._memory.has_risen()
        accusation = self._accusation
        # A process that dumps its core, or gives much memory back, looks like one that hangs.
        if accusation is not None and returncode == -signal.SIGKILL and not was_out_of_memory:
            return accusation
        if accusation is not None and returncode is None:
            return EngineDeath(accusation.reason, is_self_inflicted=accusation.is_self_inflicted)
        return EngineDeath(
            describe_returncode(returncode, was_out_of_memory=was_out_of_memory),
            is_self_inflicted=is_self_inflicted(returncode, was_out_of_memory=was_out_of_memory),
            leaves_memory_true=leaves_memory_true(returncode, was_out_of_memory=was_out_of_memory),
        )

    async def _wait_for_exit(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._process.returncode is None:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(EXIT_POLL_SECONDS)
        return True
