"""The same prompts in many arrangements on the default model: each must bring one output."""

import asyncio
import random
import time

from app.client.local import LocalEngineClient
from app.core.types import EngineRequest, SamplingParams, TokenLogprobs
from app.store import resolve
from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.server import WAIT_SECONDS, default_settings
from loadtest.faults.streams import CHINESE, ENGLISH

BATCH_SIZES = (64, 8, 33, 2, 16, 1, 5)
MAX_BATCHES = 25
"""In one arrangement, so that small batches do not take all the time."""
NUM_TOKENS = 12

Answer = tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]


async def run_determinism(ledger: Ledger, *, num_prompts: int, seconds: float, seed: int) -> None:
    """As many arrangements as fit: batch sizes in turn, each time in another order, half of the prompts sampled."""
    from app.text.tokenizer import Tokenizer

    settings = default_settings()
    folder = resolve(settings.model, report=lambda _: None)
    tokenizer = Tokenizer.load(folder.path)
    texts = [*ENGLISH, *CHINESE]
    prompts = [tuple(tokenizer.encode_now(f"{texts[i % len(texts)]} {i} " * (1 + i % 6))) for i in range(num_prompts)]
    deadline = time.monotonic() + seconds
    rng = random.Random(seed)
    client = LocalEngineClient(settings.to_engine_config(str(folder.path), folder.eos_token_ids))
    await client.start()
    try:
        limits = await client.wait_ready(WAIT_SECONDS)
        first: dict[int, Answer] = {}
        round_number = 0
        while time.monotonic() < deadline:
            size = BATCH_SIZES[round_number % len(BATCH_SIZES)]
            count = min(num_prompts, size * MAX_BATCHES)
            order = rng.sample(range(num_prompts), count)
            num_equal, num_done = 0, 0
            for begin in range(0, count, size):
                if time.monotonic() > deadline:
                    break
                batch = order[begin : begin + size]
                salt = f"{round_number}" if round_number % 2 else ""  # with and without what the cache has
                answers = await asyncio.gather(*(_answer(client, index, prompts[index], salt) for index in batch))
                for index, answer in zip(batch, answers, strict=True):
                    num_done += 1
                    num_equal += first.setdefault(index, answer) == answer
            outcome = Outcome.SURVIVED if num_equal == num_done else Outcome.WRONG
            cell = f"{limits.tier} tier, batches of {size}"
            ledger.add("determinism", cell, outcome, count=num_done, prompts=float(num_prompts))
            round_number += 1
    finally:
        await client.stop()


async def _answer(client: LocalEngineClient, index: int, prompt: tuple[int, ...], salt: str) -> Answer:
    request = EngineRequest(
        request_id=f"{salt}-{index}",
        prompt_token_ids=prompt,
        params=SamplingParams(
            seed=index, max_tokens=NUM_TOKENS, temperature=float(index % 2), ignore_eos=True, num_logprobs=2
        ),
        cache_salt=salt,
    )
    outputs = [output async for output in client.generate(request)]
    return (
        tuple(token_id for output in outputs for token_id in output.token_ids),
        tuple(entry for output in outputs for entry in output.logprobs),
    )
