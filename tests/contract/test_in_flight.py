"""What happens while a request runs: failures, waiting, clients that leave, too many of them."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from app.api.admission import AdmissionLimits
from app.api.deps import ApiLimits
from app.api.protocol import BoundedHttpProtocol
from app.client.engine_client import EngineState
from tests.contract.serving import MODEL, FakeServer, chunks_of, fake_server, wait_until


@pytest.fixture
def own_server() -> Iterator[FakeServer]:
    """A server that the test may break."""
    with fake_server(limits=ApiLimits(keep_alive_interval=0.05, body_timeout=0.2)) as server:
        yield server


@contextmanager
def raw(server: FakeServer, body: object, **head: str) -> Iterator[socket.socket]:
    """A connection over which a completion request was sent."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(content)), "host": "x"}
    fields |= {name.replace("_", "-"): value for name, value in head.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + lines.encode() + b"\r\n" + content)
        yield connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        part = connection.recv(65536)
        assert part, f"closed after {data!r}"
        data += part
    return data


@pytest.mark.parametrize("failure", ["output", "raise", "unavailable", "abort", "defect"])
def test_an_error_before_the_first_output_is_a_real_status(own_server: FakeServer, failure: str) -> None:
    own_server.engine.fail_at, own_server.engine.failure = 0, failure
    status = 503 if failure in ("unavailable", "abort") else 500
    for stream in (False, True):
        response = own_server.post({"prompt": "a", "stream": stream, "n": 2})
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
        error = response.json()["error"]
        assert error["type"] == "server_error" and "secret" not in response.text
    assert response.headers.get("retry-after") == {"unavailable": "7", "abort": "1"}.get(failure)
    wait_until(own_server.is_idle)
    reason = "abort" if failure == "abort" else "error"
    assert own_server.sample("request_success_total", finished_reason=reason) == 4
    # One bad request is one bad request.
    own_server.engine.fail_at = None
    assert own_server.complete(max_tokens=2)["choices"][0]["text"] == "He"


