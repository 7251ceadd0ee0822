"""Drives one run: what to send, when, and how the records are gathered.

A closed loop keeps `concurrency` requests running: a measure of throughput. An open loop sends at the
times of `arrivals`, however many are running, and latency counts from those times: a measure of latency.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping

import msgspec

from loadtest.arrivals import arrival_offsets
from loadtest.client import Client
from loadtest.prompts import token_prompt, word_prompt
from loadtest.record import RequestRecord
from loadtest.summary import Summary, summarise


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides what is sent. Written beside the results."""

    url: str
    model: str | None = None
    """None: the first that the server names."""
    endpoint: str = "completions"
    """completions or chat."""
    prompt_kind: str = "words"
    """words or token-ids."""
    vocab_size: int = 32_000
    """Random token ids stay below it."""
    num_requests: int = 100
    num_warmups: int = 0
    concurrency: int = 8
    rate: float | None = None
    """Requests per second of an open loop; None is a closed loop."""
    burstiness: float = 1.0
    input_len: int = 128
    output_len: int = 128
    shared_prefix: float = 0.0
    """Part of the input, 0 to 1, that all prompts share."""
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 600.0
    keep_alive: bool = True
    """False: a connection for each request, for servers that close those that they promise to keep."""
    goodput: tuple[str, ...] = ()
    extra_body: dict[str, object] = {}


class RunResult(msgspec.Struct, frozen=True):
    """Figures and the records they come from."""

    config: RunConfig
    summary: Summary
    records: list[RequestRecord]


async def run_load(
    config: RunConfig, *, targets: Mapping[str, float], api_key: str | None, progress: Callable[[RequestRecord], None]
) -> RunResult:
    """Run once; `progress` is called after each request. Raises ValueError for settings that cannot be."""
    async with Client(config.url, api_key=api_key, timeout_s=config.timeout_s, keep_alive=config.keep_alive) as client:
        if config.model is None:
            config = msgspec.structs.replace(config, model=await client.first_model())
        sender = _Sender(client, config, progress)
        await sender.closed_loop(range(-config.num_warmups, 0), _no_progress)
        cpu_start = time.process_time()
        indices = range(config.num_requests)
        if config.rate is None:
            records = await sender.closed_loop(indices, progress)
        else:
            offsets = arrival_offsets(config.rate, config.num_requests, seed=config.seed, burstiness=config.burstiness)
            records = await sender.open_loop(offsets)
        cpu_s = time.process_time() - cpu_start
    summary = summarise(records, targets=targets, offered_rate=config.rate, client_cpu_s=cpu_s)
    return RunResult(config, summary, sorted(records, key=lambda record: record.index))


def request_body(config: RunConfig, index: int) -> dict[str, object]:
    """The JSON body of one request; the same for the same (config, index)."""
    body: dict[str, object] = {
        "model": config.model,
        "max_tokens": config.output_len,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        body["ignore_eos"] = True
    shared, seed = config.shared_prefix, config.seed
    if config.endpoint == "chat":
        text = word_prompt(config.input_len, shared=shared, seed=seed, index=index)
        body["messages"] = [{"role": "user", "content": text}]
    elif config.prompt_kind == "words":
        body["prompt"] = word_prompt(config.input_len, shared=shared, seed=seed, index=index)
    else:
        body["prompt"] = token_prompt(
            config.input_len, shared=shared, seed=seed, index=index, vocab_size=config.vocab_size
        )
    return body | config.extra_body


class _Sender:
    """Sends numbered requests and gathers their records."""

    def __init__(self, client: Client, config: RunConfig, progress: Callable[[RequestRecord], None]) -> None:
        self._client = client
        self._config = config
        self._progress = progress
        self._path = "/v1/chat/completions" if config.endpoint == "chat" else "/v1/completions"

    async def closed_loop(self, indices: range, progress: Callable[[RequestRecord], None]) -> list[RequestRecord]:
        waiting = iter(indices)
        records: list[RequestRecord] = []

        async def worker() -> None:
            for index in waiting:
                body = request_body(self._config, index)
                record = RequestRecord(index=index, scheduled_ns=time.monotonic_ns())
                await self._client.stream(self._path, body, record)
                # The time to connect is the client's own.
                record.scheduled_ns = record.sent_ns if record.sent_ns else record.scheduled_ns
                records.append(record)
                progress(record)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._config.concurrency, len(indices))):
                group.create_task(worker())
        return records

    async def open_loop(self, offsets: list[float]) -> list[RequestRecord]:
        records: list[RequestRecord] = []

        async def one(record: RequestRecord, body: dict[str, object]) -> None:
            await self._client.stream(self._path, body, record)
            records.append(record)
            self._progress(record)

        async with asyncio.TaskGroup() as group:
            async for record in _due(offsets):
                group.create_task(one(record, request_body(self._config, record.index)))
        return records


async def _due(offsets: list[float]) -> AsyncIterator[RequestRecord]:
    """A record for each arrival, at its time or as soon after as the event loop comes round."""
    start_ns = time.monotonic_ns()
    for index, offset in enumerate(offsets):
        scheduled_ns = start_ns + round(offset * 1e9)
        await asyncio.sleep(max(0.0, (scheduled_ns - time.monotonic_ns()) / 1e9))
        yield RequestRecord(index=index, scheduled_ns=scheduled_ns)


def _no_progress(_: RequestRecord) -> None:
    """Warm-up requests are not shown."""
