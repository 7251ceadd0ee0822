"""More than a server can do: overload, one heavy key beside light ones, and clients that hold on without reading.

The server is a `headwater serve` in processes of its own; the client's own CPU time is measured and told, for both
share this machine's cores.
"""

import asyncio
import os
import resource
import secrets
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec

from loadtest.arrivals import arrival_offsets
from loadtest.client import Client
from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.replicas import Replica
from loadtest.record import Outcome as Ended
from loadtest.record import RequestRecord

ROWS = 16
TARGET_TTFT = 2.0
"""Seconds: what counts as good under overload."""
FACTORS = (2, 5, 10)
MIN_GOODPUT, MAX_REFUSAL = 0.95, 0.050
NUM_LIGHT, MAX_RATIO = 9, 1.5
NUM_HELD, MAX_SLOWER, MAX_HEALTH = 1000, 1.10, 0.020
DRIP_SECONDS = 8.0
"""Between two bytes of a slow sender."""
PATH = "/v1/completions"
Make = Callable[[int], dict[str, object]]


async def run_overload(
    ledger: Ledger, *, flags: Sequence[str], cell: str, num_output: int, seconds: float, share_seconds: float = 4.0
) -> None:
    """Find the most that the server does, then ask for 2, 5 and 10 times as much. One trial each.

    Each takes `share_seconds` at least.
    """
    share = max(share_seconds, seconds / (len(FACTORS) + 2))
    limits = ("--max-num-seqs", str(ROWS), "--max-live-sequences", str(3 * ROWS), "--queue-timeout", str(TARGET_TTFT))
    async with served(*flags, *limits) as server:

        def make(index: int) -> dict[str, object]:
            return _body(index, num_prompt=24, num_output=num_output)

        async with Client(server.url, api_key=None, timeout_s=60) as client:
            await _closed(client, make, num_workers=2 * ROWS, seconds=share / 2)  # what is done once
            records = await _closed(client, make, num_workers=2 * ROWS, seconds=share)
        rate = _goodput(records)
        runs: list[tuple[int, list[RequestRecord], float]] = []
        for factor in FACTORS:
            async with Client(server.url, api_key=None, timeout_s=60) as client:
                cpu = time.process_time()
                records = await _open(client, make, rate=factor * rate, seconds=share)
                runs.append((factor, records, time.process_time() - cpu))
        # On a machine with other work the first measurement need not be the best one.
        peak = max(rate, *(_goodput(records) for _, records, _ in runs))
        for factor, records, cpu in runs:
            good = _goodput(records)
            refusals = sorted((r.end_ns - r.sent_ns) / 1e9 for r in records if r.outcome is Ended.REFUSED)
            broken = [r.detail for r in records if not r.is_completed and r.outcome is not Ended.REFUSED]
            p50, p99 = _at(refusals, 0.5), _at(refusals, 0.99)
            misses = [
                *([f"{100 * good / peak:.0f} % of the peak, the aim is 95 %"] if good < MIN_GOODPUT * peak else []),
                *([f"a refusal took {1e3 * p99:.0f} ms (p99), the aim is 50 ms"] if p99 > MAX_REFUSAL else []),
                *([f"{len(broken)} broken: {broken[0]}"] if broken else []),
            ]
            _judge(
                ledger,
                "overload",
                f"{cell}, {factor}x",
                misses,
                peak_per_second=peak,
                goodput_per_second=good,
                share=good / peak,
                offered_per_second=factor * rate,
                refused=len(refusals),
                refusal_p50_ms=1e3 * p50,
                refusal_p99_ms=1e3 * p99,
                client_cpu_share=cpu / share,
            )


