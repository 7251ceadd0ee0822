"""A server that works for as long as it is let: what it holds must not grow, and every answer must stay right.

Halves: the first under `kill -9` of the engine now and then, where the API process is watched; the second without,
where the engine is old enough to be watched too. Clients think between requests, and some of them leave early.
"""

import asyncio
import itertools
import os
import random
import re
import signal
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx

from loadtest.faults.crowd import served
from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.replicas import WAIT_SECONDS, Replica
from loadtest.faults.streams import Body, Said, Stream, make_oracle, run_stream

NUM_WORKERS = 6
NUM_SAMPLES = 240
"""In each half, the settling included."""
SETTLING = 0.25
"""Share of a half before its samples count: allocators and caches fill up."""
MAX_MIB_PER_HOUR = 4.0
"""A server that grows by this runs for weeks in a gigabyte."""
MIN_HOURS = 0.25
"""A shorter half says what it saw of memory, and judges the rest."""
LEAVING = 0.15
"""Share of the streams that are left at a random moment."""
_HELD = re.compile(
    r"^headwater_(?:num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} ([0-9.e+-]+)$", re.MULTILINE
)
Oracle = list[tuple[str, Body, Said]]


class Holding(NamedTuple):
    """What one process holds at one moment."""

    at: float
    """Seconds, of the monotonic clock."""
    mib: float
    """Its own memory: what it shares with others counts in part (PSS), without the files it maps."""
    num_descriptors: int
    num_threads: int


class Trend(NamedTuple):
    """Of memory over time."""

    mib_per_hour: float
    margin: float
    """The 95 % interval is the trend and this to both sides."""


def trend(times: Sequence[float], mibs: Sequence[float]) -> Trend:
    """Least squares, in MiB an hour, over seconds. Raises ValueError for fewer than three samples.

    Neighbouring samples are alike, which makes the margin of all of them too small: means of ten stretches are taken.
    """
    if len(times) < 3:
        raise ValueError(f"{len(times)} samples have no trend: let it run longer")
    hours, levels = (_means([each / unit for each in values]) for values, unit in ((times, 3600.0), (mibs, 1.0)))
    slope, intercept = statistics.linear_regression(hours, levels)
    errors = sum((level - intercept - slope * hour) ** 2 for hour, level in zip(hours, levels, strict=True))
    middle = statistics.fmean(hours)
    spread = sum((hour - middle) ** 2 for hour in hours)
    return Trend(slope, 2.3 * (errors / max(1, len(hours) - 2) / spread) ** 0.5)


