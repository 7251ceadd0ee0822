"""Closing an iterator early frees everything in the engine at once, in every phase.

Sequences here would run far longer than the steps that are granted, so that no natural end passes for an abort.
"""

import asyncio

from app.client.local import LocalEngineClient
from app.core.types import FinishReason
from tests.process.engines import complete, request, running, scripted, until, until_idle

FEW_STEPS = 12


def last_step_id(client: LocalEngineClient) -> int:
    assert client.status.last_step is not None
    return client.status.last_step.step_id


async def test_abort_in_decode_frees_everything() -> None:
    async with running(scripted(step_seconds=0.01)) as client:
        stream = client.generate(request("a", max_tokens=3000))
        await anext(stream)
        await stream.aclose()
        assert client.status.num_live_requests == 0
        await until_idle(client)
        assert last_step_id(client) < FEW_STEPS


async def test_abort_in_a_prefill_chunk_frees_everything() -> None:
    config = scripted(step_seconds=0.01, max_num_batched_tokens=32)
    async with running(config) as client:
        long_prompt = request("a", prompt=tuple(range(900)) * 4)
        task = asyncio.create_task(complete(client, long_prompt))
        await until(lambda: client.status.last_step is not None and client.status.last_step.num_prefill_tokens > 0)
        task.cancel()
        await asyncio.wait({task})
        await until_idle(client)
        assert last_step_id(client) < FEW_STEPS


async def test_abort_in_the_queue_and_behind_a_shared_prefix_frees_everything() -> None:
    config = scripted(step_seconds=0.005, num_kv_blocks=40, max_num_batched_tokens=64)
    async with running(config) as client:
        prompt = tuple(range(300))
        tasks = [asyncio.create_task(complete(client, request(f"r{n}", prompt=prompt))) for n in range(12)]
        await until(lambda: client.status.last_step is not None and client.status.last_step.num_waiting > 3)
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks)
        assert tasks[0].result().finish_reason is FinishReason.LENGTH
        await until_idle(client)
        assert last_step_id(client) < 5 + 20 + FEW_STEPS  # the chunks and tokens of the one that stayed


async def test_two_hundred_streams_aborted_at_odd_moments_leak_nothing() -> None:
    async with running(scripted(step_seconds=0.001, num_kv_blocks=64)) as client:

        async def use(number: int) -> None:
            stream = client.generate(request(f"r{number}", prompt=(number, 2), max_tokens=60))
            for _ in range(number % 17):
                await anext(stream)
            await stream.aclose()

        await asyncio.gather(*(use(number) for number in range(200)))
        assert client.status.num_live_requests == 0
        await until_idle(client)
        assert (await complete(client, request("last"))).finish_reason is FinishReason.LENGTH


async def test_a_slow_consumer_gets_what_gathered_in_one_output() -> None:
    async with running(scripted()) as client:
        expected = await complete(client, request("fast", max_tokens=500, num_logprobs=1))
        stream = client.generate(request("slow", max_tokens=500, num_logprobs=1))
        first = await anext(stream)
        await until(lambda: client.status.num_live_requests == 0)
        rest = [output async for output in stream]
    assert len(rest) == 1
    assert [*first.token_ids, *rest[0].token_ids] == expected.token_ids
    assert len(first.logprobs) + len(rest[0].logprobs) == 500
    assert rest[0].finish_reason is FinishReason.LENGTH
