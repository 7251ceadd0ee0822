"""One response as server-sent events, with headers held back until there is something to say.

Until the first event an error can still be a real HTTP status. If nothing is sent for
`keep_alive_interval` seconds, the headers go out with a comment, and a comment goes out again after
each further interval: proxies and clients see that the server lives, also while an engine is replaced.

Invariants: start before body; events never interleave; after `close` nothing is sent.
"""

import asyncio
import time

from starlette.types import Send

DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"


class EventStream:
    """Writes events to one ASGI `send`. Several tasks may send; `close` must be called."""

    def __init__(self, send: Send, *, headers: list[tuple[bytes, bytes]], keep_alive_interval: float) -> None:
        self._send = send
        self._headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # Reverse proxies that buffer by default (nginx) are told not to.
            (b"x-accel-buffering", b"no"),
            *headers,
        ]
        self._interval = keep_alive_interval
        self._lock = asyncio.Lock()
        self._sent_at = time.monotonic()
        self._is_closed = False
        self.is_started = False
        """Whether the headers are out: from then on an error is an event."""
        self._keeper = asyncio.create_task(self._keep_alive())

    async def send(self, event: bytes) -> None:
        """Send one or more whole events; waits while the client reads more slowly than we write."""
        async with self._lock:
            await self._write(event)

    async def end(self, event: bytes) -> None:
        """Send the last events and end the response."""
        async with self._lock:
            await self._write(event)
            self._is_closed = True
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def close(self) -> None:
        """Stop the comments; the response ends where it stands."""
        self._is_closed = True
        self._keeper.cancel()
        await asyncio.wait((self._keeper,))

    async def _write(self, data: bytes) -> None:
        if self._is_closed:
            return
        if not self.is_started:
            self.is_started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._sent_at = time.monotonic()

    async def _keep_alive(self) -> None:
        while True:
            left = self._sent_at + self._interval - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
            elif self._lock.locked():
                # A write waits for a slow reader: the connection is anything but idle.
                await asyncio.sleep(self._interval)
            else:
                await self.send(_COMMENT)
