"""uvicorn's HTTP protocol with the bounds that it lacks. Given to uvicorn as `http=BoundedHttpProtocol`.

uvicorn gathers a request's head without a limit of size or time: one endless header holds the event loop
for minutes and memory for ever, and a connection that sends a byte now and then is never closed. Here a
head has at most 64 KiB and 30 seconds. So have, after it, chunk extensions and trailers: 64 KiB without a byte
of body; and the whole message ends within 75 seconds, in which bytes that this side does not read yet are
nobody's fault. Also: small writes go out at once on every event loop (TCP_NODELAY),
and a closed connection is told to the request that runs, not to the last one pipelined behind it.
"""

import asyncio
import socket
from contextlib import suppress
from typing import Any

import msgspec
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.api.connections import ConnectionRoom
from app.api.errors import HeadTimeout, HeadTooLarge, error_body, kind_of
from app.api.record import RequestRecord
from app.core.errors import ClientError

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
MESSAGE_SECONDS = 75.0
"""From the head to the end of the body: more than the routes give a body, so that theirs is the answer."""
SEND_SECONDS = 30.0
SEND_BYTES = 48 * 1024
"""What a client takes at least in that time: what makes a stream go on, between the transport's two marks."""
UNSENT_BYTES = 128 * 1024
_TCP_NOTSENT_LOWAT = 25
SLOW_READER = "slow_reader"


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    max_head_bytes = MAX_HEAD_BYTES
    head_seconds = HEAD_SECONDS
    message_seconds = MESSAGE_SECONDS
    send_seconds = SEND_SECONDS
    room: ConnectionRoom | None = None
    """Of all connections of the server; None: they are not counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaits_head = True
        self._head_bytes = 0
        """Of a head, or of what came since then or since the last of a body."""
        self._is_counted = True
        """The bytes being parsed hold nothing of a body and no message's end."""
        self._deadline: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._send_deadline: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        """Of the answer, when the deadline was set."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """A client connected: its first head is due."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError):  # not every kernel has it
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._arm(self.head_seconds)
        if self.room is not None:
            self.room.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: the running request must know, the pipelined ones never start."""
        self._disarm()
        self._stop_watching_reader()
        if self.room is not None:
            self.room.closed(self)
        self.pipeline.clear()
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; give up on a head, or on trailers, that grow beyond the limit."""
        self._is_counted = True
        super().data_received(data)
        # A chunk is counted whole, with what it holds of an earlier body: chunks are small against the limit.
        if (self._awaits_head or self._is_counted) and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self.max_head_bytes:
                self._refuse(HeadTooLarge(f"The request's headers exceed {self.max_head_bytes} bytes."))

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._awaits_head = True
        self._head_bytes = 0
        self._arm(self.head_seconds)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._awaits_head = False
        self._arm(self.message_seconds)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of the body."""
        self._is_counted = False
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole, trailers and all."""
        self._is_counted = False
        self._head_bytes = 0
        self._disarm()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """It has read most of what waited."""
        super().resume_writing()
        self._stop_watching_reader()

    def on_response_complete(self) -> None:
        """The answer is written, though perhaps not read."""
        super().on_response_complete()
        if self.room is not None and not self.pipeline and not self.transport.is_closing():
            self.room.idle(self)
        if self._send_deadline is None and self.transport.get_write_buffer_size():
            self._watch_reader()

    def close_now(self) -> None:
        """Close, whatever is not sent yet."""
        self.transport.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if self.room is not None:
            self.room.busy(self)
        if not self.flow.write_paused:  # else nobody is told of a pause any more
            self._stop_watching_reader()
        super()._start_asgi_task(cycle, _unframed(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    def _watch_reader(self) -> None:
        self._stop_watching_reader()
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._send_deadline = self.loop.call_later(self.send_seconds, self._judge_reader)

    def _stop_watching_reader(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None

    def _judge_reader(self) -> None:
        """Cut a client that took too little; the request that it belongs to sees a closed connection."""
        self._send_deadline = None
        unread = self.transport.get_write_buffer_size()
        if not unread:
            return
        if self._unread_bytes - unread >= SEND_BYTES:
            self._watch_reader()
            return
        request_id = None
        if self._running is not None and (record := RequestRecord.find(self._running.scope)) is not None:
            request_id = record.request_id
            if not self._running.response_complete:
                record.error_code = SLOW_READER
        if self.room is not None:
            self.room.note_cut(SLOW_READER, request_id=request_id, unread_bytes=unread)
        self.close_now()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._expire, seconds)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self, seconds: float) -> None:
        if self.transport.is_closing():
            return
        if self.flow.read_paused:  # the rest may have come: it is this side that does not read
            self._arm(seconds)
            return
        what = "headers" if self._awaits_head else "end"
        if self.room is not None:
            self.room.note_cut("slow_sender")
        self._refuse(HeadTimeout(f"The request's {what} did not arrive within {seconds:g} s."))

    def _refuse(self, error: ClientError) -> None:
        """Answer a head, unless an earlier request of this connection is being answered, and close."""
        # After a whole head the request has its answer, or a route that gives it: a second one would be taken
        # for that to the next request.
        if self._awaits_head and (self._running is None or self._running.response_complete):
            body = msgspec.json.encode(error_body(error))
            head = f"HTTP/1.1 {kind_of(error).status} Refused\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()


def _unframed(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """The application for a client of HTTP/1.0, which knows no chunks: an answer of unknown length ends by closing."""

    async def serve(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        async def send_plain(message: ASGISendEvent) -> None:
            # What uvicorn decides from the headers: whether to send chunks, and how many bytes it still expects.
            cycle.chunked_encoding = False
            if message["type"] == "http.response.body":
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return serve
