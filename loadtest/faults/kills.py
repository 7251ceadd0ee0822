"""`kill -9` back to back at random steps under live streams of mixed kinds."""

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field

from app.client.settings import Supervision
from app.settings import Settings
from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.server import FaultServer, serving, until
from loadtest.faults.streams import Body, Said, Stream, make_oracle, run_stream

Oracle = list[tuple[str, Body, Said]]
MAX_UNSEEDED = 60
"""Unseeded streams that are run again, uninterrupted, with the seed that they drew."""


@dataclass
class _Load:
    """Keeps a number of streams alive, and holds each that ends to its uninterrupted run."""

    server: FaultServer
    oracle: Oracle
    live: set[int] = field(default_factory=set)
    streams: dict[int, Stream] = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=dict)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    unseeded: list[Stream] = field(default_factory=list)
    is_ending: bool = False

    async def work(self, worker: int, ids: "itertools.count[int]") -> None:
        """One stream after the other until told to end."""
        while not self.is_ending:
            if not await until(lambda: self.server.is_ready or self.is_ending):
                return
            number = next(ids)
            kind, body, expected = self.oracle[(worker + number) % len(self.oracle)]
            stream = self.streams[number] = Stream(body, kind)
            self.live.add(number)
            await run_stream(self.server.port, stream)
            self.live.discard(number)
            del self.streams[number]
            self._compare(stream, expected)

    def _compare(self, stream: Stream, expected: Said) -> None:
        if stream.status == 503:
            return  # refused while an engine was being replaced: it was never admitted
        if stream.kind == "unseeded":
            self.unseeded.append(stream)
            return
        self.note(stream, expected)

    def note(self, stream: Stream, expected: Said) -> None:
        """Count a stream, and keep what is wrong with it."""
        said = stream.said()
        self.compared[stream.kind] = self.compared.get(stream.kind, 0) + 1
        if said != expected or stream.broken:
            error = said.error or stream.broken or ("differs" if said.is_whole else "cut")
            self.wrong.append((stream.kind, f"status {stream.status}: {error}"))


async def run_kills(
    settings: Settings,
    bodies: list[tuple[str, Body]],
    ledger: Ledger,
    *,
    cell: str,
    num_streams: int,
    num_kills: int,
    seconds: float,
    seed: int,
    supervision: Supervision | None = None,
) -> None:
    """At most so many kills in at most so many seconds; each kill waits until every live stream has gone on."""
    async with serving(settings, supervision=supervision) as server:
        oracle = await make_oracle(server.port, bodies)
        load = _Load(server, oracle)
        ids = itertools.count()
        workers = [asyncio.create_task(load.work(index, ids)) for index in range(num_streams)]
        rng = random.Random(seed)
        deadline = time.monotonic() + seconds
        for _ in range(num_kills):
            if time.monotonic() > deadline or not await _kill(load, rng, ledger, cell=cell):
                break
        load.is_ending = True
        await asyncio.gather(*workers)
        await _check_unseeded(load)
        _report(load, ledger, cell=cell)


async def _kill(load: _Load, rng: random.Random, ledger: Ledger, *, cell: str) -> bool:
    server = load.server
    if not await until(lambda: server.is_ready and bool(load.live)):
        ledger.add("kills", cell, Outcome.WRONG, detail=f"no engine came back: {server.client.status.detail}")
        return False
    await _steps(server, rng.randrange(1, 24))
    generation = server.generation
    at = time.monotonic()
    waiting = {number: load.streams[number] for number in load.live if load.streams[number].last_at}
    is_killed = server.kill_engine()
    await until(lambda: server.generation > generation or server.has_failed)
    if not is_killed or server.has_failed:
        ledger.add("kills", cell, Outcome.WRONG, detail="the engine was not replaced")
        return False
    replaced = time.monotonic()
    waiting = {number: stream for number, stream in waiting.items() if not stream.is_done}
    await until(lambda: any(s.last_at > replaced or s.is_done for s in waiting.values()) or not waiting)
    first = time.monotonic() - at
    whole = await until(lambda: all(s.last_at > replaced or s.is_done for s in waiting.values()))
    last = time.monotonic() - at
    outcome = Outcome.SURVIVED if whole else Outcome.WRONG
    ledger.add("kills", cell, outcome, first=first, last=last, streams=float(len(waiting)))
    return True


async def _steps(server: FaultServer, count: int) -> None:
    """Wait for so many steps of the present engine."""

    def step_id() -> int:
        step = server.client.status.last_step
        return 0 if step is None else step.step_id

    begin = step_id()
    await until(lambda: step_id() >= begin + count, seconds=10.0)


async def _check_unseeded(load: _Load) -> None:
    """With the seed that was drawn and told in the header, an unseeded stream has an uninterrupted run too."""
    chosen = load.unseeded[:MAX_UNSEEDED]
    repeated = [Stream(stream.body | {"seed": int(stream.seed)}, stream.kind) for stream in chosen]
    await asyncio.gather(*(run_stream(load.server.port, again) for again in repeated))
    for stream, again in zip(chosen, repeated, strict=True):
        load.note(stream, again.said())


def _report(load: _Load, ledger: Ledger, *, cell: str) -> None:
    for kind, detail in load.wrong:
        ledger.add("streams", f"{cell}: {kind}", Outcome.WRONG, detail=detail)
    for kind, count in load.compared.items():
        num_wrong = sum(1 for other, _ in load.wrong if other == kind)
        if count > num_wrong:
            ledger.add("streams", f"{cell}: {kind}", Outcome.SURVIVED, count=count - num_wrong)
