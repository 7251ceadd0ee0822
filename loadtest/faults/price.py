"""What journal and supervisor cost: the API process's CPU time without HTTP, beside the engine's, at batch 32.

The share is of the CPU time that both processes used, so that a busy machine does not flatter it. It is an upper
bound: receiving and decoding the engine's messages and 32 consumers are in it, as in a server without a journal.
"""

import asyncio
import time
from pathlib import Path

from app.client.local import LocalEngineClient
from app.core.types import EngineRequest, SamplingParams
from app.store import resolve
from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.server import WAIT_SECONDS, default_settings

BATCH = 32
NUM_TOKENS = 96
MAX_SHARE = 0.02
_CLOCK_TICKS = 100.0


async def run_price(ledger: Ledger, *, seconds: float) -> None:
    """Rounds of one batch until the time is over; one trial each."""
    settings = default_settings()
    folder = resolve(settings.model, report=lambda _: None)
    client = LocalEngineClient(settings.to_engine_config(str(folder.path), folder.eos_token_ids))
    await client.start()
    try:
        await client.wait_ready(WAIT_SECONDS)
        await _batch(client)  # what is done once
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ours, theirs, began = time.process_time(), _cpu_seconds(client), time.monotonic()
            await _batch(client)
            wall = time.monotonic() - began
            ours, theirs = time.process_time() - ours, _cpu_seconds(client) - theirs
            share = ours / (ours + theirs)
            ledger.add(
                "price",
                f"default model, batch {BATCH}",
                Outcome.SURVIVED if share < MAX_SHARE else Outcome.WRONG,
                detail="" if share < MAX_SHARE else f"{100 * share:.1f} % of the CPU time, the aim is 2 %",
                share=share,
                microseconds_per_token=1e6 * ours / (BATCH * NUM_TOKENS),
                tokens_per_second=BATCH * NUM_TOKENS / wall,
            )
    finally:
        await client.stop()


async def _batch(client: LocalEngineClient) -> None:
    async def one(index: int) -> None:
        params = SamplingParams(seed=index, max_tokens=NUM_TOKENS, ignore_eos=True)
        request = EngineRequest(request_id=f"price-{index}", prompt_token_ids=(1, 50 + index, 7), params=params)
        async for _ in client.generate(request):
            pass

    await asyncio.gather(*(one(index) for index in range(BATCH)))


def _cpu_seconds(client: LocalEngineClient) -> float:
    fields = Path(f"/proc/{client.engine_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
