"""How engines begin and end: with their socket, their parent, by the budget, by wrong settings, by broken protocol."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from app.client.autopsy import is_stopped
from app.client.engine_client import EngineState
from app.client.local import WOKEN_AT_ONCE, LocalEngineClient
from app.client.process import EngineLaunch, EngineProcess
from app.client.supervisor import EngineDeath, EngineLife
from app.core.config import EngineConfig
from app.core.errors import ConfigurationError, EngineFailed, EngineUnavailable
from app.core.types import EngineRequest, FinishReason
from app.ipc.progress import EnginePhase
from tests.process.engines import (
    FAKE_ENGINE,
    IMPATIENT,
    WAIT_SECONDS,
    Answer,
    complete,
    hurt,
    request,
    running,
    scripted,
    until,
)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def phase_of(process: EngineProcess) -> EnginePhase:
    progress = process.progress.read()
    assert progress is not None
    return progress.phase


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("load_seconds", [0.0, 60.0])
def test_the_engine_exits_when_its_socket_closes_and_ignores_polite_signals(load_seconds: float) -> None:
    process = EngineProcess.spawn(1, scripted(load_seconds=load_seconds))
    try:
        expected = EnginePhase.LOADING if load_seconds else EnginePhase.IDLE
        wait_for(lambda: phase_of(process) is expected)
        assert os.getsid(process.pid) == process.pid
        assert Path(f"/proc/{process.pid}/comm").read_text().strip() == "headwater-eng"
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
        assert process.returncode is None
        process.socket.close()
        wait_for(lambda: process.returncode is not None)
        assert process.returncode == 0
    finally:
        process.kill()
        wait_for(lambda: process.returncode is not None)
        process.close()


PARENT = """
import asyncio, sys
from tests.process.engines import running, request, scripted
async def main():
    async with running(scripted(step_seconds=60.0)) as client:
        print(client.engine_pid, flush=True)
        await anext(client.generate(request("a")))
