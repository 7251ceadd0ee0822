"""Clients that read or send too slowly, or are too many: they are cut, nobody else notices."""

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from app.api.middleware import MAX_HEADERS
from app.api.protocol import BoundedHttpProtocol
from tests.contract.serving import MODEL, FakeServer, fake_server, wait_until

CONTEXT = 1_000_000
"""Far more tokens than all buffers between server and client hold events."""


class Impatient(BoundedHttpProtocol):
    """Readers are cut soon."""

    send_seconds = 0.2


class Patient(BoundedHttpProtocol):
    """Readers have some time."""

    send_seconds = 3.0


@contextmanager
def unread(server: FakeServer, **fields: object) -> Iterator[socket.socket]:
    """A connection over which a completion was asked for, and whose client reads nothing and has little room."""
    body = json.dumps({"prompt": "a", "max_tokens": CONTEXT - 10, "ignore_eos": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        yield connection


def cuts(server: FakeServer, reason: str) -> float:
    return server.sample("connections_cut_total", reason=reason, model_name=MODEL)


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_client_that_does_not_read_its_stream_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with fake_server(protocol=Impatient, max_model_len=CONTEXT) as server, unread(server, stream=True):
        wait_until(lambda: len(server.engine.aborted) == 1)
        assert server.complete(max_tokens=2)["choices"][0]["text"] == "He"
        wait_until(server.is_idle)
        assert cuts(server, "slow_reader") == 1
        wait_until(lambda: server.sample("request_success_total", finished_reason="abort") == 1)
    facts = [record.facts for record in caplog.records if hasattr(record, "facts")]
    assert any(fact.get("reason") == "slow_reader" and fact["unread_bytes"] > 0 for fact in facts)
    assert any(fact.get("error") == "slow_reader" for fact in facts)


def test_a_client_that_does_not_read_a_whole_answer_is_cut() -> None:
    # The request is over when its answer is written: only the connection is left to be cut.
    fields = {"max_tokens": 20_000, "logprobs": 5}
    with fake_server(protocol=Impatient, max_model_len=CONTEXT) as server, unread(server, **fields):
        wait_until(lambda: cuts(server, "slow_reader") == 1)
        assert server.is_idle()


def test_a_client_that_reads_late_but_reads_gets_everything() -> None:
    with (
        fake_server(protocol=Patient, max_model_len=CONTEXT) as server,
        unread(server, stream=True, max_tokens=3000) as connection,
    ):
        data = b""
        while not data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            part = connection.recv(65536)
            assert part
            data += part
        assert cuts(server, "slow_reader") == 0


def test_idle_connections_make_room_and_busy_ones_stay() -> None:
    with fake_server(most=8) as server, ExitStack() as stack:
        server.engine.hold_at = 1
        busy = stack.enter_context(unread(server, stream=True, max_tokens=3))
        wait_until(lambda: len(server.engine.live) == 1)
        crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10)) for _ in range(30)]
        wait_until(lambda: cuts(server, "no_room") == 23)
        # Those that came first were closed first.
        assert all(is_closed(connection) for connection in crowd[:23])
        assert server.http.get("/health").status_code == 200
        server.engine.hold_at = None
        data = b""
        while b"[DONE]" not in data:
            data += busy.recv(65536)


def test_many_headers_are_a_431(server: FakeServer) -> None:
    few = {f"x-{index}": "a" for index in range(MAX_HEADERS - 10)}
    assert server.http.get("/health", headers=few).status_code == 200
    many = {f"x-{index}": "a" for index in range(MAX_HEADERS)}
    answer = server.http.get("/health", headers=many)
    assert answer.status_code == 431 and answer.json()["error"]["code"] == "headers_too_large"
