"""The whole path: HTTP, journal, socket, engine process, scheduler, scripted runner, and back."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator

import httpx
import pytest

from app.client.local import LocalEngineClient
from app.core.config import EngineConfig
from app.core.types import FinishReason
from tests.contract.serving import TEXT, Running, chunks_of, make_context, running, wait_until
from tests.text_tokenizers import byte_level

IDS = byte_level().encode_now(TEXT, False)
NUM_STREAMS = 96


class RealServer(Running):
    """A server around a real engine process whose runner says `TEXT` over and over."""

    @property
    def client_of_engine(self) -> LocalEngineClient:
        engine = self.context.engine
        assert isinstance(engine, LocalEngineClient)
        return engine

    def is_idle(self) -> bool:
        admission = self.context.admission
        counts = (admission.num_live_sequences, admission.num_waiting_tokens, admission.num_parsing_bytes)
        return counts == (0, 0, 0) and self.context.engine.status.num_live_requests == 0

    def finish_counts(self) -> dict[str, float]:
        return {one.value: self.sample("request_success_total", finished_reason=one.value) for one in FinishReason}


@pytest.fixture(scope="module")
def real() -> Iterator[RealServer]:
    tokenizer = byte_level()
    config = EngineConfig(
        model_dir="none",
        tier="scripted",
        max_num_seqs=32,
        num_kv_blocks=256,
        eos_token_ids=(1,),
        scripted={
            "tokens": ",".join(map(str, IDS)),
            "vocab_size": tokenizer.vocab_size,
            "max_model_len": 512,
            "step_seconds": 0.0005,
        },
    )
    engine = LocalEngineClient(config, on_step=lambda *step: context.metrics.observe_step(*step))
    context = make_context(engine, tokenizer=tokenizer, runs_engine=True)
    with running(context) as port:
        server = RealServer(port, context)
        wait_until(lambda: server.http.get("/ready").status_code == 200)
        yield server
        wait_until(server.is_idle)
        server.http.close()
        server.client.close()


def test_text_counts_and_cache(real: RealServer) -> None:
    prompt = "你好 " * 20
    first = real.complete(prompt=prompt, max_tokens=len(IDS), logprobs=1, echo=True, temperature=0)
    assert first["choices"][0]["text"] == prompt + TEXT
    num_prompt = len(byte_level().encode_now(prompt))
    assert len(first["choices"][0]["logprobs"]["tokens"]) == num_prompt + len(IDS)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    again = real.complete(prompt=prompt, max_tokens=5)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    salted = real.complete(prompt=prompt, max_tokens=5, cache_salt="other")
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    scored = real.complete(prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == num_prompt


def test_a_stop_string_aborts_in_the_engine(real: RealServer) -> None:
    chunks = real.stream(max_tokens=400, stop=["世界"], prompt=["a", "b"], n=2)
    for index in range(4):
        own = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(own) == TEXT[: TEXT.index("世界")]
    wait_until(real.is_idle)


async def _one(client: httpx.AsyncClient, dice: random.Random) -> str:
    """One streamed request; some leave early. What it came to."""
    leaves_after = dice.choice([None, None, 0, 1, 5, 40])
    stop = dice.choice([None, "🚀"])
    body = {"prompt": "Hi " * dice.randint(1, 30), "stream": True, "max_tokens": 60, "stop": stop, "n": 2}
    seen = ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        if leaves_after == 0:
            return "left"
        events = 0
        async for part in response.aiter_text():
            seen += part
            events += part.count("\n\n")
            if leaves_after is not None and events >= leaves_after:
                return "left"
    chunks = chunks_of(seen)
    texts = ["".join(one["choices"][0]["text"] for one in chunks if one["choices"][0]["index"] == i) for i in (0, 1)]
    whole = byte_level().decode(IDS[:60])
    assert texts == [whole[: whole.index("🚀")] if stop else whole] * 2
    return "stop" if stop else "length"


def test_many_streams_some_of_which_leave(real: RealServer) -> None:
    dice = random.Random(5)
    before = real.finish_counts()

    async def crowd() -> list[str]:
        limits = httpx.Limits(max_connections=NUM_STREAMS)
        async with httpx.AsyncClient(base_url=real.url, timeout=30, limits=limits) as client:
            return await asyncio.gather(*(_one(client, dice) for _ in range(NUM_STREAMS)))

    outcomes = asyncio.run(crowd())
    wait_until(real.is_idle)
    after = real.finish_counts()
    counts = {reason: after[reason] - before[reason] for reason in after}
    assert sum(counts.values()) == 2 * NUM_STREAMS and counts["error"] == 0
    # A stream that leaves may have ended by itself first, never the other way round.
    assert counts["abort"] <= 2 * outcomes.count("left")
    assert counts["stop"] >= 2 * outcomes.count("stop") and counts["length"] >= 2 * outcomes.count("length")
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert real.sample(gauge) == 0
    assert real.sample("generation_tokens_total") > 0 and real.sample("iteration_tokens_total_count") > 60


def test_an_engine_that_dies_is_replaced_and_counters_go_on(real: RealServer) -> None:
    tokens = real.sample("generation_tokens_total")
    steps = real.sample("iteration_tokens_total_count")
    pid = real.client_of_engine.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: real.client_of_engine.status.generation == 2)
    wait_until(lambda: real.http.get("/ready").status_code == 200)
    assert real.complete(max_tokens=5)["choices"][0]["text"] == "Hello"
    assert real.sample("generation_tokens_total") == tokens + 5
    assert real.sample("iteration_tokens_total_count") > steps
    assert real.sample("engine_generation") == 2 and real.sample("engine_restarts_total") == 1
