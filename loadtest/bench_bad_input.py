"""`python -m loadtest.bench_bad_input`: what streams feel while somebody else sends what must be refused.

A server of its own, or one at `--url`, keeps a few greedy streams running. Each kind of bad input is then sent by a
process of its own for a while, `--rate` times a second, between two whiles without; rounds of all kinds take turns.
The figures: the slowest refusal, and the median over rounds of what the streams' inter-token latencies (p50, p99) are
beside those of the quiet whiles around. The first kind is the control: a small request with a plain mistake, which
costs little but the sender's own share of the machine. Exit status 0: every answer was a refusal, within a second.
"""

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from statistics import median

import httpx
import uvloop

from loadtest.client import Client
from loadtest.faults.replicas import replicas
from loadtest.faults.server import DEFAULT_MODEL
from loadtest.record import RequestRecord
from loadtest.run import RunConfig, request_body
from loadtest.summary import percentile

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MOST_SECONDS = 1.0
"""A refusal takes no longer."""
LEVELS = 100_000
_HEADERS = {"content-type": "application/json"}


def _body(**fields: object) -> bytes:
    return json.dumps({"max_tokens": 8} | fields).encode()


def _chat(**fields: object) -> bytes:
    return _body(messages=[{"role": "user", "content": "Hi"}], **fields)


def _tool(**function: object) -> bytes:
    return _chat(tools=[{"type": "function", "function": {"name": "f", **function}}], tool_choice="required")


def _schema(schema: str) -> bytes:
    """A completion held to a schema that json.dumps could not write: it may be nested too deeply."""
    form = b'{"type": "json_schema", "json_schema": {"name": "s", "schema": %s}}' % schema.encode()
    return b'{"prompt": "a", "response_format": %s}' % form


