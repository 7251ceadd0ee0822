"""Streams outlive their engine: killed, stopped or hanging, the tokens are those of an undisturbed run."""

import asyncio
import signal
from pathlib import Path

import msgspec
import pytest

from app.client.engine_client import EngineState
from app.client.settings import Supervision
from app.core.config import EngineConfig
from app.core.errors import EngineFailed, EngineUnavailable, InvalidRequest
from app.core.types import EngineRequest, FinishReason
from app.ipc.messages import Add
from app.ipc.transport import MAX_FRAME_BYTES, encode_frame
from tests.process.engines import (
    IMPATIENT,
    Answer,
    complete,
    hurt,
    no_descriptors_left,
    request,
    running,
    scripted,
    until,
    until_idle,
    until_ready,
)

NUM_SEQUENCES = 16
POISON = 999


def mixed_requests(*, max_tokens: int) -> list[EngineRequest]:
    """Greedy and sampled, with and without logprobs, prompts of one and of several blocks."""
    return [
        request(
            f"r{index}",
            prompt=tuple(range(1 + index, 4 + 11 * index)),
            max_tokens=max_tokens,
            temperature=float(index % 2),
            num_logprobs=2 if index % 3 == 0 else None,
        )
        for index in range(NUM_SEQUENCES)
    ]


async def test_five_kills_change_no_token() -> None:
    asked = mixed_requests(max_tokens=200)
    async with running(scripted()) as client:
        expected = await asyncio.gather(*(complete(client, each) for each in asked))
    async with running(scripted(step_seconds=0.002)) as client:
        answers = [Answer() for _ in asked]
        tasks = [asyncio.create_task(a.fill(client, each)) for a, each in zip(answers, asked, strict=True)]
        for round_number in range(1, 6):
            await until(lambda n=round_number: min(len(a.token_ids) for a in answers) >= 25 * n)  # type: ignore[misc]
            await until_ready(client)  # a generation begins before there is a process to hurt
            hurt(client, signal.SIGKILL)
            await until(lambda n=round_number: client.status.generation > n)  # type: ignore[misc]
        await asyncio.gather(*tasks)
        assert client.status.generation == 6
        assert client.status.num_live_requests == 0
        await until_idle(client)
    for answer, undisturbed in zip(answers, expected, strict=True):
        assert answer.token_ids == undisturbed.token_ids
        assert answer.finish_reason is FinishReason.LENGTH
        assert _logprobs(answer) == _logprobs(undisturbed)
        assert {o.num_cached_tokens for o in answer.outputs} == {answer.outputs[0].num_cached_tokens}


async def test_queued_sequences_are_handed_over_too() -> None:
    config = scripted(step_seconds=0.002, num_kv_blocks=4)  # room for about two at once
    asked = [request(f"r{index}", max_tokens=40) for index in range(8)]
    async with running(config) as client:
        answers = [Answer() for _ in asked]
        tasks = [asyncio.create_task(a.fill(client, each)) for a, each in zip(answers, asked, strict=True)]
        await until(lambda: any(a.token_ids for a in answers))
        assert not all(a.token_ids for a in answers)
        hurt(client, signal.SIGKILL)
        await asyncio.gather(*tasks)
    assert {len(a.token_ids) for a in answers} == {40}
    assert len({tuple(a.token_ids) for a in answers}) == 1


async def test_a_stopped_engine_is_replaced() -> None:
    async with running(scripted(step_seconds=0.002)) as client:
        expected = await complete(client, request("a", max_tokens=100))
        answer = Answer()
        task = asyncio.create_task(answer.fill(client, request("b", max_tokens=100)))
        await until(lambda: len(answer.token_ids) > 10)
        assert client.status.last_step_age is not None and not client.status.is_stalled
        hurt(client, signal.SIGSTOP)
        await until(lambda: client.status.is_stalled)
        await task
        assert client.status.generation == 2 and not client.status.is_stalled
    assert answer.token_ids == expected.token_ids