async def run_fairness(
    ledger: Ledger, *, flags: Sequence[str], cell: str, seconds: float, warm_seconds: float = 3.0
) -> None:
    """Nine keys that ask now and then, alone and beside one that asks for all that it can get."""
    keys = [secrets.token_hex(16) for _ in range(1 + NUM_LIGHT)]
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
        file.write("\n".join(keys))
        file.flush()
        async with served(*flags, "--max-num-seqs", str(ROWS), "--api-key-file", file.name) as server:
            await _light(server, keys[1:], seconds=warm_seconds)  # what is done once
            alone = await _light(server, keys[1:], seconds=seconds / 2)
            heavy = asyncio.create_task(_heavy(server, keys[0]))
            await asyncio.sleep(1.0)
            beside = await _light(server, keys[1:], seconds=seconds / 2)
            heavy.cancel()
            with suppress(asyncio.CancelledError):
                await heavy
    before, after = (sorted(r.ttft for r in records if r.ttft is not None) for records in (alone, beside))
    ratio = _at(after, 0.5) / _at(before, 0.5)
    broken = [r.detail for r in (*alone, *beside) if not r.is_completed]
    misses = [
        *([f"the light keys' TTFT is {ratio:.2f} times what it is alone, the aim is 1.5"] if ratio > MAX_RATIO else []),
        *([f"{len(broken)} of the light keys' requests failed: {broken[0]}"] if broken else []),
    ]
    _judge(
        ledger,
        "fairness",
        cell,
        misses,
        ratio=ratio,
        ttft_alone_p50_ms=1e3 * _at(before, 0.5),
        ttft_beside_p50_ms=1e3 * _at(after, 0.5),
        ttft_alone_p99_ms=1e3 * _at(before, 0.99),
        ttft_beside_p99_ms=1e3 * _at(after, 0.99),
        requests=len(before) + len(after),
    )


