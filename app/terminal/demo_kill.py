"""The demo's `kill -9`: which process, when, and whether it is really an engine of this machine.

A server may name any process in its answer. It is killed only where the server is on this machine and
the process runs a Headwater engine; a process that the person named by --pid is theirs to judge.
"""

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from app.terminal.demo_round import Kill, Killer, Watch
from app.terminal.wire import ApiError, is_loopback, read_ready

POLL_SECONDS = 0.005
_ENGINE_MARK = b"app.engine"

FindEngine = Callable[[int | None], Awaitable[int | None]]
"""Takes the pid that was killed last; the pid of its successor, None while there is none."""


def engine_of(http: httpx.AsyncClient) -> FindEngine:
    """Engines as /ready names them."""

    async def find(previous: int | None) -> int | None:
        ready = read_ready(await http.get("/ready"))
        if ready is None or ready.state != "ready" or ready.engine_pid == previous:
            return None
        return ready.engine_pid

    return find


def engine_given(pid: int) -> FindEngine:
    """The one engine that a person named; who follows it is not known."""

    async def find(previous: int | None) -> int | None:
        return pid if previous is None else None

    return find


def why_not_killable(url: str, pid: int) -> str | None:
    """Why a pid that a server named is left alone; None where it is an engine of this machine."""
    if not is_loopback(url):
        return "the server is on another machine"
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return f"process {pid} is not to be seen from here"
    return None if _ENGINE_MARK in command else f"process {pid} is no engine of Headwater"


def kill_engine(pid: int, *, url: str, is_given: bool) -> None:
    """SIGKILL, to the very process that was looked at. Raises ApiError."""
    try:
        process = os.pidfd_open(pid)
    except OSError as error:
        raise ApiError(f"cannot kill process {pid}: {error.strerror}") from None
    try:
        reason = None if is_given else why_not_killable(url, pid)
        if reason is not None:
            raise ApiError(f"will not kill: {reason}")
        signal.pidfd_send_signal(process, signal.SIGKILL)
    except OSError as error:
        raise ApiError(f"cannot kill process {pid}: {error.strerror}") from None
    finally:
        os.close(process)


def make_killer(
    find: FindEngine, kill: Callable[[int], None], *, num_kills: int, num_characters: int, seed: int
) -> Killer:
    """Kills at seeded random moments, one in each part of a round of about so many characters.

    Each waits until every stream has moved again after the last one.
    """

    async def killer(watch: Watch) -> None:
        draw = random.Random(seed)
        since = (0,) * len(watch.streams)
        pid = await _next_engine(find, None, watch)
        for number in range(num_kills):
            share = (number + draw.uniform(0.1, 0.9)) / (num_kills + 1)
            if pid is None or not await _moment(watch, since, share * num_characters):
                return
            reached, killed, victim = watch.num_characters, time.monotonic(), pid
            kill(victim)
            pid = await _next_engine(find, victim, watch)
            since = watch.event_counts()
            has_moved = pid is not None and await _moment(watch, since, 0.0)
            watch.kills.append(Kill(victim, reached, time.monotonic() - killed if has_moved else None))

    return killer


async def _moment(watch: Watch, since: tuple[int, ...], num_characters: float) -> bool:
    return await watch.until(lambda: watch.have_moved(since) and watch.num_characters >= num_characters)


async def _next_engine(find: FindEngine, previous: int | None, watch: Watch) -> int | None:
    """The engine after `previous`; None where the streams end first, or nothing answers."""
    while not watch.is_over:
        try:
            pid = await find(previous)
        except httpx.HTTPError:
            return None
        if pid is not None:
            return pid
        await asyncio.sleep(POLL_SECONDS)
    return None