async def test_an_engine_that_was_stopped_while_idle_is_replaced() -> None:
    async with running(scripted()) as client:
        await complete(client, request("a"))
        hurt(client, signal.SIGSTOP)
        await until(lambda: client.status.generation == 2)
        await until_ready(client)
        answer = await complete(client, request("b"))
        assert answer.finish_reason is FinishReason.LENGTH
        assert client.status.generation == 2


async def test_an_engine_is_replaced_when_file_descriptors_have_run_out() -> None:
    async with running(scripted(step_seconds=0.002)) as client:
        expected = await complete(client, request("a", max_tokens=100))
        answer = Answer()
        task = asyncio.create_task(answer.fill(client, request("b", max_tokens=100)))
        await until(lambda: len(answer.token_ids) > 10)
        with no_descriptors_left():
            hurt(client, signal.SIGKILL)
            await task
        assert client.status.generation == 2
    assert answer.token_ids == expected.token_ids


async def test_a_slow_step_is_not_a_hang() -> None:
    async with running(scripted(step_seconds=0.4)) as client:
        await complete(client, request("a", max_tokens=3))
        assert client.status.generation == 1


@pytest.mark.parametrize("crash", ["exit", "segv", "raise", "hang"])
async def test_a_request_that_ends_engines_ends_alone(crash: str) -> None:
    supervision = msgspec.structs.replace(IMPATIENT, hang_seconds=1.0)
    config = scripted(crash_on_token=POISON, trigger_after=5, crash=crash, step_seconds=0.001)
    await _poison_among(8, config, supervision)


async def test_one_poison_among_64_costs_two_engines_and_nobody_else() -> None:
    config = scripted(crash_on_token=POISON, trigger_after=5, crash="segv", step_seconds=0.001)
    await _poison_among(64, config, IMPATIENT)


async def _poison_among(num_others: int, config: EngineConfig, supervision: Supervision) -> None:
    asked = [request(f"r{index}", prompt=(index, 5), max_tokens=200) for index in range(num_others)]
    async with running(scripted()) as client:
        expected = [(await complete(client, each)).token_ids for each in asked]
    async with running(config, supervision=supervision) as client:
        answers = [Answer() for _ in asked]
        tasks = [asyncio.create_task(a.fill(client, each)) for a, each in zip(answers, asked, strict=True)]
        await until(lambda: all(a.token_ids for a in answers))
        poison = request("poison", prompt=(1, POISON))
        poisoned = Answer()
        with pytest.raises(EngineFailed, match="quarantine"):
            await poisoned.fill(client, poison)
        await asyncio.gather(*tasks)
        assert len(poisoned.token_ids) == 5
        assert client.status.generation == 3
        await until_ready(client)
        with pytest.raises(EngineFailed, match="quarantine"):  # the client's retry costs no engine
            await complete(client, msgspec.structs.replace(poison, request_id="again"))
        assert (await complete(client, request("next"))).finish_reason is FinishReason.LENGTH
        assert client.status.generation == 3
    assert [a.token_ids for a in answers] == expected


async def test_renewed_engines_change_no_token_and_count_as_no_deaths() -> None:
    asked = mixed_requests(max_tokens=100)
    async with running(scripted()) as client:
        expected = [one.token_ids for one in await asyncio.gather(*(complete(client, each) for each in asked))]
    supervision = msgspec.structs.replace(IMPATIENT, max_deaths=2, backoff_seconds=60.0)
    async with running(scripted(step_seconds=0.002), supervision=supervision) as client:
        for generation in (2, 3):  # nothing runs between them that would show that engines work
            assert await client.renew()
            assert client.status.generation == generation and client.status.takes_requests
        answers = [Answer() for _ in asked]
        tasks = [asyncio.create_task(a.fill(client, each)) for a, each in zip(answers, asked, strict=True)]
        await until(lambda: min(len(a.token_ids) for a in answers) >= 20)
        renewing = asyncio.create_task(client.renew())
        await until(lambda: client.status.state is EngineState.RESTARTING)
        late = asyncio.create_task(complete(client, msgspec.structs.replace(asked[0], request_id="late")))
        assert await renewing
        await asyncio.gather(*tasks)
        assert (await late).token_ids == expected[0]
        assert client.status.generation == 4
    assert [a.token_ids for a in answers] == expected


