"""Whole answers: JSON bodies encoded by msgspec, and errors."""

import asyncio

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.errors import BodyTimeout, error_body, error_headers, kind_of
from app.core.errors import BodyTooLarge

JSON = "application/json"
_DISCARD_SECONDS = 5.0
_DISCARD_BYTES = 256 * 1024 * 1024


class JsonResponse(Response):
    """A msgspec-encodable value as JSON."""

    media_type = JSON

    def __init__(self, content: object, *, status: int | None = None) -> None:
        super().__init__(msgspec.json.encode(content), status_code=200 if status is None else status)


class ErrorResponse(Response):
    """An exception as an OpenAI error body with its status."""

    media_type = JSON

    def __init__(self, error: Exception) -> None:
        super().__init__(msgspec.json.encode(error_body(error)), status_code=kind_of(error).status)
        self.raw_headers += error_headers(error)
        self._leaves_body = isinstance(error, BodyTooLarge | BodyTimeout)
        if self._leaves_body:
            self.raw_headers.append((b"connection", b"close"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. Where the client still sends a body, discard that first bytes-for-bytes for a while.

        Closing a connection with unread data resets it, and the client would see the reset, not the answer.
        """
        if not self._leaves_body:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        if not any(name == b"expect" for name, _ in scope["headers"]):
            await _discard(receive)
        await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    size = 0
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while size < _DISCARD_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                size += len(message.get("body", b""))
    except TimeoutError:
        return
