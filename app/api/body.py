"""Reading a request's body: type, size and time are checked before and while it arrives.

Invariant: never more than the limit is held in memory, whatever the headers claim.
"""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from app.api.admission import BodyRoom
from app.api.deps import ApiLimits
from app.api.errors import BodyTimeout
from app.core.errors import BodyTooLarge, InvalidRequest, UnsupportedMedia


class ClientDisconnected(Exception):
    """The client closed the connection; nobody is left to answer."""


STALL_SECONDS = 10.0
"""Most time between two parts of a body."""


def check_headers(scope: Scope, limits: ApiLimits) -> None:
    """Raise, from the headers alone, what reading the body would raise."""
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
        return
    if not length.isdecimal():
        raise InvalidRequest("The header Content-Length is not a number.")
    if len(length) > 18 or int(length) > limits.max_body_size:
        raise _too_large(limits)


async def read_body(receive: Receive, limits: ApiLimits, *, room: BodyRoom) -> bytes:
    """The whole body, held in `room`. Raises BodyTooLarge, BodyTimeout, TooManyRequests or ClientDisconnected."""
    deadline = asyncio.get_running_loop().time() + limits.body_timeout
    try:
        async with asyncio.timeout_at(deadline) as patience:
            return await _read(receive, limits, room=room, patience=patience, deadline=deadline)
    except TimeoutError:
        raise BodyTimeout(
            f"The body did not arrive within {limits.body_timeout:g} s, or stood still for {STALL_SECONDS:g} s."
        ) from None


async def _read(
    receive: Receive, limits: ApiLimits, *, room: BodyRoom, patience: asyncio.Timeout, deadline: float
) -> bytes:
    body = bytearray()  # parts may be as small as a byte, and as many
    now = asyncio.get_running_loop().time
    while True:
        patience.reschedule(min(deadline, now() + STALL_SECONDS))
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        chunk: bytes = message.get("body", b"")
        if len(body) + len(chunk) > limits.max_body_size:
            raise _too_large(limits)
        room.take(len(chunk))
        body += chunk
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(limits: ApiLimits) -> BodyTooLarge:
    return BodyTooLarge(f"The body exceeds {limits.max_body_size} bytes, the limit of this server.")
