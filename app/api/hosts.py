"""Which names a server answers to: a page whose name was pointed at this machine must not reach it.

A browser takes a page and the server behind the page's own name for one origin, whatever address that name
has by now (DNS rebinding). A server on loopback without keys therefore answers to loopback's names alone.
"""

import ipaddress
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import HostRefused, kind_of
from app.api.record import RequestRecord
from app.api.respond import ErrorResponse
from app.api.schemas.decode import shown

_NAMES = ("127.0.0.1", "[::1]", "localhost")
_PORT = re.compile(r":[0-9]*$")


def loopback_hosts(host: str) -> tuple[str, ...] | None:
    """Names of a server that listens on `host`; None where that is not loopback."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return _NAMES if host == "localhost" else None
    if not address.is_loopback:
        return None
    own = f"[{address}]" if address.version == 6 else str(address)
    return tuple(dict.fromkeys((*_NAMES, own)))


class HostLayer:
    """Answers 403 to requests for another name. Pure ASGI, inside the layer that makes the record."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: tuple[str, ...]) -> None:
        self._app = app
        self._allowed = frozenset(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or refuse it. One without a Host is no browser's."""
        hosts = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        wrong = next((host for host in hosts if _PORT.sub("", host).lower() not in self._allowed), None)
        if scope["type"] != "http" or wrong is None:
            await self._app(scope, receive, send)
            return
        error = HostRefused(
            f"This server does not answer to the name `{shown(wrong)}`: without keys it takes "
            "127.0.0.1, [::1] and localhost. Use one of these as Host, or start it with --api-key-file."
        )
        RequestRecord.of(scope).error_code = kind_of(error).code
        await ErrorResponse(error, scope)(scope, receive, send)
