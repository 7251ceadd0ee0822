"""What the API process needs of engines, as a protocol: one local engine is `app.client.local`."""

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

import msgspec

from app.core.types import EngineLimits, EngineOutput, EngineRequest, StepStats


class EngineState(StrEnum):
    """Where the engine stands. Only READY takes new requests."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"


class EngineStatus(msgspec.Struct, frozen=True):
    """A snapshot for /ready, /metrics and the log."""

    state: EngineState
    generation: int
    """1 for the first engine, one more with each replacement."""
    detail: str
    """One clause for people: why it is not ready, how it last died."""
    last_step: StepStats | None
    num_live_requests: int
    """Sequences in the journal: admitted and not finished."""
    engine_pid: int | None = None
    """The engine's process; None while there is none, and where it is not on this machine."""
    last_step_age: float | None = None
    """Seconds since the engine told of a step; None where it has not yet."""
    is_stalled: bool = False
    """The engine makes no progress although it should, or was stopped; it is replaced if that goes on."""
    takes_requests: bool = False
    """New sequences are admitted: an engine is ready, or is replaced at once and they wait for the next one."""


class EngineClient(Protocol):
    """Engines behind one interface. All methods belong to the event loop's thread."""

    @property
    def status(self) -> EngineStatus: ...

    @property
    def limits(self) -> EngineLimits | None:
        """Of the engine that was ready last; None before the first one was."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Journal and run one sequence; yields until the output with a finish reason.

        Closing the iterator early aborts the sequence within one engine step. Engines may be replaced
        meanwhile: the iterator goes on with the next token. Raises EngineUnavailable where no engine
        takes requests, EngineFailed where the sequence cannot be finished.
        """
        ...

    async def start(self) -> None:
        """Begin to supervise; returns at once, before an engine is ready."""
        ...

    async def wait_ready(self, timeout: float) -> EngineLimits:
        """Wait for the first engine. Raises ConfigurationError or EngineUnavailable."""
        ...

    async def drain(self, timeout: float) -> None:
        """Refuse new sequences and wait until the live ones have finished or `timeout` seconds passed."""
        ...

    async def stop(self) -> None:
        """End the engine and every sequence still live (finish reason abort)."""
        ...
