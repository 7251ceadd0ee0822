"""Deadlines of the client and limits of the operator: the engine is freed, and the client is told."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from app.api.deps import ApiLimits
from app.text import ChatTemplate
from tests.contract.serving import MODEL, FakeServer, chunks_of, fake_server, wait_until

HEADER = "X-Request-Deadline"


@pytest.fixture
def own_server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def timeouts(server: FakeServer, limit: str) -> float:
    value = server.context.metrics.registry.get_sample_value(
        "headwater_requests_timed_out_total", {"model_name": MODEL, "limit": limit}
    )
    return value or 0.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_deadline_before_the_first_output_is_a_504(own_server: FakeServer, stream: bool, n: int) -> None:
    own_server.engine.hold_at = 0  # nothing but the deadline can end these
    answer = own_server.post({"prompt": "a", "stream": stream, "n": n}, **{HEADER: "0.2"})
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "deadline_exceeded") and "0.2 s" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    wait_until(own_server.is_idle)
    assert len(own_server.engine.aborted) == n
    assert own_server.sample("request_success_total", finished_reason="abort") == n
    assert timeouts(own_server, "deadline") == 1


def test_a_deadline_within_a_stream_is_an_event(own_server: FakeServer) -> None:
    own_server.engine.hold_at = 3
    answer = own_server.post({"prompt": "a", "stream": True, "max_tokens": 20}, **{HEADER: "0.3"})
    assert answer.status_code == 200
    chunks = chunks_of(answer.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "Hel"
    assert chunks[-1]["error"]["code"] == "deadline_exceeded" and answer.text.endswith("data: [DONE]\n\n")
    wait_until(own_server.is_idle)
    assert len(own_server.engine.aborted) == 1
    assert own_server.sample("request_success_total", finished_reason="abort") == 1


def test_the_clients_library_hears_once_and_does_not_ask_again(own_server: FakeServer) -> None:
    own_server.engine.hold_at = 0
    client = own_server.client.with_options(max_retries=2)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model=MODEL, prompt="a", extra_headers={HEADER: "0.1"})
    assert caught.value.status_code == 504
    wait_until(own_server.is_idle)
    assert len(own_server.engine.requests) == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
@pytest.mark.parametrize("passed", ["0", "-3.5"])
def test_a_deadline_that_has_passed_reaches_no_engine(path: str, passed: str) -> None:
    body: dict[str, Any] = {"prompt": "a"}
    if path == "/v1/messages":
        body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}
    template = ChatTemplate({"default": "{{ messages[0]['content'] }}"}, special_tokens={})
    with fake_server(chat_template=template) as server:
        answer = server.post(body, path, **{HEADER: passed})
        assert answer.status_code == 504
        if path == "/v1/messages":
            assert answer.json()["error"]["type"] == "timeout_error"
        assert server.engine.requests == []
        wait_until(server.is_idle)


@pytest.mark.parametrize("value", ["", "soon", "1764000000", "1e3", "nan", "inf", "2026-11-24T10:00:00Z", "1" * 400])
def test_a_deadline_that_is_no_number_of_seconds_is_a_400(server: FakeServer, value: str) -> None:
    answer = server.post({"prompt": "a"}, **{HEADER: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == HEADER
    assert server.engine.requests == []


def test_a_deadline_that_is_kept_changes_nothing(server: FakeServer) -> None:
    plain = server.post({"prompt": "a", "max_tokens": 5, "seed": 1})
    timed = server.post({"prompt": "a", "max_tokens": 5, "seed": 1}, **{HEADER: "60"})
    assert timed.json()["choices"] == plain.json()["choices"]


def test_the_operators_limit_holds_where_the_clients_is_longer() -> None:
    with fake_server(limits=ApiLimits(request_timeout=0.2)) as server:
        server.engine.hold_at = 0
        for headers in ({}, {HEADER: "60"}):
            answer = server.post({"prompt": "a"}, **headers)
            assert answer.status_code == 504 and "0.2 s" in answer.json()["error"]["message"]
        wait_until(server.is_idle)


def test_the_queue_has_a_limit_of_its_own() -> None:
    with fake_server(limits=ApiLimits(queue_timeout=0.2)) as server:
        server.engine.hold_at = 0
        answer = server.post({"prompt": "a"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_timeout"
        assert timeouts(server, "queue") == 1
        wait_until(server.is_idle)
        # What has begun may take its time: held for longer than the limit after its first token.
        server.engine.hold_at = 1
        timed = server.post({"prompt": "a", "stream": True}, **{HEADER: "0.6"})
        assert chunks_of(timed.text)[-1]["error"]["code"] == "deadline_exceeded"
        wait_until(server.is_idle)
