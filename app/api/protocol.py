"""uvicorn's HTTP protocol with the bounds that it lacks. Given to uvicorn as `http=BoundedHttpProtocol`.

uvicorn gathers a request's head without a limit of size or time: one endless header holds the event loop
for minutes and memory for ever, and a connection that sends a byte now and then is never closed. Here a
head has at most 64 KiB and 30 seconds. Also: small writes go out at once on every event loop (TCP_NODELAY),
and a closed connection is told to the request that runs, not to the last one pipelined behind it.
"""

import asyncio
import socket
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.api.errors import HeadTimeout, HeadTooLarge, error_body, kind_of
from app.core.errors import ClientError

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    max_head_bytes = MAX_HEAD_BYTES
    head_seconds = HEAD_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaits_head = True
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """A client connected: its first head is due."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: the running request must know, the pipelined ones never start."""
        self._disarm()
        self.pipeline.clear()
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; give up on a head that grows beyond the limit."""
        super().data_received(data)
        # A chunk is counted whole, with what it holds of an earlier body: chunks are small against the limit.
        if self._awaits_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self.max_head_bytes:
                self._refuse(HeadTooLarge(f"The request's headers exceed {self.max_head_bytes} bytes."))

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._awaits_head = True
        self._head_bytes = 0
        self._disarm()
        self._arm()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._awaits_head = False
        self._disarm()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self.head_seconds, self._expire)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        if not self.transport.is_closing():
            self._refuse(HeadTimeout(f"The request's headers did not arrive within {self.head_seconds:g} s."))

    def _refuse(self, error: ClientError) -> None:
        """Answer, unless an earlier request of this connection is being answered, and close."""
        if self._running is None or self._running.response_complete:
            body = msgspec.json.encode(error_body(error))
            head = f"HTTP/1.1 {kind_of(error).status} Refused\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()
