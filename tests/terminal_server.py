"""Another server of the same API, as small as can be: what the commands in the terminal do not get from ours."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, dict[str, Any]], Iterable[str | dict[str, Any]]]
"""Takes path and body; yields texts, or whole events. Raises Refusal."""


class Refusal(Exception):
    """An answer with another status."""

    def __init__(self, status: int, body: object) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class OtherServer:
    """Answers at `url`; remembers the bodies it was sent, and how many streams were cut off by the client."""

    def __init__(self, answer: Answer, *, model: dict[str, Any], ready: dict[str, Any] | None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_cut_off = 0
        self.cut_off = threading.Event()
        self._answer = answer
        self._gets: dict[str, Any] = {"/v1/models": {"object": "list", "data": [model]}}
        if ready is not None:
            self._gets["/ready"] = ready
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def run(self) -> None:
        self._http.serve_forever(poll_interval=0.01)

    def end(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.path in outer._gets:
                    self._json(200, outer._gets[self.path])
                else:
                    self._json(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.bodies.append(body)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                try:
                    events = iter(outer._answer(self.path, body))
                    self._stream(events)
                except Refusal as refusal:
                    self._json(refusal.status, refusal.body)
                except OSError:
                    outer.num_cut_off += 1
                    outer.cut_off.set()

            def _json(self, status: int, body: object) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _stream(self, events: Iterator[str | dict[str, Any]]) -> None:
                is_chat = "chat" in self.path
                first = next(events, None)
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                while first is not None:
                    event = first if isinstance(first, dict) else event_of(first, is_chat=is_chat)
                    self.wfile.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
                    first = next(events, None)
                self.wfile.write(b"data: [DONE]\n\n")

        return Handler


def event_of(text: str, *, is_chat: bool = False, finish_reason: str | None = None) -> dict[str, Any]:
    """An event with this text."""
    content = {"delta": {"content": text}} if is_chat else {"text": text}
    return {"choices": [{"index": 0, "finish_reason": finish_reason} | content]}


@contextmanager
def other_server(
    answer: Answer, *, model: dict[str, Any] | None = None, ready: dict[str, Any] | None = None
) -> Iterator[OtherServer]:
    """A server that runs until the block ends."""
    server = OtherServer(answer, model={"id": "other-model"} if model is None else model, ready=ready)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.end()
        thread.join(10)
