"""Clients that leave: in the queue, in prefill, in decode. No KV block may stay behind, no other stream may change."""

import asyncio
import json
import random
import time

from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.server import FaultServer, scripted_settings, serving, until
from loadtest.faults.streams import Stream, make_oracle, run_stream, scripted_bodies

BATCH = 250


async def run_aborts(ledger: Ledger, *, num_aborts: int, seconds: float, seed: int) -> None:
    """At most so many aborts in at most so many seconds, in batches beside streams that go on."""
    settings = scripted_settings(step_seconds=0.004, max_num_batched_tokens=512, num_kv_blocks=700)
    deadline = time.monotonic() + seconds
    rng = random.Random(seed)
    async with serving(settings) as server:
        bodies = [each for each in scripted_bodies(12, max_tokens=150) if each[0] != "unseeded"]
        oracle = await make_oracle(server.port, bodies)
        num_done = 0
        while num_done < num_aborts and time.monotonic() < deadline:
            count = min(BATCH, num_aborts - num_done)
            others = [Stream(body, kind) for kind, body, _ in oracle]
            tasks = [asyncio.create_task(run_stream(server.port, stream)) for stream in others]
            places = await asyncio.gather(*(_abort(server.port, rng) for _ in range(count)))
            await asyncio.gather(*tasks)
            num_done += count
            differing = [s.kind for s, (_, _, said) in zip(others, oracle, strict=True) if s.said() != said]
            await _judge(server, ledger, places, differing=differing)


async def _judge(server: FaultServer, ledger: Ledger, places: list[str], *, differing: list[str]) -> None:
    client = server.client
    is_empty = await until(lambda: not client.status.num_live_requests and not server.num_kv_blocks_held, seconds=10.0)
    for place in sorted(set(places)):
        is_right = is_empty and not differing
        ledger.add(
            "aborts",
            place,
            Outcome.SURVIVED if is_right else Outcome.WRONG,
            count=places.count(place),
            detail="" if is_right else f"{server.num_kv_blocks_held} blocks and sequences held; differing: {differing}",
            blocks_leaked=float(server.num_kv_blocks_held),
        )


async def _abort(port: int, rng: random.Random) -> str:
    """Send a request, leave at a random moment; says where it stood."""
    await asyncio.sleep(rng.random() * 0.5)
    prompt = [1000 + rng.randrange(40_000) for _ in range(rng.choice((4, 60, 700)))]
    body = {"prompt": prompt, "max_tokens": 400, "stream": True, "ignore_eos": True, "temperature": 1}
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(content)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + content)
    data = b""
    try:
        async with asyncio.timeout(rng.random() * 0.3):
            while part := await reader.read(65536):
                data += part
    except (TimeoutError, OSError):
        pass
    writer.transport.abort()
    return "in decode" if b"data: " in data else "in queue or prefill"