async def run_slow(ledger: Ledger, *, flags: Sequence[str], cell: str, seconds: float) -> None:
    """Honest users alone, then beside 1,000 connections that send no end of a head, and 1,000 that read nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4 * NUM_HELD:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * NUM_HELD), hard))
    async with served(*flags, "--max-live-sequences", str(2 * NUM_HELD)) as server:
        await _honest(server, seconds=2.0)
        alone, health_alone = await _honest(server, seconds=seconds / 3)
        with ExitStack() as held:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: "
            senders = [held.enter_context(_connect(server.port, head)) for _ in range(NUM_HELD)]
            dripping = asyncio.create_task(_drip(senders))
            loris, health_loris = await _honest(server, seconds=seconds / 3)
            dripping.cancel()
        with ExitStack() as held:
            unread = _unread_request()
            for _ in range(NUM_HELD):
                held.enter_context(_connect(server.port, unread, room=4096))
            # Their streams must be over, or stand still: how long engines work for many is not asked here.
            await _until_quiet(server)
            readers, health_readers = await _honest(server, seconds=seconds / 3)
    base = _ttfts(alone)
    for name, records, health in (
        ("1,000 slow senders", loris, health_loris),
        ("1,000 slow readers", readers, health_readers),
    ):
        ttfts = _ttfts(records)
        slower = _at(ttfts, 0.99) / _at(base, 0.99)
        broken = [r.detail for r in records if not r.is_completed]
        probes = _at(health, 0.99)
        misses = [
            *([f"TTFT p99 is {slower:.2f} times what it is alone, the aim is 1.1"] if slower > MAX_SLOWER else []),
            *([f"/health took {1e3 * probes:.0f} ms (p99), the aim is 20 ms"] if probes > MAX_HEALTH else []),
            *([f"{len(broken)} failed: {broken[0]}"] if broken else []),
        ]
        _judge(
            ledger,
            "slow",
            f"{cell}, {name}",
            misses,
            slower=slower,
            ttft_alone_p99_ms=1e3 * _at(base, 0.99),
            ttft_p99_ms=1e3 * _at(ttfts, 0.99),
            ttft_p50_ms=1e3 * _at(ttfts, 0.5),
            health_p99_ms=1e3 * probes,
            health_alone_p99_ms=1e3 * _at(health_alone, 0.99),
            requests=len(ttfts),
        )


# Loads


def _body(index: int, *, num_prompt: int, num_output: int) -> dict[str, object]:
    prompt = [1000 + (index * 31 + position * 7) % 40_000 for position in range(num_prompt)]
    return {"prompt": prompt, "max_tokens": num_output, "ignore_eos": True, "stream": True, "temperature": 0}


async def _one(client: Client, body: dict[str, object], record: RequestRecord) -> RequestRecord:
    await client.stream(PATH, body, record)
    return record


async def _closed(client: Client, make: Make, *, num_workers: int, seconds: float) -> list[RequestRecord]:
    deadline = time.monotonic() + seconds
    records: list[RequestRecord] = []

    async def worker(number: int) -> None:
        while time.monotonic() < deadline:
            index = len(records) * num_workers + number
            records.append(await _one(client, make(index), RequestRecord(index=index, scheduled_ns=_now())))

    await asyncio.gather(*(worker(number) for number in range(num_workers)))
    return records


async def _open(client: Client, make: Make, *, rate: float, seconds: float) -> list[RequestRecord]:
    offsets = arrival_offsets(rate, max(1, int(rate * seconds)), seed=1, burstiness=1.0)
    start = _now()

    async def later(index: int, offset: float) -> RequestRecord:
        scheduled = start + round(offset * 1e9)
        await asyncio.sleep(max(0.0, (scheduled - _now()) / 1e9))
        return await _one(client, make(index), RequestRecord(index=index, scheduled_ns=scheduled))

    return await asyncio.gather(*(later(index, offset) for index, offset in enumerate(offsets)))


async def _light(server: Replica, keys: list[str], *, seconds: float) -> list[RequestRecord]:
    """Each key asks for little, and thinks in between."""
    deadline = time.monotonic() + seconds

    async def user(number: int, key: str) -> list[RequestRecord]:
        records: list[RequestRecord] = []
        async with Client(server.url, api_key=key, timeout_s=60) as client:
            while time.monotonic() < deadline:
                await asyncio.sleep(0.3 + 0.05 * number)
                index = 1000 * number + len(records)
                body = _body(index, num_prompt=20, num_output=8)
                records.append(await _one(client, body, RequestRecord(index=index, scheduled_ns=_now())))
        return records

    found = await asyncio.gather(*(user(number, key) for number, key in enumerate(keys)))
    return [record for records in found for record in records]


async def _heavy(server: Replica, key: str) -> None:
    """Always as much in flight as would fill the server four times over."""
    async with Client(server.url, api_key=key, timeout_s=60) as client:

        async def worker(number: int) -> None:
            for index in range(1_000_000):
                body = _body(number * 977 + index, num_prompt=200, num_output=64)
                await _one(client, body, RequestRecord(index=index, scheduled_ns=_now()))

        await asyncio.gather(*(worker(number) for number in range(4 * ROWS)))


async def _honest(server: Replica, *, seconds: float) -> tuple[list[RequestRecord], list[float]]:
    """A few users, and a probe that asks for /health all the while."""
    health: list[float] = []
    probing = asyncio.create_task(_probe(server.port, health))
    try:
        async with Client(server.url, api_key=None, timeout_s=60) as client:
            records = await _closed(
                client, lambda index: _body(index, num_prompt=24, num_output=8), num_workers=4, seconds=seconds
            )
    finally:
        probing.cancel()
    return records, sorted(health)


async def _probe(port: int, seen: list[float]) -> None:
    while True:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        await reader.read()
        seen.append(time.monotonic() - began)
        writer.close()
        await asyncio.sleep(0.05)


def _connect(port: int, data: bytes, *, room: int | None = None) -> socket.socket:
    connection = socket.socket()
    if room is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    connection.sendall(data)
    return connection


async def _drip(connections: list[socket.socket]) -> None:
    """One byte each, every few seconds, evenly spread; those that were cut are left."""
    while True:
        for connection in connections:
            await asyncio.sleep(DRIP_SECONDS / len(connections))
            with suppress(OSError):
                connection.send(b"a")


def _unread_request() -> bytes:
    # More than all buffers hold, in few events: how fast streams are written is not asked here.
    body = msgspec.json.encode(_body(1, num_prompt=4, num_output=100) | {"logprobs": 20})
    head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def _until_quiet(server: Replica) -> None:
    for _ in range(600):
        await asyncio.sleep(0.1)
        if not await asyncio.to_thread(lambda: server.num_live):
            return


@asynccontextmanager
async def served(*flags: str, stalls: Path | None = None) -> AsyncIterator[Replica]:
    """A server in processes of its own; `stalls` as `Replica` takes it."""
    server = Replica(*flags, stalls=stalls)
    try:
        await asyncio.to_thread(server.start)
        yield server
    finally:
        server.kill()


# Figures


def _judge(ledger: Ledger, item: str, cell: str, misses: list[str], **figures: float) -> None:
    outcome = Outcome.WRONG if misses else Outcome.SURVIVED
    ledger.add(item, cell, outcome, count=1, detail="; ".join(misses), load=os.getloadavg()[0], **figures)


def _goodput(records: list[RequestRecord]) -> float:
    good = [r for r in records if r.is_completed and r.ttft is not None and r.ttft <= TARGET_TTFT]
    first = min((record.scheduled_ns for record in records), default=0)
    last = max((record.end_ns for record in good), default=0)
    return len(good) / max(1e-9, (last - first) / 1e9)


def _ttfts(records: list[RequestRecord]) -> list[float]:
    return sorted(record.ttft for record in records if record.ttft is not None)


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def _now() -> int:
    return time.monotonic_ns()
