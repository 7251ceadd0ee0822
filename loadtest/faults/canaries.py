"""Requests of several keys with canaries, under aborts and kills: no answer may show what is another's."""

import asyncio
import itertools
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from app.client.engine_client import EngineState
from app.client.local import LocalEngineClient
from app.client.process import EngineLaunch
from app.core.config import EngineConfig
from app.core.errors import EngineUnavailable
from app.core.types import EngineRequest, SamplingParams
from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.server import WAIT_SECONDS, until

COMMAND = (sys.executable, "-P", "-m", "loadtest.canary_engine")
VOCAB_SIZE = 1_000_000
SHARED_PREFIX = tuple(range(1, 33))
"""Two blocks that begin every prompt."""
NUM_KEYS = 8
NUM_AT_ONCE = 32
REQUESTS_PER_KILL = 2500


@asynccontextmanager
async def _canary_client() -> AsyncIterator[LocalEngineClient]:
    config = EngineConfig(
        model_dir="/nowhere",
        tier="scripted",
        eos_token_ids=(),
        num_kv_blocks=160,  # so few that blocks go from hand to hand, by eviction and preemption
        scripted={"vocab_size": VOCAB_SIZE, "block_size": 16, "max_num_batched_tokens": 256},
    )
    client = LocalEngineClient(config, launch=EngineLaunch(command=COMMAND, log_level="error"))
    await client.start()
    try:
        await client.wait_ready(WAIT_SECONDS)
        yield client
    finally:
        await client.stop()


class _Canaries:
    def __init__(self, client: LocalEngineClient, seed: int) -> None:
        self._client = client
        self._rng = random.Random(seed)
        self._numbers = itertools.count(1)
        self._last_prompt: dict[str, tuple[int, ...]] = {}
        self.counts: Counter[str] = Counter()
        self.leaks: list[str] = []
        self.is_ending = False

    async def work(self) -> None:
        """One request after the other."""
        while not self.is_ending:
            await until(lambda: self._client.status.state is EngineState.READY)
            try:
                await self._one(next(self._numbers))
            except EngineUnavailable:
                continue  # refused while an engine was being replaced

    async def _one(self, number: int) -> None:
        rng = self._rng
        is_new_key = rng.random() < 0.05
        key = f"new-{number}" if is_new_key else f"key-{rng.randrange(NUM_KEYS)}"
        canary = tuple(100 + number * 9 % (VOCAB_SIZE - 200) + index for index in range(rng.randrange(4, 40)))
        prompt = SHARED_PREFIX + canary
        if not is_new_key and rng.random() < 0.3:  # a later turn of what this key has asked
            prompt = self._last_prompt.get(key, prompt)[:80] + canary[:8]
        self._last_prompt[key] = prompt
        request = EngineRequest(
            request_id=f"canary-{number}",
            prompt_token_ids=prompt,
            params=SamplingParams(seed=0, max_tokens=len(prompt), ignore_eos=True),
            cache_salt=key,
        )
        stop_at = rng.randrange(1, len(prompt)) if rng.random() < 0.1 else None
        said: list[int] = []
        async with aclosing(self._client.generate(request)) as outputs:
            async for output in outputs:
                said += output.token_ids
                if is_new_key and output.num_cached_tokens:
                    self.leaks.append(f"{output.num_cached_tokens} tokens of a new key came from the cache")
                if stop_at is not None and len(said) >= stop_at:
                    break
        if tuple(said) != prompt[: len(said)] or (stop_at is None and len(said) != len(prompt)):
            self.leaks.append(f"{request.request_id} of {key} said {said[:50]}")
        self.counts["first of a new key" if is_new_key else "aborted" if stop_at is not None else "whole"] += 1


async def run_canaries(
    ledger: Ledger, *, num_requests: int, seconds: float, seed: int, requests_per_kill: int = REQUESTS_PER_KILL
) -> None:
    """At most so many requests in at most so many seconds."""
    deadline = time.monotonic() + seconds
    async with _canary_client() as client:
        canaries = _Canaries(client, seed)
        workers = [asyncio.create_task(canaries.work()) for _ in range(NUM_AT_ONCE)]
        next_kill = requests_per_kill
        while canaries.counts.total() < num_requests and time.monotonic() < deadline and not canaries.leaks:
            await asyncio.sleep(0.05)
            if canaries.counts.total() >= next_kill and client.status.state is EngineState.READY:
                next_kill += requests_per_kill
                if client.engine_pid is not None:
                    os.kill(client.engine_pid, signal.SIGKILL)
        canaries.is_ending = True
        await asyncio.gather(*workers)
        deaths = float(client.status.generation - 1)
    for leak in canaries.leaks[:20]:
        ledger.add("canaries", "leak", Outcome.WRONG, detail=leak)
    for cell, count in sorted(canaries.counts.items()):
        ledger.add("canaries", cell, Outcome.SURVIVED, count=count, kills=deaths)
