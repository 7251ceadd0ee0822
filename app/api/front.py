"""What an address answers with: one application, and after a reload another one, without a request lost between them.

Each request is served to its end by the application that it came to. Posts can be held back for a while, unread;
then they go to whatever application is there, and their time counts from when they came.
"""

import asyncio
import time
from collections import Counter

from starlette.types import ASGIApp, Receive, Scope, Send

ARRIVED = "headwater.arrived"
"""In a request's scope: when it came, of the monotonic clock, where it was held back since."""
_HELD_METHOD = "POST"
"""What makes an engine work. Probes and lists are answered meanwhile."""


class Front:
    """An ASGI application that is another one, which may change. Belongs to the event loop's thread."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        """Who gets the next request."""
        self._open = asyncio.Event()
        self._open.set()
        self._in_flight: Counter[ASGIApp] = Counter()
        self._ended = asyncio.Event()
        """Set when a post ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != _HELD_METHOD:
            await self.app(scope, receive, send)
            return
        if not self._open.is_set():
            scope[ARRIVED] = time.monotonic()
            await self._open.wait()
        app = self.app
        self._in_flight[app] += 1
        try:
            await app(scope, receive, send)
        finally:
            self._in_flight[app] -= 1
            if not self._in_flight[app]:
                del self._in_flight[app]  # one that is no more in use must not be held
            self._ended.set()

    def hold(self) -> None:
        """Let posts wait until `release`."""
        self._open.clear()

    def release(self) -> None:
        """Let them go on. Harmless where none wait."""
        self._open.set()

    async def wait_empty(self, app: ASGIApp) -> None:
        """Wait until this application has answered every post that it got."""
        while app in self._in_flight:
            self._ended.clear()
            await self._ended.wait()
