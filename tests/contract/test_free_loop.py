"""A large body is nobody else's wait: what the event loop's own thread does for a request does not grow with it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from tests.contract.serving import FakeServer, fake_server, wait_until
from tests.contract.test_chat import TEMPLATE

NUM_PARTS = 20_000
MOST_CALLS = 12_000
"""Of functions, on the loop's thread: a few for each packet of the body, some hundreds for the request."""
SAY = [{"role": "user", "content": "Hi"}]
IDS = [5] * NUM_PARTS
NESTED = {"properties": {f"p{index}": {"type": "string", "maxLength": 5} for index in range(NUM_PARTS // 4)}}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": NESTED}}
LARGE: dict[str, tuple[str, dict[str, Any], int]] = {
    "token ids": ("/v1/completions", {"prompt": IDS, "max_tokens": 1}, 200),
    "allowed ids": ("/v1/completions", {"prompt": "a", "max_tokens": 1, "allowed_token_ids": IDS}, 200),
    "messages": ("/v1/chat/completions", {"messages": SAY * NUM_PARTS, "max_tokens": 1}, 200),
    "messages of Anthropic's": ("/v1/messages", {"messages": SAY * NUM_PARTS, "max_tokens": 1}, 200),
    "messages to count": ("/v1/messages/count_tokens", {"messages": SAY * NUM_PARTS}, 200),
    "items": ("/v1/responses", {"input": SAY * NUM_PARTS, "max_output_tokens": 1}, 200),
    "a schema": ("/v1/chat/completions", {"messages": SAY, "max_tokens": 1, "response_format": FORM}, 400),
    "a text": ("/tokenize", {"prompt": "a " * NUM_PARTS, "return_token_strs": True}, 200),
    "ids to detokenize": ("/detokenize", {"tokens": IDS, "return_token_strs": True}, 200),
    "unknown fields": ("/v1/chat/completions", {"messages": SAY} | {f"x{index}": 1 for index in range(NUM_PARTS)}, 400),
}


class LoopCalls:
    """Calls on the thread of the server's event loop, by the names of functions. Other threads are left alone."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        """As `sys.setprofile` has it."""
        if threading.current_thread().name.startswith("asyncio_"):
            sys.setprofile(None)  # of the pool that large work goes to
        elif event in ("call", "c_call"):
            self.names.append(frame.f_code.co_name if event == "call" else getattr(argument, "__name__", "?"))


@contextmanager
def profiled(calls: LoopCalls) -> Iterator[None]:
    """Threads that begin in this block are watched."""
    threading.setprofile(calls.note)
    try:
        yield
    finally:
        threading.setprofile(None)


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[FakeServer, LoopCalls]]:
    calls = LoopCalls()
    with profiled(calls), fake_server(max_model_len=1_000_000, chat_template=TEMPLATE) as server:
        yield server, calls


@pytest.mark.parametrize("kind", LARGE)
def test_the_loop_does_not_read_what_is_large(watched: tuple[FakeServer, LoopCalls], kind: str) -> None:
    server, calls = watched
    path, body, status = LARGE[kind]
    calls.names.clear()
    response = server.post(body, path)
    wait_until(server.is_idle)
    seen = list(calls.names)
    assert response.status_code == status, response.text[:300]
    assert "data_received" in seen, "the watch sees nothing"
    assert "decode_keys" not in seen
    assert "decode_struct" not in seen
    assert len(seen) < MOST_CALLS
