"""Helpers of the process tests: a client over a real scripted engine, and ways to look at and to hurt that engine."""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from app.client.engine_client import EngineState
from app.client.local import LocalEngineClient
from app.client.process import EngineLaunch
from app.client.settings import Supervision
from app.core.config import EngineConfig
from app.core.types import EngineOutput, EngineRequest, FinishReason, SamplingParams

IMPATIENT = Supervision(
    hang_seconds=1.0,
    unknown_step_seconds=0.1,
    unknown_token_seconds=0.0,
    tick_seconds=0.05,
    backoff_seconds=0.01,
    load_seconds=30.0,
)
WAIT_SECONDS = 30.0
FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))


def scripted(**settings: float | int | str) -> EngineConfig:
    """Configuration of a scripted engine."""
    return EngineConfig(model_dir="/nowhere", tier="scripted", eos_token_ids=(), scripted=settings)


def request(
    request_id: str,
    *,
    prompt: tuple[int, ...] = (11, 12, 13),
    max_tokens: int = 20,
    temperature: float = 0.0,
    num_logprobs: int | None = None,
) -> EngineRequest:
    params = SamplingParams(
        seed=sum(request_id.encode()), max_tokens=max_tokens, temperature=temperature, num_logprobs=num_logprobs
    )
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params)


@asynccontextmanager
async def running(
    config: EngineConfig, *, supervision: Supervision = IMPATIENT, launch: EngineLaunch | None = None
) -> AsyncIterator[LocalEngineClient]:
    """A client whose first engine is ready."""
    client = LocalEngineClient(config, supervision=supervision, launch=launch)
    await client.start()
    try:
        await client.wait_ready(WAIT_SECONDS)
        yield client
    finally:
        await client.stop()


class Answer:
    """What one sequence has brought so far."""

    def __init__(self) -> None:
        self.outputs: list[EngineOutput] = []

    @property
    def token_ids(self) -> list[int]:
        return [token_id for output in self.outputs for token_id in output.token_ids]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None

    async def fill(self, client: LocalEngineClient, asked: EngineRequest) -> "Answer":
        async for output in client.generate(asked):
            self.outputs.append(output)
        return self


async def complete(client: LocalEngineClient, asked: EngineRequest) -> Answer:
    """Run one sequence to its end."""
    return await Answer().fill(client, asked)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other tasks and processes bring about."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in another process
            await asyncio.sleep(0.005)


async def until_ready(client: LocalEngineClient) -> None:
    await until(lambda: client.status.state is EngineState.READY)


async def until_idle(client: LocalEngineClient) -> None:
    """Until the engine has said that it holds nothing."""
    await until(lambda: _is_idle(client))


def hurt(client: LocalEngineClient, number: signal.Signals) -> None:
    """Send a signal to the engine."""
    assert client.engine_pid is not None
    os.kill(client.engine_pid, number)


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """This process can open nothing any more until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _is_idle(client: LocalEngineClient) -> bool:
    step = client.status.last_step
    return step is not None and (step.num_running, step.num_waiting, step.num_kv_blocks_used) == (0, 0, 0)