async def test_kills_from_outside_in_lone_steps_blame_nobody() -> None:
    """Everybody is on probation after the SIGSEGV; whoever is tried when SIGKILL and SIGSTOP come is innocent."""
    asked = [request(f"r{index}", prompt=(index, 5), max_tokens=60) for index in range(8)]
    async with running(scripted()) as client:
        expected = [(await complete(client, each)).token_ids for each in asked]
    supervision = msgspec.structs.replace(IMPATIENT, max_deaths=50)
    async with running(scripted(step_seconds=0.02), supervision=supervision) as client:
        answers = [Answer() for _ in asked]
        tasks = [asyncio.create_task(a.fill(client, each)) for a, each in zip(answers, asked, strict=True)]
        await until(lambda: all(a.token_ids for a in answers))
        for number in (signal.SIGSEGV, signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP):
            generation = client.status.generation
            hurt(client, number)
            await until(lambda g=generation: client.status.generation > g)  # type: ignore[misc]
            await until_ready(client)
        await asyncio.gather(*tasks)
    assert [a.token_ids for a in answers] == expected


async def test_a_row_that_fails_ends_alone_and_the_engine_lives() -> None:
    async with running(scripted(fail_on_token=POISON)) as client:
        good, bad = await asyncio.gather(
            complete(client, request("good")), complete(client, request("bad", prompt=(1, POISON)))
        )
        assert good.finish_reason is FinishReason.LENGTH
        assert bad.finish_reason is FinishReason.ERROR
        assert "999" in str(bad.outputs[-1].error)
        assert client.status.generation == 1
        await until_idle(client)


async def test_a_request_that_comes_while_an_engine_is_replaced_waits_for_the_next() -> None:
    async with running(scripted(step_seconds=0.002, load_seconds=0.5)) as client:
        expected = await complete(client, request("alone", max_tokens=50))
        answer = Answer()
        task = asyncio.create_task(answer.fill(client, request("a", max_tokens=50)))
        await until(lambda: len(answer.token_ids) > 10)
        hurt(client, signal.SIGKILL)
        await until(lambda: client.status.state is EngineState.RESTARTING)
        assert client.status.takes_requests and client.status.last_step is None
        late = await complete(client, request("b", max_tokens=50))
        await task
        assert answer.token_ids == late.token_ids == expected.token_ids
        await until_idle(client)


async def test_one_that_is_aborted_while_it_waits_for_the_next_engine_is_never_sent() -> None:
    async with running(scripted(step_seconds=0.002, load_seconds=0.5)) as client:
        hurt(client, signal.SIGKILL)
        await until(lambda: client.status.state is EngineState.RESTARTING)
        task = asyncio.create_task(complete(client, request("gone", max_tokens=3000)))
        await until(lambda: client.status.num_live_requests == 1)
        task.cancel()
        await until(lambda: client.status.num_live_requests == 0)
        await until_ready(client)
        assert client.status.last_step is None
        await complete(client, request("b"))
        await until_idle(client)


async def test_a_request_that_no_frame_holds_is_refused_when_it_waited_too() -> None:
    large = msgspec.structs.replace(request("large"), cache_salt="x" * (MAX_FRAME_BYTES + 1))
    async with running(scripted(load_seconds=0.3)) as client:
        hurt(client, signal.SIGKILL)
        await until(lambda: client.status.state is EngineState.RESTARTING)
        answer = await complete(client, large)
        assert answer.finish_reason is FinishReason.ERROR and "too large to be sent" in str(answer.outputs[-1].error)
        assert len((await complete(client, request("a"))).token_ids) == 20


async def test_while_engines_die_in_a_row_new_requests_are_refused() -> None:
    supervision = msgspec.structs.replace(IMPATIENT, backoff_seconds=3.0)
    async with running(scripted(), supervision=supervision) as client:
        for generation in (1, 2):
            await until_ready(client)
            assert client.status.generation == generation
            hurt(client, signal.SIGKILL)
            await until(lambda: client.status.state is EngineState.RESTARTING)
        await until(lambda: not client.status.takes_requests)
        with pytest.raises(EngineUnavailable) as refused:
            await complete(client, request("b"))
        assert refused.value.retry_after is not None
        await until_ready(client)
        assert client.status.takes_requests
        await complete(client, request("c"))


