"""The client that goes on by itself: against servers of our own that end, refuse and differ as told."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest

from app.api.deps import ApiLimits
from app.client.engine_client import EngineState
from app.terminal.resume import Lost, Refused, ResumingStream, server_sent_events
from app.terminal.wire import Api, Unreachable
from tests.contract.fake_engine import FakeEngine
from tests.contract.serving import MODEL, FakeServer, fake_server
from tests.e2e.serving import free_port

BODY: dict[str, Any] = {"prompt": "Hi", "max_tokens": 40, "temperature": 0.8}
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[FakeServer, FakeServer]]:
    limits = ApiLimits(keep_alive_interval=0.05)
    with fake_server(limits=limits) as first, fake_server(limits=limits) as second:
        yield first, second


@contextmanager
def failing(server: FakeServer, *, at: int, failure: str) -> Iterator[None]:
    """Each of the server's sequences fails in this way when so many of its own tokens are out."""
    server.engine.fail_at, server.engine.failure = at, failure
    try:
        yield
    finally:
        server.engine.fail_at = None


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def ids_of(engine: FakeEngine) -> tuple[int, ...]:
    return engine.requests[-1].output_token_ids


def test_where_nothing_breaks_it_is_a_stream_like_any(servers: tuple[FakeServer, FakeServer]) -> None:
    first, second = servers
    whole = first.complete(**BODY)["choices"][0]["text"]
    stream = ResumingStream([first.url, second.url], PATH, BODY)
    chunks = list(stream)
    assert text_of(chunks) == whole and stream.num_cuts == 0
    assert "token_ids" not in chunks[3]["choices"][0] and "prompt_token_ids" not in chunks[0]["choices"][0]
    asked = list(ResumingStream([first.url], PATH, BODY | {"return_token_ids": True}))
    assert asked[3]["choices"][0]["token_ids"] and asked[0]["choices"][0]["prompt_token_ids"]


def test_a_server_that_stops_is_left_for_the_next_one(servers: tuple[FakeServer, FakeServer]) -> None:
    first, second = servers
    whole = first.complete(**BODY)["choices"][0]["text"]
    told: list[str] = []
    with failing(first, at=7, failure="abort"):
        chunks = list(ResumingStream([first.url, second.url], PATH, BODY, on_cut=told.append))
    assert text_of(chunks) == whole and len({chunk["id"] for chunk in chunks}) == 1
    assert ids_of(second.engine) == second.engine.script[:7]
    assert len(told) == 1 and first.url in told[0]


def test_a_cut_within_an_event_loses_nothing(servers: tuple[FakeServer, FakeServer]) -> None:
    """Whatever bytes of the response came: what was no whole event comes again."""
    first, second = servers
    whole = first.complete(**BODY)["choices"][0]["text"]
    with httpx.Client() as client:
        body = BODY | {"stream": True, "return_token_ids": True, "seed": 1, "stream_options": {"resumable": True}}
        raw = client.post(first.url + PATH, json=body).content
    for size in range(1, len(raw), 997):
        calls = [httpx.Response(200, stream=_Broken(raw[:size])), None]

        def handle(request: httpx.Request, calls: list[Any] = calls) -> httpx.Response:
            canned = calls.pop(0)
            return canned if canned is not None else _send(request)

        with httpx.Client(transport=httpx.MockTransport(handle)) as client:
            stream = ResumingStream([first.url, second.url], PATH, BODY | {"seed": 1}, http=client)
            assert text_of(list(stream)) == whole, size
            assert stream.num_cuts == 1


def _send(request: httpx.Request) -> httpx.Response:
    with httpx.Client() as client:
        return client.send(client.build_request("POST", request.url, content=request.content, headers=request.headers))


class _Broken(httpx.SyncByteStream):
    def __init__(self, data: bytes) -> None:
        self._data = data

    def __iter__(self) -> Iterator[bytes]:
        yield self._data
        raise httpx.RemoteProtocolError("peer closed connection")


def test_an_error_that_is_the_requests_own_is_not_carried_to_the_next_server(
    servers: tuple[FakeServer, FakeServer],
) -> None:
    first, second = servers
    second.engine.requests.clear()
    with failing(first, at=3, failure="raise"), pytest.raises(Refused, match="fails this request") as refused:
        list(ResumingStream([first.url, second.url], PATH, BODY))
    assert refused.value.code == "engine_failed" and not second.engine.requests
    with pytest.raises(Refused) as refused:
        list(ResumingStream([first.url], PATH, BODY | {"temperature": 9}))
    assert refused.value.status == 400


def test_a_server_of_another_model_is_passed_by(servers: tuple[FakeServer, FakeServer]) -> None:
    first, second = servers
    whole = first.complete(**BODY)["choices"][0]["text"]
    with fake_server() as other:
        limits = other.engine.limits_when_ready
        other.engine.limits_when_ready = msgspec.structs.replace(limits, fingerprint="fp-other")
        with failing(first, at=5, failure="abort"):
            chunks = list(ResumingStream([first.url, other.url, second.url], PATH, BODY))
            assert text_of(chunks) == whole and not other.engine.requests

            def take_away(_: str) -> None:
                first.engine.state = EngineState.RESTARTING

            with pytest.raises(Lost, match="503"):
                list(ResumingStream([first.url, other.url], PATH, BODY, patience=0.3, on_cut=take_away))
            first.engine.state = EngineState.READY


def test_where_nobody_answers_it_gives_up_in_time() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    told: list[str] = []
    stream = ResumingStream([url], PATH, BODY, patience=0.2, on_cut=told.append)
    with pytest.raises(Lost, match="no server went on"):
        list(stream)
    assert stream.num_cuts > 1 == len(told)


def test_the_commands_go_on_at_the_next_of_their_servers(servers: tuple[FakeServer, FakeServer]) -> None:
    first, second = servers
    whole = first.complete(**BODY)["choices"][0]["text"]
    nobody = f"http://127.0.0.1:{free_port()}"
    told: list[str] = []
    with Api(f"{nobody},{first.url},{second.url}", on_cut=told.append) as api:
        assert api.choose_model(MODEL).id == MODEL and api.url == first.url
        with failing(first, at=4, failure="abort"):
            deltas = list(api.stream(PATH, BODY))
    assert "".join(delta.text for delta in deltas) == whole and deltas[-1].finish_reason == "length"
    assert told
    with Api(nobody) as api, pytest.raises(Unreachable):
        api.choose_model(None)


def test_events_are_read_as_the_standard_says() -> None:
    raw = (
        b": hi\r\n\r\nid: 1\r\ndata: a\r\ndata: b\r\n\r\n:\n\ndata:c\n\nid: 2\ndata: \xe4\xbd\xa0\n\nid: 3\ndata: part"
    )
    expected = [("1", "a\nb"), ("1", "c"), ("2", "你")]
    assert list(server_sent_events(iter([raw]))) == expected
    assert list(server_sent_events(bytes([byte]) for byte in raw)) == expected
