"""Which of a connection's timers runs, with a client that reads nothing of what does not fit its socket."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from uvicorn import Config
from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.server import ServerState

from app.api.protocol import BoundedHttpProtocol

SOCKET_BYTES = 4096
SOME = 40_000
"""More than the socket takes, and less than pauses the writer."""
MUCH = 200_000


class Watching(BoundedHttpProtocol):
    """Notes the timers that its readers are judged by. None of them comes to its end."""

    send_seconds = 1000.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timers: list[asyncio.TimerHandle] = []

    def _watch_reader(self) -> None:
        super()._watch_reader()
        assert self._send_deadline is not None
        self.timers.append(self._send_deadline)

    @property
    def num_running(self) -> int:
        return sum(not timer.cancelled() for timer in self.timers)


@dataclass
class Connection:
    """Of a client that asks for answers of a size and reads none."""

    client: socket.socket
    protocol: Watching
    begun: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    written: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    def ask(self, size: int) -> None:
        self.client.sendall(f"GET /{size} HTTP/1.1\r\nhost: x\r\n\r\n".encode())


@asynccontextmanager
async def connection() -> AsyncIterator[Connection]:
    async def app(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        assert scope["type"] == "http"
        size = int(scope["path"][1:])
        line.begun.put_nowait(size)
        headers = [(b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": False})
        await send({"type": "http.response.body", "body": bytes(size), "more_body": False})
        line.written.put_nowait(size)

    config = Config(app, http=Watching, log_config=None, lifespan="off")
    config.load()
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    far.settimeout(10)
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(
        lambda: Watching(config=config, server_state=ServerState(), app_state={}, _loop=loop), sock=near
    )
    line = Connection(far, protocol)
    try:
        async with asyncio.timeout(10):
            yield line
    finally:
        transport.abort()
        far.close()


async def test_the_timer_of_an_answer_ends_where_the_next_one_begins() -> None:
    async with connection() as line:
        line.ask(SOME)
        await line.written.get()
        assert line.protocol.num_running == 1
        line.ask(MUCH)
        await line.written.get()
        assert len(line.protocol.timers) == 2
        assert line.protocol.num_running == 1


async def test_a_reader_that_the_writer_waits_for_is_watched_on_while_it_asks_for_more() -> None:
    async with connection() as line:
        line.ask(MUCH)
        await line.written.get()
        line.ask(SOME)
        while await line.begun.get() != SOME:
            pass
        assert line.protocol.num_running == 1
