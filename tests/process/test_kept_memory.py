"""Weights and KV outlive a native engine: killed, the next one packs nothing and computes only the tail again."""

import asyncio
import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from app.client.local import LocalEngineClient
from app.client.memory import MemoryKeeper
from app.client.process import EngineProcess
from app.core.config import EngineConfig
from app.core.types import EngineRequest, FinishReason
from tests.native_models import makes_large_pages, prompt_ids, write_model
from tests.process.engines import Answer, complete, hurt, request, running, until, until_idle, until_ready

pytestmark = pytest.mark.skipif(not makes_large_pages(), reason="needs MADV_COLLAPSE of shared memory (Linux 6.1)")

NUM_SEQUENCES = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = write_model(tmp_path_factory.mktemp("model"))
    return EngineConfig(
        model_dir=str(folder),
        tier="native",
        eos_token_ids=(),
        num_kv_blocks=128,
        max_num_batched_tokens=128,
        num_threads=1,
    )


def mixed(*, max_tokens: int = 300) -> list[EngineRequest]:
    """Greedy and drawn, with a shared prefix and without, of two tenants."""
    shared = prompt_ids(200, seed=1)
    asked = []
    for index in range(NUM_SEQUENCES):
        prompt = (*shared, 1 + index) if index % 2 else prompt_ids(20 + 40 * index, seed=index)
        one = request(
            f"r{index}",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=float(index % 3 > 0),
            num_logprobs=1 if index % 4 == 0 else None,
        )
        asked.append(msgspec.structs.replace(one, cache_salt="tenant" if index > 5 else ""))
    return asked


async def undisturbed(config: EngineConfig, asked: list[EngineRequest]) -> list[Answer]:
    async with running(config) as client:
        return list(await asyncio.gather(*(complete(client, each) for each in asked)))


def kept(client: LocalEngineClient) -> tuple[bool, int]:
    """Whether the engine found packed weights, and how many sealed blocks."""
    assert client.limits is not None
    return client.limits.kept.has_adopted_weights, client.limits.kept.num_adopted_blocks


def our_memfds() -> set[int]:
    """Inodes of the memory for engines that this process holds open."""
    inodes = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:headwater-"):
                inodes.add(os.stat(f"/proc/self/fd/{descriptor}").st_ino)
    return inodes


