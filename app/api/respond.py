"""Whole answers: JSON bodies encoded by msgspec, and errors."""

import asyncio

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.errors import BodyTimeout, HeadTooLarge, error_body, error_headers, kind_of, messages_error_body
from app.api.record import RequestRecord
from app.core.errors import BodyTooLarge

JSON = "application/json"
_MESSAGES_PATH = "/v1/messages"
_DISCARD_SECONDS = 5.0
_DISCARD_BYTES = 256 * 1024 * 1024


class JsonResponse(Response):
    """A msgspec-encodable value as JSON."""

    media_type = JSON

    def __init__(self, content: object, *, status: int | None = None) -> None:
        super().__init__(msgspec.json.encode(content), status_code=200 if status is None else status)


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