asyncio.run(main())
"""


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_engine_goes_with_a_parent_that_is_killed(is_stopped: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine_pid = int(parent.stdout.readline())
    if is_stopped:
        os.kill(engine_pid, signal.SIGSTOP)
    assert is_alive(engine_pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not is_alive(engine_pid))


async def test_the_first_engine_may_be_spawned_beforehand() -> None:
    config = scripted()
    first = EngineProcess.spawn(1, config)
    client = LocalEngineClient(config, first=first, supervision=IMPATIENT)
    await client.start()
    await client.wait_ready(WAIT_SECONDS)
    assert client.engine_pid == first.pid
    await client.stop()
    assert first.returncode is not None


async def test_a_client_that_never_started_ends_its_first_engine() -> None:
    first = EngineProcess.spawn(1, scripted())
    await LocalEngineClient(scripted(), first=first).stop()
    assert first.returncode is not None


async def test_stop_ends_live_sequences_and_the_engine() -> None:
    async with running(scripted(step_seconds=0.01)) as client:
        answer = Answer()
        task = asyncio.create_task(answer.fill(client, request("a", max_tokens=3000)))
        await until(lambda: bool(answer.token_ids))
        pid = client.engine_pid
        await client.stop()
        await task
        assert answer.finish_reason is FinishReason.ABORT
        assert pid is not None
        assert not is_alive(pid)
        with pytest.raises(EngineUnavailable):
            await complete(client, request("b"))


async def test_drain_refuses_new_sequences_and_waits_for_the_live_ones() -> None:
    async with running(scripted(step_seconds=0.002)) as client:
        answer = Answer()
        task = asyncio.create_task(answer.fill(client, request("a", max_tokens=100)))
        await until(lambda: bool(answer.token_ids))
        await client.drain(0.01)
        assert not task.done()
        assert client.status.state is EngineState.DRAINING
        with pytest.raises(EngineUnavailable):
            await complete(client, request("b"))
        hurt(client, signal.SIGKILL)  # a drain survives its engine too
        await client.drain(WAIT_SECONDS)
        await task
        assert len(answer.token_ids) == 100


async def test_a_configuration_error_is_not_tried_again() -> None:
    for config in (
        scripted(fail_load="configuration"),
        scripted(no_such_setting=1),
        EngineConfig(model_dir="/nowhere", tier="steam"),
    ):
        client = LocalEngineClient(config, supervision=IMPATIENT)
        await client.start()
        with pytest.raises(ConfigurationError):
            await client.wait_ready(WAIT_SECONDS)
        assert (client.status.state, client.status.generation) == (EngineState.FAILED, 1)
        await client.stop()


@pytest.mark.parametrize("how", ["exit", "raise"])
async def test_engines_that_do_not_load_spend_the_budget(how: str) -> None:
    supervision = msgspec.structs.replace(IMPATIENT, max_deaths=3)
    client = LocalEngineClient(scripted(fail_load=how), supervision=supervision)
    await client.start()
    await asyncio.wait_for(client.wait_failed(), WAIT_SECONDS)
    with pytest.raises(EngineUnavailable, match="status 12" if how == "exit" else "the script fails the load"):
        await client.wait_ready(WAIT_SECONDS)
    assert client.status.generation == 3
    await client.stop()


async def test_a_load_that_takes_too_long_is_given_up() -> None:
    supervision = msgspec.structs.replace(IMPATIENT, load_seconds=0.3, max_deaths=1)
    client = LocalEngineClient(scripted(load_seconds=60.0), supervision=supervision)
    await client.start()
    with pytest.raises(EngineUnavailable, match="load"):
        await client.wait_ready(WAIT_SECONDS)
    await client.stop()


@pytest.mark.parametrize("max_deaths", [1, 3])  # 3: one of both sequences, then one for each that is found guilty
async def test_engines_that_die_without_a_token_spend_the_budget(max_deaths: int) -> None:
    supervision = msgspec.structs.replace(IMPATIENT, max_deaths=max_deaths)
    async with running(scripted(crash_on_token=13, load_seconds=0.2), supervision=supervision) as client:
        hurt(client, signal.SIGKILL)  # both wait for the next engine: they come in one message, so into one step
        await until(lambda: client.status.state is EngineState.RESTARTING)
        asked = [request(f"r{index}") for index in range(2)]
        results = await asyncio.gather(*(complete(client, each) for each in asked), return_exceptions=True)
        assert all(isinstance(result, EngineFailed) for result in results)
        assert client.status.state is EngineState.FAILED
        assert client.status.num_live_requests == 0
        with pytest.raises(EngineUnavailable) as refused:
            await complete(client, request("late"))
        assert refused.value.retry_after is None


async def test_a_supervisor_that_failed_takes_no_requests() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    client = LocalEngineClient(scripted(), supervision=IMPATIENT, on_step=fail)
    await client.start()
    try:
        await client.wait_ready(WAIT_SECONDS)
        with pytest.raises(EngineFailed, match="injected"):
            await complete(client, request("a"))
        assert client.status.state is EngineState.FAILED and not client.status.takes_requests
        with pytest.raises(EngineUnavailable):
            await complete(client, request("late"))
    finally:
        await client.stop()


@pytest.mark.parametrize("how", ["gap", "repeat", "future", "ready_twice", "garbage", "half", "closes", "deaf"])
async def test_an_engine_that_breaks_the_protocol_is_replaced(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_FAKE", how)
    supervision = msgspec.structs.replace(IMPATIENT, hang_seconds=0.3)
    async with running(scripted(), supervision=supervision, launch=EngineLaunch(command=FAKE_ENGINE)) as client:
        answer = Answer()
        task = asyncio.create_task(answer.fill(client, request("a")))
        await until(lambda: client.status.generation >= 2)
        assert 2 not in answer.token_ids
        await client.stop()
        await task


async def test_outputs_before_ready_are_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_FAKE", "early")
    supervision = msgspec.structs.replace(IMPATIENT, max_deaths=1)
    client = LocalEngineClient(scripted(), supervision=supervision, launch=EngineLaunch(command=FAKE_ENGINE))
    await client.start()
    with pytest.raises(EngineUnavailable, match="before it was ready"):
        await client.wait_ready(WAIT_SECONDS)
    await client.stop()


async def test_late_messages_of_an_old_engine_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_FAKE", "late")
    async with running(scripted(), launch=EngineLaunch(command=FAKE_ENGINE)) as client:
        stream = client.generate(request("a"))
        assert (await anext(stream)).token_ids == (1,)
        await stream.aclose()
        assert client.status.generation == 1


class LingeringProcess(EngineProcess):
    """A stopped engine that is slow to die: it leaves its stop with the first kill and goes with the second."""

    num_kills = 0

    def kill(self) -> None:
        self.num_kills += 1
        if self.num_kills == 1:
            os.kill(self.pid, signal.SIGCONT)
            wait_for(lambda: not is_stopped(self.pid))
        else:
            super().kill()


class DumpingProcess(EngineProcess):
    """Has crashed, and takes so long to say so that it is taken for one that hangs."""

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGSEGV)
            os.kill(self.pid, signal.SIGCONT)
            wait_for(lambda: self.returncode is not None)


async def death_of_stopped(kind: type[EngineProcess], *, match: str) -> EngineDeath:
    """What is said of an engine that is stopped while it loads, and accused for it."""
    process = kind.spawn(1, scripted(load_seconds=60.0))
    life = EngineLife(process, supervision=msgspec.structs.replace(IMPATIENT, load_seconds=0.3))
    await life.begin()
    await until(lambda: phase_of(process) is EnginePhase.LOADING)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(EngineDeath, match=match) as death:
            await life.receive()
        return death.value
    finally:
        await life.end()


async def test_an_accusation_stands_while_the_process_goes() -> None:
    assert not (await death_of_stopped(LingeringProcess, match="somebody had stopped it")).is_self_inflicted


async def test_a_crash_that_looked_like_a_hang_is_a_crash() -> None:
    death = await death_of_stopped(DumpingProcess, match="SIGSEGV")
    assert death.is_self_inflicted and not death.leaves_memory_true


LOADS_NO_TORCH = """
import asyncio, sys
from pathlib import Path
from tests.process.engines import complete, request, running, scripted
async def main():
    async with running(scripted()) as client:
        await complete(client, request("a"))
        print(*(line.split()[-1] for line in Path(f"/proc/{client.engine_pid}/maps").read_text().splitlines()))
asyncio.run(main())
print("modules", *sys.modules)
"""


def test_neither_the_client_nor_a_scripted_engine_loads_torch_numpy_or_fastapi() -> None:
    done = subprocess.run([sys.executable, "-c", LOADS_NO_TORCH], capture_output=True, text=True, check=True)
    maps, _, modules = done.stdout.partition("modules")
    assert "python" in maps
    assert "torch" not in maps
    assert "numpy" not in maps
    assert not {"torch", "numpy", "transformers", "fastapi", "app.engine", "app.scheduler"} & set(modules.split())


async def test_a_step_of_many_streams_leaves_turns_of_the_loop_to_others() -> None:
    turn = 0
    woken: Counter[int] = Counter()

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def follow(asked: EngineRequest) -> None:
        async for _ in client.generate(asked):
            woken[turn] += 1

    config = msgspec.structs.replace(scripted(step_seconds=0.02, max_num_batched_tokens=4096), max_num_seqs=200)
    async with running(config) as client:
        counting = asyncio.create_task(count_turns())
        await asyncio.gather(*(follow(request(f"r{number}", max_tokens=3)) for number in range(200)))
        counting.cancel()
    assert woken.total() >= 200
    assert max(woken.values()) <= 2 * WOKEN_AT_ONCE
