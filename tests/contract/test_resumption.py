"""What a client is told of hand-overs: the promise in a header, and a comment and a metric where it was inexact."""

import types
from collections.abc import AsyncGenerator, Iterator

import msgspec
import pytest

from app.core.types import EngineOutput, EngineRequest
from tests.contract.fake_engine import FakeEngine
from tests.contract.serving import FakeServer, chunks_of, fake_server


async def _generate(self: FakeEngine, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
    """As the fake does, with a hand-over before the third token."""
    count = 0
    async for output in FakeEngine.generate(self, request):
        count += 1
        yield msgspec.structs.replace(output, was_handed_over=count == 3)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server(text="hello there") as server:
        server.engine.generate = types.MethodType(_generate, server.engine)  # type: ignore[method-assign]
        yield server


@pytest.fixture(params=[True, False], ids=["exact", "approximate"])
def is_exact(request: pytest.FixtureRequest, server: FakeServer) -> bool:
    limits = server.engine.limits_when_ready
    server.engine.limits_when_ready = msgspec.structs.replace(limits, row_independent=request.param)
    return bool(request.param)


@pytest.mark.parametrize("stream", [False, True])
def test_the_promise_stands_in_a_header_and_a_hand_over_is_counted(
    server: FakeServer, is_exact: bool, stream: bool
) -> None:
    resume = "exact" if is_exact else "approximate"
    before = server.sample("sequences_handed_over_total", resume=resume)
    response = server.post({"prompt": "a", "stream": stream, "n": 2})
    assert response.headers["headwater-resume"] == resume
    assert server.sample("sequences_handed_over_total", resume=resume) == before + 2
    assert response.text.count(": an engine was replaced") == (2 if stream and not is_exact else 0)
    if stream:
        texts = [choice["text"] for chunk in chunks_of(response.text) for choice in chunk["choices"]]
        assert sorted("".join(texts)) == sorted("hello there" * 2)