def _means(values: Sequence[float]) -> list[float]:
    size = max(1, len(values) // 10)
    return [statistics.fmean(values[start : start + size]) for start in range(0, len(values) - size + 1, size)]


class _Load:
    """Streams one after the other, each held to its uninterrupted run or left early."""

    def __init__(self, port: int, oracle: Oracle, *, seed: int, think_seconds: float) -> None:
        self._port = port
        self._oracle = [each for each in oracle if each[0] != "unseeded"]
        self._rng = random.Random(seed)
        self._think_seconds = think_seconds
        self._numbers = itertools.count()
        self.num_equal = self.num_left = 0
        self.wrong: list[str] = []

    async def work(self, ending: asyncio.Event) -> None:
        """Until told to end."""
        while not ending.is_set():
            await asyncio.sleep(self._rng.random() * 2 * self._think_seconds)
            kind, body, expected = self._oracle[next(self._numbers) % len(self._oracle)]
            stream = Stream(body, kind)
            if self._rng.random() < LEAVING:
                with suppress(TimeoutError):
                    await asyncio.wait_for(run_stream(self._port, stream), self._rng.random())
                self.num_left += 1
                continue
            await run_stream(self._port, stream)
            said = stream.said()
            if said == expected and not stream.broken:
                self.num_equal += 1
            else:
                self.wrong.append(f"{kind}: status {stream.status}, {said.error or stream.broken or 'differs'}")


async def run_soak(
    ledger: Ledger,
    *,
    flags: Sequence[str],
    bodies: list[tuple[str, Body]],
    cell: str,
    seconds: float,
    seed: int,
    kill_seconds: float = 20.0,
    think_seconds: float = 1.0,
) -> None:
    """Two halves, one trial each."""
    async with served(*flags) as server:
        oracle = await make_oracle(server.port, bodies)
        for name, kills_every in (("under kills", kill_seconds), ("no kills", None)):
            load = _Load(server.port, oracle, seed=seed, think_seconds=think_seconds)
            ending = asyncio.Event()
            workers = [asyncio.create_task(load.work(ending)) for _ in range(NUM_WORKERS)]
            samples, num_kills = await _watch(server, seconds=seconds / 2, kills_every=kills_every)
            ending.set()
            await asyncio.gather(*workers)
            watched = {"api": [api for api, _ in samples]}
            if kills_every is None:
                watched["engine"] = [engine for _, engine in samples]
            misses, figures = _judged(watched)
            held = await _still_held(server)
            figures |= {
                "hours": seconds / 2 / 3600,
                "kills": num_kills,
                "equal": load.num_equal,
                "left": load.num_left,
                "differing": len(load.wrong),
            }
            misses += load.wrong[:3] + ([f"still held when nobody asks: {held}"] if held else [])
            ledger.add(
                "soak",
                f"{cell}, {name}",
                Outcome.WRONG if misses else Outcome.SURVIVED,
                count=1,
                detail="; ".join(misses),
                **figures,
            )


async def _watch(
    server: Replica, *, seconds: float, kills_every: float | None
) -> tuple[list[tuple[Holding, Holding]], int]:
    """Samples of API process and engine until the time is over, and how many engines were killed."""
    began = killed = time.monotonic()
    samples: list[tuple[Holding, Holding]] = []
    num_kills = 0
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_SECONDS) as http:
        while (now := time.monotonic()) < began + seconds:
            engine_pid = (await http.get("/ready")).json().get("engine_pid")
            if engine_pid is not None and kills_every is not None and now > killed + kills_every:
                killed = now
                with suppress(ProcessLookupError):
                    os.kill(engine_pid, signal.SIGKILL)
                    num_kills += 1
            elif engine_pid is not None and now > began + SETTLING * seconds:
                with suppress(FileNotFoundError, ProcessLookupError):  # it was just replaced
                    samples.append((holding(server.pid), holding(engine_pid)))
            await asyncio.sleep(seconds / NUM_SAMPLES)
    return samples, num_kills


def holding(pid: int) -> Holding:
    """Of a live process. Raises FileNotFoundError or ProcessLookupError where it is none."""
    folder = Path(f"/proc/{pid}")
    amounts = {
        line.partition(":")[0]: int(line.split()[1])
        for line in (folder / "smaps_rollup").read_text().splitlines()[1:]
        if line.endswith("kB")
    }
    status = (folder / "status").read_text()
    return Holding(
        time.monotonic(),
        amounts["Pss_Anon"] / 1024,
        len(list((folder / "fd").iterdir())),
        int(status.partition("Threads:")[2].split()[0]),
    )


def _judged(watched: dict[str, list[Holding]]) -> tuple[list[str], dict[str, float]]:
    """What grew, and the figures of each process."""
    misses: list[str] = []
    figures: dict[str, float] = {}
    for name, samples in watched.items():
        slope = trend([each.at for each in samples], [each.mib for each in samples])
        figures |= {
            f"{name}_mib": statistics.fmean(each.mib for each in samples[-3:]),
            f"{name}_mib_per_hour": slope.mib_per_hour,
            f"{name}_margin": slope.margin,
        }
        is_long = samples[-1].at - samples[0].at > MIN_HOURS * 3600 * (1 - 2 * SETTLING)
        if is_long and slope.mib_per_hour - slope.margin > MAX_MIB_PER_HOUR:
            misses.append(f"{name}: grows by {slope.mib_per_hour:.1f} MiB an hour (+- {slope.margin:.1f})")
        third = max(1, len(samples) // 3)
        for kind in ("num_descriptors", "num_threads"):
            early, late = (
                statistics.median(getattr(each, kind) for each in part) for part in (samples[:third], samples[-third:])
            )
            figures[f"{name}_{kind.removeprefix('num_')}"] = late
            if late > early + NUM_WORKERS:  # connections come and go
                misses.append(f"{name}: {late:g} {kind.removeprefix('num_')}, before {early:g}")
    return misses, figures


async def _still_held(server: Replica) -> list[str]:
    """Gauges that are not 0 although nobody asks."""
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_SECONDS) as http:
        for _ in range(100):
            held = [found[0] for found in _HELD.finditer((await http.get("/metrics")).text) if float(found[1])]
            if not held:
                return []
            await asyncio.sleep(0.1)
    return held
