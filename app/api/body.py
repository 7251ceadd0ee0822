"""Reading a request's body: type, size and time are checked before and while it arrives.

Invariant: never more than the limit is held in memory, whatever the headers claim.
"""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from app.api.deps import ApiLimits
from app.api.errors import BodyTimeout
from app.core.errors import BodyTooLarge, InvalidRequest, UnsupportedMedia


class ClientDisconnected(Exception):
    """The client closed the connection; nobody is left to answer."""


def check_headers(scope: Scope, limits: ApiLimits) -> int:
    """Most bytes that the body can have, from the headers alone. Raises what reading it would raise."""
    headers = Headers(scope=scope)
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMedia(
            f"The content type must be application/json, got `{media_type[:64]}`. "
            "Send the header `Content-Type: application/json`."
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("Compressed bodies are not taken: send it without Content-Encoding.")
    length = headers.get("content-length")
    if length is None:
        return limits.max_body_size
    if not length.isdecimal():
        raise InvalidRequest("The header Content-Length is not a number.")
    if len(length) > 18 or int(length) > limits.max_body_size:
        raise _too_large(limits)
    return int(length)


async def read_body(receive: Receive, limits: ApiLimits) -> bytes:
    """The whole body. Raises BodyTooLarge, BodyTimeout or ClientDisconnected."""
    try:
        async with asyncio.timeout(limits.body_timeout):
            return await _read(receive, limits)
    except TimeoutError:
        raise BodyTimeout(f"The body did not arrive within {limits.body_timeout:g} s.") from None


async def _read(receive: Receive, limits: ApiLimits) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limits.max_body_size:
            raise _too_large(limits)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(limits: ApiLimits) -> BodyTooLarge:
    return BodyTooLarge(f"The body exceeds {limits.max_body_size} bytes, the limit of this server.")