@pytest.mark.parametrize("failure", ["output", "raise", "unavailable", "defect"])
def test_an_error_in_a_stream_is_an_event_and_then_done(own_server: FakeServer, failure: str) -> None:
    own_server.engine.fail_at, own_server.engine.failure = 3, failure
    chunks = own_server.stream(max_tokens=20, n=2)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == 0) == "Hel"
    assert set(chunks[-1]) == {"error"}
    assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
    wait_until(own_server.is_idle)
    with pytest.raises(openai.APIError):
        list(own_server.client.completions.create(model=MODEL, prompt="a", stream=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_at", [0, 3], ids=["queued", "decoding"])
def test_a_client_that_leaves_ends_its_sequences(own_server: FakeServer, stream: bool, hold_at: int) -> None:
    own_server.engine.hold_at = hold_at
    with raw(own_server, {"prompt": ["你好", "b"], "n": 2, "stream": stream}) as connection:
        wait_until(lambda: len(own_server.engine.live) == 4)
        if stream and hold_at:
            read_until(connection, b'"index":3')
        # The engine is held: nothing but the closed connection can end these.
    wait_until(own_server.is_idle)
    assert len(own_server.engine.aborted) == 4
    wait_until(lambda: own_server.sample("request_success_total", finished_reason="abort") == 4)


def test_a_client_that_leaves_while_sending_its_body_leaves_nothing(own_server: FakeServer) -> None:
    with raw(own_server, b'{"prompt": ', content_length="100000"):
        wait_until(lambda: own_server.context.admission.num_parsing_bytes == len(b'{"prompt": '))
    wait_until(own_server.is_idle)
    assert own_server.engine.requests == []


def test_a_client_may_leave_while_its_prompt_is_tokenized(own_server: FakeServer) -> None:
    prompts = ["你好 " * 60] * 1000
    for _ in range(5):
        with raw(own_server, {"prompt": prompts}):
            wait_until(lambda: own_server.context.admission.num_parsing_bytes > 0)
        wait_until(own_server.is_idle)
    assert len(own_server.engine.aborted) == len(own_server.engine.requests)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "Hello", "return_token_strs": True}),
        ("/detokenize", {"tokens": [41, 70], "return_token_strs": True}),
    ],
)
def test_the_tokenizers_routes_hold_their_room_until_they_are_done(
    own_server: FakeServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    tokenizer, held = own_server.context.tokenizer, []

    def watch(name: str) -> None:
        method = getattr(tokenizer, name)

        def watched(*args: Any) -> Any:
            held.append(own_server.context.admission.num_parsing_bytes)
            return method(*args)

        monkeypatch.setattr(tokenizer, name, watched)

    for name in ("encode", "decode", "token_text"):
        watch(name)
    assert own_server.post(body, path).status_code == 200
    assert len(held) >= 2 and min(held) > 0
    assert own_server.is_idle()


def test_a_text_beyond_any_context_is_not_tokenized(own_server: FakeServer) -> None:
    response = own_server.post({"prompt": "ab" * 500_000}, "/tokenize")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_slow_body_is_a_408(own_server: FakeServer) -> None:
    with raw(own_server, b'{"prompt": ', content_length="100") as connection:
        answer = read_until(connection, b"request_timeout")
    assert answer.startswith(b"HTTP/1.1 408 ")
    wait_until(own_server.is_idle)


def test_a_64_mb_body_is_refused_early_and_the_client_sees_why(own_server: FakeServer) -> None:
    piece = b"a" * 1_000_000
    with raw(own_server, b"", content_length=str(64 * len(piece))) as connection:
        # The answer comes before the body was sent, and survives that all of it is sent.
        answer = read_until(connection, b'"body_too_large"')
        for _ in range(64):
            connection.sendall(piece)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer
    wait_until(own_server.is_idle)


def test_a_client_that_waits_for_100_continue_is_told_at_once(own_server: FakeServer) -> None:
    with raw(own_server, b"", content_length=str(2**40), expect="100-continue") as connection:
        answer = read_until(connection, b'"body_too_large"')
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert connection.recv(1024) == b""


def test_headers_go_out_while_the_first_output_is_awaited(own_server: FakeServer) -> None:
    own_server.engine.hold_at = 0
    with raw(own_server, {"prompt": "a", "stream": True, "max_tokens": 2}, connection="close") as connection:
        answer = read_until(connection, b": keep-alive\n\n")
        answer += read_until(connection, b": keep-alive\n\n")
        assert answer.startswith(b"HTTP/1.1 200 ") and b"data:" not in answer
        own_server.engine.hold_at = None
        assert b'"text":"H"' in read_until(connection, b"data: [DONE]\n\n")


def test_an_error_after_the_headers_is_an_event(own_server: FakeServer) -> None:
    own_server.engine.hold_at = 0
    with raw(own_server, {"prompt": "a", "stream": True}) as connection:
        read_until(connection, b": keep-alive\n\n")
        own_server.engine.fail_at, own_server.engine.failure = 0, "unavailable"
        own_server.engine.hold_at = None
        assert b'data: {"error":{' in read_until(connection, b"data: [DONE]\n\n")


@pytest.mark.parametrize("state", [EngineState.STARTING, EngineState.RESTARTING, EngineState.DRAINING])
def test_no_engine_is_a_503_with_retry_after(own_server: FakeServer, state: EngineState) -> None:
    own_server.engine.state = state
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/completions", {"prompt": "a", "stream": True})):
        response = own_server.post(body, path)
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "engine_unavailable"
    ready = own_server.http.get("/ready")
    assert (ready.status_code, ready.json()["state"]) == (503, state.value)
    assert own_server.http.get("/health").status_code == 200
    known = 503 if state is EngineState.STARTING else 200
    assert own_server.http.get("/v1/models").status_code == known
    with pytest.raises(openai.InternalServerError):
        own_server.client.completions.create(model=MODEL, prompt="a")


def test_too_many_sequences_are_a_429_with_retry_after() -> None:
    with fake_server(admission=AdmissionLimits(max_live_sequences=3)) as server:
        server.engine.hold_at = 1
        with raw(server, {"prompt": "a", "n": 3}):
            wait_until(lambda: len(server.engine.live) == 3)
            response = server.post({"prompt": "a"})
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                server.client.completions.create(model=MODEL, prompt="a")
        wait_until(server.is_idle)
        server.engine.hold_at = None
        assert server.post({"prompt": "a", "n": 3}).status_code == 200
        # What can never be admitted is the client's mistake, not a matter of time.
        assert server.post({"prompt": "a", "n": 4}).json()["error"]["param"] == "n"
        assert server.sample("admission_rejections_total", reason="max_live_sequences", model_name=MODEL) == 2


def test_too_many_waiting_tokens_are_a_429() -> None:
    with fake_server(admission=AdmissionLimits(max_waiting_tokens=10)) as server:
        server.engine.hold_at = 0
        # Alone, a request may exceed the limit.
        with raw(server, {"prompt": [5] * 30}):
            wait_until(lambda: len(server.engine.live) == 1)
            assert server.post({"prompt": "a"}).status_code == 429
        wait_until(server.is_idle)


def test_a_slow_reader_holds_its_own_stream_alone(own_server: FakeServer) -> None:
    with raw(own_server, {"prompt": "a", "stream": True, "max_tokens": 250, "ignore_eos": True}) as connection:
        wait_until(lambda: len(own_server.engine.requests) == 1)
        assert own_server.complete(max_tokens=2)["choices"][0]["text"] == "He"
        data = read_until(connection, b"data: [DONE]\n\n")
    assert data.count(b"data: {") == 250


def test_pipelined_requests_are_answered_in_turn(own_server: FakeServer) -> None:
    request = b'{"prompt": "a", "max_tokens": 1, "stream": true}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    ) % len(request)
    with socket.create_connection(("127.0.0.1", own_server.port), timeout=10) as connection:
        connection.sendall((head + request) * 3)
        data = b""
        while data.count(b"data: [DONE]\n\n") < 3:
            data += connection.recv(65536)
    assert data.count(b"HTTP/1.1 200 OK") == 3


def test_an_exact_stream_on_the_wire(own_server: FakeServer) -> None:
    response = own_server.post({"prompt": "a", "max_tokens": 2, "stream": True, "request_id": "r"})
    events: list[dict[str, Any]] = chunks_of(response.text)
    assert events[0] == {
        "id": "cmpl-r",
        "object": "text_completion",
        "created": events[0]["created"],
        "model": MODEL,
        "choices": [{"index": 0, "text": "H", "logprobs": None, "finish_reason": None, "stop_reason": None}],
        "system_fingerprint": "fp-test",
    }
    assert [list(event) for event in events] == [list(events[0])] * 2
    assert events[1]["choices"][0] == {
        "index": 0,
        "text": "e",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }


def test_a_pipelining_client_that_leaves_ends_what_runs_and_starts_nothing_more(own_server: FakeServer) -> None:
    own_server.engine.hold_at = 1
    request = b'{"prompt": "a", "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", own_server.port), timeout=10) as connection:
        connection.sendall((head % len(request) + request) * 3)
        read_until(connection, b"data: ")
    wait_until(own_server.is_idle)
    assert len(own_server.engine.aborted) == len(own_server.engine.requests) == 1


class Impatient(BoundedHttpProtocol):
    """Heads and bodies are due at once."""

    head_seconds = 0.1
    message_seconds = 0.2


def test_an_endless_head_is_refused(own_server: FakeServer) -> None:
    with socket.create_connection(("127.0.0.1", own_server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nx-big: " + b"a" * 70_000)
        answer = read_until(connection, b"headers_too_large")
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_large_heads_and_bodies_within_the_limits_pass(own_server: FakeServer) -> None:
    headers = {f"x-{index}": "a" * 6000 for index in range(10)}
    for _ in range(3):
        body = {"prompt": "a", "max_tokens": 1, "metadata": {"x": "y" * 500_000}}
        assert own_server.post(body, **headers).status_code == 200


def test_a_slow_head_is_closed() -> None:
    with fake_server(protocol=Impatient) as server:
        for sent in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(sent)
                assert b"HTTP/1.1 408 " in read_until(connection, b"request_timeout")
                assert connection.recv(1024) == b""


CHUNKED = b"GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNKED_POST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b'transfer-encoding: chunked\r\n\r\nd\r\n{"prompt":"a"\r\n'
)


def is_closed_while_sending(connection: socket.socket, piece: bytes, *, most: int) -> bool:
    """Whether the server hangs up before `most` bytes of `piece` after `piece` went out."""
    sent = 0
    try:
        while sent < most:
            sent += connection.send(piece)
        connection.settimeout(1)
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("head", [CHUNKED, CHUNKED_POST], ids=["get", "post"])
@pytest.mark.parametrize("start", [b"0\r\nx: ", b"0;x="], ids=["trailer", "extension"])
def test_endless_trailers_are_cut_off(own_server: FakeServer, head: bytes, start: bytes) -> None:
    with socket.create_connection(("127.0.0.1", own_server.port), timeout=10) as connection:
        connection.sendall(head + start)
        assert is_closed_while_sending(connection, b"a" * 65_536, most=8_000_000)


@pytest.mark.parametrize("sent", [CHUNKED, CHUNKED + b"0\r\nx: a", CHUNKED + b"5\r\nab", CHUNKED_POST], ids=range(4))
def test_a_message_that_never_ends_is_closed(sent: bytes) -> None:
    with (
        fake_server(protocol=Impatient) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=3) as connection,
    ):
        connection.sendall(sent)
        while connection.recv(65536):
            pass


def test_trailers_within_the_limit_and_the_request_after_them_pass(own_server: FakeServer) -> None:
    with socket.create_connection(("127.0.0.1", own_server.port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(
                CHUNKED_POST + b'11\r\n,"max_tokens": 1}\r\n' + b"0\r\nx: " + b"a" * 30_000 + b"\r\n\r\n"
            )
            assert b"HTTP/1.1 200 OK" in read_until(connection, b'"finish_reason":"length"')


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_of_http_1_0_gets_no_chunks(server: FakeServer, stream: bool) -> None:
    body = json.dumps({"prompt": "Hi", "stream": stream, "max_tokens": 8}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # until the server closes
    head_sent, _, sent = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head_sent.splitlines()[0] and b"transfer-encoding" not in head_sent
    assert b"connection: close" in head_sent
    assert len(chunks_of(sent.decode())) == 8 if stream else json.loads(sent)["usage"]["completion_tokens"] == 8