def _one_of_bomb(depth: int = 24) -> bytes:
    """Each definition is one of twice the next: 2^24 ways to the end."""
    definitions = {f"d{index}": {"oneOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in range(depth)}
    schema = {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{depth}": {"type": "integer"}}}
    return _schema(json.dumps(schema))


_REPEATS = "((((a{1,900}){1,900}){1,900}){1,900}){1,900}"
KINDS: Mapping[str, Callable[[], tuple[str, bytes]]] = {
    "control: temperature 9": lambda: (COMPLETIONS, _body(prompt="a", temperature=9)),
    "JSON of 100,000 brackets": lambda: (COMPLETIONS, b'{"prompt": %s}' % (b"[" * LEVELS + b"]" * LEVELS)),
    "100,000 unknown fields": lambda: (CHAT, _chat(**{f"x{index}": 1 for index in range(LEVELS)})),
    "a tool described in 5 MB": lambda: (CHAT, _tool(description="d" * 5_000_000)),
    "a tool described in 1.9 MB": lambda: (CHAT, _tool(description="d" * 1_900_000)),
    "a schema of 100,000 levels": lambda: (COMPLETIONS, _schema('{"items":' * LEVELS + "{}" + "}" * LEVELS)),
    "a regex of nested repeats": lambda: (COMPLETIONS, _body(prompt="a", structured_outputs={"regex": _REPEATS})),
    "a oneOf bomb": lambda: (COMPLETIONS, _one_of_bomb()),
    "a tool whose schema is an array": lambda: (CHAT, _tool(parameters={"type": "array"})),
}


@dataclass
class Seen:
    """Of one kind, over all rounds."""

    p50: list[float] = field(default_factory=list)
    """Ratios to the quiet whiles around."""
    p99: list[float] = field(default_factory=list)
    answers: list[tuple[int, float]] = field(default_factory=list)
    """Status and seconds of each refusal."""


class Streams:
    """Greedy streams that never stop, and every moment at which one of them said something."""

    def __init__(self, client: Client, config: RunConfig) -> None:
        self._client = client
        self._config = config
        self.records: list[RequestRecord] = []

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for worker in range(self._config.concurrency):
                group.create_task(self._worker(worker))

    async def _worker(self, worker: int) -> None:
        for turn in range(1_000_000):
            record = RequestRecord(index=turn, scheduled_ns=time.monotonic_ns())
            self.records.append(record)
            body = request_body(self._config, worker + turn * self._config.concurrency)
            await self._client.stream(COMPLETIONS, body, record)

    def latencies(self, since: int, until: int) -> list[float]:
        """Gaps between events that ended in this while, ascending."""
        gaps = [
            (after - before) / 1e9
            for record in self.records
            for before, after in zip(record.output_ns, record.output_ns[1:], strict=False)
            if since <= after < until
        ]
        return sorted(gaps)


def _send(url: str, kind: str, gap: float, orders: Connection) -> None:
    """In a process of its own: the bad input every `gap` seconds until told to stop; answers with what came of it."""
    path, body = KINDS[kind]()
    answers: list[tuple[int, float]] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        orders.send("ready")
        orders.recv()
        ended = 0.0
        while not orders.poll(max(0.0, gap - ended)):
            began = time.monotonic()
            status = client.post(path, content=body, headers=_HEADERS).status_code
            ended = time.monotonic() - began
            answers.append((status, ended))
    orders.send(answers)


@contextmanager
def _sender(url: str, kind: str, gap: float) -> Iterator[Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_send, args=(url, kind, gap, theirs))
    process.start()
    try:
        yield ours
    finally:
        process.join(60)


async def _one(streams: Streams, url: str, kind: str, options: argparse.Namespace, *, seen: Seen) -> None:
    """A quiet while, a loud one, a quiet one."""
    seconds = options.seconds
    with _sender(url, kind, 1 / options.rate if options.rate else 0.0) as orders:
        await asyncio.to_thread(orders.recv)
        marks = [time.monotonic_ns()]
        await asyncio.sleep(seconds)
        marks.append(time.monotonic_ns())
        orders.send("begin")
        await asyncio.sleep(seconds)
        marks.append(time.monotonic_ns())
        orders.send("stop")
        answers = await asyncio.to_thread(orders.recv)
        marks += [settled := time.monotonic_ns(), settled + int(seconds * 1e9)]
        await asyncio.sleep(seconds)
    quiet = sorted(streams.latencies(marks[0], marks[1]) + streams.latencies(marks[3], marks[4]))
    loud = streams.latencies(marks[1], marks[2])
    seen.answers += answers
    for percent, ratios in ((50, seen.p50), (99, seen.p99)):
        ratios.append(percentile(loud, percent) / percentile(quiet, percent))


async def _measure(url: str, options: argparse.Namespace) -> dict[str, Seen]:
    seen = {kind: Seen() for kind in KINDS}
    async with Client(url, api_key=None, timeout_s=120) as client:
        config = RunConfig(
            url=url,
            model=await client.first_model(),
            concurrency=options.streams,
            num_requests=1,
            input_len=64,
            output_len=256,
        )
        streams = Streams(client, config)
        running = asyncio.create_task(streams.run())
        await asyncio.sleep(options.seconds)
        for _ in range(options.rounds):
            for kind, one in seen.items():
                await _one(streams, url, kind, options, seen=one)
        running.cancel()
        await asyncio.wait([running])
    return seen


def report(seen: Mapping[str, Seen]) -> str:
    """A table in Markdown."""
    lines = [
        "| bad input | answers | slowest, s | ITL p50 | ITL p99 |",
        "|---|---|---|---|---|",
    ]
    for kind, one in seen.items():
        statuses = ", ".join(sorted({str(status) for status, _ in one.answers}))
        slowest = max(seconds for _, seconds in one.answers)
        changes = " | ".join(f"{100 * (median(ratios) - 1):+.0f} %" for ratios in (one.p50, one.p99))
        lines.append(f"| {kind} | {len(one.answers)} × {statuses} | {slowest:.2f} | {changes} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 0 where every answer was a refusal within a second."""
    options = _parser().parse_args(arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if options.url is not None:
            seen = runner.run(_measure(options.url, options))
        else:
            with replicas(1, DEFAULT_MODEL, "--kv-cache-gib", "0.5") as (server,):
                seen = runner.run(_measure(server.url, options))
    sys.stdout.write(report(seen))
    answers = [answer for one in seen.values() for answer in one.answers]
    return 0 if all(400 <= status < 500 and seconds <= MOST_SECONDS for status, seconds in answers) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_bad_input", description=__doc__)
    parser.add_argument("--url", help="a server that runs; default: the default model on a server of its own")
    parser.add_argument("--streams", type=int, default=4, help="streams that are watched")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each while")
    parser.add_argument("--rate", type=float, default=4.0, help="bad requests a second; 0: back to back")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