def compare(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, other in zip(answers, expected, strict=True):
        assert answer.token_ids == other.token_ids
        assert answer.finish_reason is FinishReason.LENGTH
        assert [o for out in answer.outputs for o in out.logprobs] == [o for out in other.outputs for o in out.logprobs]


async def test_kills_at_random_moments_change_no_token(config: EngineConfig) -> None:
    asked, rng = mixed(), random.Random(5)
    expected = await undisturbed(config, asked)
    before = our_memfds()
    async with running(config) as client:
        assert kept(client) == (False, 0)
        assert len(our_memfds() - before) == 4, "progress page, weights, pool, record"
        answers = [Answer() for _ in asked]
        tasks = [asyncio.create_task(a.fill(client, each)) for a, each in zip(answers, asked, strict=True)]
        for round_number in range(1, 6):
            goal = sum(len(a.token_ids) for a in answers) + rng.randrange(1, 200)
            await until(lambda n=goal: sum(len(a.token_ids) for a in answers) >= n)  # type: ignore[misc]
            await until_ready(client)
            hurt(client, signal.SIGKILL)
            await until(lambda n=round_number: client.status.generation > n)  # type: ignore[misc]
            await until_ready(client)
            has_weights, num_blocks = kept(client)
            assert has_weights and num_blocks > 0
        await asyncio.gather(*tasks)
        step = client.status.last_step
        assert step is not None and step.total_prefix_hit_tokens > 0, "resumed prompts are prefix hits"
        await until_idle(client)
    compare(answers, expected)
    for answer in answers:
        assert len({output.num_cached_tokens for output in answer.outputs}) == 1
    assert our_memfds() <= before


@pytest.mark.parametrize(
    ("number", "is_believed"),
    [
        (signal.SIGKILL, True),
        (signal.SIGSTOP, True),
        (signal.SIGSEGV, False),
        (signal.SIGBUS, False),
        (signal.SIGABRT, False),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else None,
)
async def test_the_pool_is_believed_after_a_death_from_outside_only(
    config: EngineConfig, number: signal.Signals, is_believed: bool
) -> None:
    asked = mixed(max_tokens=200)[:4]
    expected = await undisturbed(config, asked)
    async with running(config) as client:
        answers = [Answer() for _ in asked]
        tasks = [asyncio.create_task(a.fill(client, each)) for a, each in zip(answers, asked, strict=True)]
        await until(lambda: min(len(a.token_ids) for a in answers) >= 40)
        hurt(client, number)
        await until(lambda: client.status.generation > 1)
        await until_ready(client)
        has_weights, num_blocks = kept(client)
        assert has_weights, "sealed weights cannot be harmed"
        assert (num_blocks > 0) == is_believed
        await asyncio.gather(*tasks)
    compare(answers, expected)


async def test_what_a_tenant_computed_is_no_hit_for_another(config: EngineConfig) -> None:
    prompt = prompt_ids(300, seed=9)

    def asked(name: str, salt: str) -> EngineRequest:
        return msgspec.structs.replace(request(name, prompt=prompt, max_tokens=2), cache_salt=salt)

    async with running(config) as client:
        await complete(client, asked("before", "one"))
        hurt(client, signal.SIGKILL)
        await until(lambda: client.status.generation > 1)
        await until_ready(client)
        stranger = await complete(client, asked("stranger", "two"))
        owner = await complete(client, asked("owner", "one"))
    assert stranger.outputs[0].num_cached_tokens == 0
    assert owner.outputs[0].num_cached_tokens == 256, "an ordinary hit: it was computed for this tenant before"


async def test_deaths_in_a_row_drop_the_weights_too(config: EngineConfig) -> None:
    async with running(config) as client:
        for generation, has_weights in ((1, True), (2, False)):
            await until_ready(client)
            hurt(client, signal.SIGSEGV)
            await until(lambda n=generation: client.status.generation > n)  # type: ignore[misc]
            await until_ready(client)
            assert kept(client) == (has_weights, 0)
        assert len((await complete(client, request("after", max_tokens=3))).token_ids) == 3


@pytest.mark.parametrize("num_polls", [1, 4, 10])
async def test_a_kill_while_the_first_engine_loads(config: EngineConfig, num_polls: int) -> None:
    """Whatever it had done by then: the next one packs, or finds what was finished."""
    asked = request("r", max_tokens=20)
    expected = (await undisturbed(config, [asked]))[0]
    client = LocalEngineClient(config)
    await client.start()
    try:
        await until(lambda: client.engine_pid is not None)
        for _ in range(num_polls):
            await asyncio.sleep(0.02)
        hurt(client, signal.SIGKILL)
        await until(lambda: client.status.generation > 1)
        await until_ready(client)
        assert (await complete(client, asked)).token_ids == expected.token_ids
    finally:
        await client.stop()


async def test_without_memfds_engines_load_as_ever(config: EngineConfig) -> None:
    class NoMemory(MemoryKeeper):
        """A machine that gives none."""

        def descriptors(self) -> tuple[int, ...]:
            return ()

    asked = request("r", max_tokens=100)
    expected = (await undisturbed(config, [asked]))[0]
    client = LocalEngineClient(config, first=EngineProcess.spawn(1, config, memory=NoMemory()))
    await client.start()
    try:
        limits = await client.wait_ready(30.0)
        assert limits.kept.reason == "this machine gives no memory that outlives a process"
        task = asyncio.create_task(Answer().fill(client, asked))
        await until(lambda: client.status.last_step is not None)
        hurt(client, signal.SIGKILL)
        assert (await task).token_ids == expected.token_ids
        assert kept(client) == (False, 0)
    finally:
        await client.stop()


async def test_weights_are_in_memory_once(config: EngineConfig) -> None:
    async with running(config) as client:
        hurt(client, signal.SIGKILL)
        await until(lambda: client.status.generation > 1)
        await until_ready(client)
        await complete(client, request("r", max_tokens=3))
        fields = _mapping(client, "headwater-weights")
        assert fields["Anonymous"] == 0, "pages were copied"
        assert fields["Pss"] == fields["Rss"] > 0, "another process maps them too"


def _mapping(client: LocalEngineClient, name: str) -> dict[str, int]:
    """Sums of an engine's smaps over the mappings of one memfd, KiB."""
    sums: dict[str, int] = {}
    is_wanted = False
    for line in Path(f"/proc/{client.engine_pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key and " " in key:
            is_wanted = name in line
        elif is_wanted and rest.strip().endswith("kB"):
            sums[key] = sums.get(key, 0) + int(rest.split()[0])
    return sums
