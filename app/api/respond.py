"""Whole answers: JSON bodies encoded by msgspec, and errors."""

import asyncio
from collections.abc import Callable
from typing import Self

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.aside import aside
from app.api.errors import BodyTimeout, HeadTooLarge, error_body, error_headers, kind_of, messages_error_body
from app.api.record import RequestRecord
from app.core.errors import BodyTooLarge

JSON = "application/json"
_MESSAGES_PATH = "/v1/messages"
_DISCARD_SECONDS = 5.0
_DISCARD_BYTES = 256 * 1024 * 1024
_PIECE_BYTES = 256 * 1024
"""Of an answer, written at once: the client may read slowly, and others are served in between."""


class JsonResponse(Response):
    """A msgspec-encodable value as JSON."""

    media_type = JSON

    def __init__(self, content: object, *, status: int | None = None) -> None:
        body = content if isinstance(content, bytes) else msgspec.json.encode(content)
        super().__init__(body, status_code=200 if status is None else status)

    @classmethod
    async def of(cls, make: Callable[[], object], *, num_bytes: int) -> Self:
        """With the value that `make` returns, made and encoded aside where it has about so many bytes."""
        return cls(await aside(num_bytes, lambda: msgspec.json.encode(make())))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, a large one in pieces."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_body(send, bytes(self.body))


class ErrorResponse(Response):
    """An exception with its status, as an OpenAI error body, or an Anthropic one on the routes of that API."""

    media_type = JSON

    def __init__(self, error: Exception, scope: Scope) -> None:
        body = (
            messages_error_body(error, RequestRecord.of(scope).request_id)
            if is_messages_path(scope)
            else error_body(error)
        )
        super().__init__(msgspec.json.encode(body), status_code=kind_of(error).status)
        self.raw_headers += error_headers(error)
        self._leaves_body = isinstance(error, BodyTooLarge | BodyTimeout | HeadTooLarge)
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


async def send_body(send: Send, body: bytes) -> None:
    """A whole body behind the head of a response."""
    for start in range(0, len(body) - _PIECE_BYTES, _PIECE_BYTES):
        piece = body[start : start + _PIECE_BYTES]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0)
    rest = body[(len(body) - 1) // _PIECE_BYTES * _PIECE_BYTES :] if len(body) > _PIECE_BYTES else body
    await send({"type": "http.response.body", "body": rest})


def is_messages_path(scope: Scope) -> bool:
    """Whether the request is for a route of Anthropic's API."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == _MESSAGES_PATH or path.startswith(f"{_MESSAGES_PATH}/")


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