async def test_a_sequence_is_aborted_while_no_engine_is_there() -> None:
    async with running(scripted(step_seconds=0.002, load_seconds=0.3)) as client:
        stream = client.generate(request("a", max_tokens=3000))
        await anext(stream)
        hurt(client, signal.SIGKILL)
        await until(lambda: client.status.state is EngineState.RESTARTING)
        await stream.aclose()
        assert client.status.num_live_requests == 0
        await until_ready(client)
        await complete(client, request("b"))
        await until_idle(client)


async def test_the_next_engine_has_the_context_of_the_first(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_text("64")
    async with running(scripted(step_seconds=0.002, memory_file=str(memory))) as client:
        answer = Answer()
        task = asyncio.create_task(answer.fill(client, request("a", max_tokens=400)))
        for num_tokens, room in ((100, "8"), (200, "1000")):
            await until(lambda n=num_tokens: len(answer.token_ids) > n)  # type: ignore[misc]
            generation = client.status.generation
            memory.write_text(room)
            hurt(client, signal.SIGKILL)
            await until(lambda n=generation: client.status.generation > n)  # type: ignore[misc]
            if room == "8":
                await until(lambda: "64 KV blocks" in client.status.detail)
                assert "1024 tokens" in client.status.detail
                memory.write_text("64")  # there is room again
            await until_ready(client)
            assert client.limits is not None
            assert (client.limits.num_kv_blocks, client.limits.max_model_len) == (64, 1024)
        await task
    assert (len(answer.token_ids), answer.finish_reason) == (400, FinishReason.LENGTH)


async def test_many_large_requests_are_handed_over_in_parts() -> None:
    salts = [str(index) * 14_000_000 for index in range(5)]  # together more than a frame holds
    asked = [msgspec.structs.replace(request(f"r{salt[0]}", max_tokens=60), cache_salt=salt) for salt in salts]
    supervision = msgspec.structs.replace(IMPATIENT, hang_seconds=10.0)
    async with running(scripted(step_seconds=0.02), supervision=supervision) as client:
        answers = [Answer() for _ in asked]
        tasks = [asyncio.create_task(a.fill(client, each)) for a, each in zip(answers, asked, strict=True)]
        await until(lambda: all(a.token_ids for a in answers))
        hurt(client, signal.SIGKILL)
        await asyncio.gather(*tasks)
        assert client.status.generation == 2
    assert {len(answer.token_ids) for answer in answers} == {60}


async def test_a_request_that_no_frame_holds_is_refused_alone() -> None:
    large = msgspec.structs.replace(request("large"), cache_salt="x" * (MAX_FRAME_BYTES + 1))
    async with running(scripted()) as client:
        with pytest.raises(InvalidRequest, match="large"):
            await complete(client, large)
        assert client.status.num_live_requests == 0
        assert len((await complete(client, request("a"))).token_ids) == 20
        assert client.status.generation == 1


async def test_a_sequence_that_outgrows_the_frame_ends_alone() -> None:
    async with running(scripted(step_seconds=0.002)) as client:
        answer, grown = Answer(), Answer()
        asked = request("grown", max_tokens=3000)
        room = MAX_FRAME_BYTES - len(encode_frame(Add((asked,)))) - 100
        asked = msgspec.structs.replace(asked, cache_salt="x" * room)
        task = asyncio.create_task(answer.fill(client, request("a", max_tokens=400)))
        growing = asyncio.create_task(grown.fill(client, asked))
        await until(lambda: len(grown.token_ids) > 150)
        hurt(client, signal.SIGKILL)
        await asyncio.gather(task, growing)
        assert grown.finish_reason is FinishReason.ERROR and "too large" in str(grown.outputs[-1].error)
        assert client.status.generation == 2
    assert len(answer.token_ids) == 400


def _logprobs(answer: Answer) -> list[object]:
    return [entry for output in answer.outputs for entry in output.logprobs]
