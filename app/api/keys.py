"""Asking for API keys: which routes need one, and the answer to a request without.

Invariant: without a valid key nothing behind the layer runs.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import Unauthorized, kind_of
from app.api.key_ring import KeyRing
from app.api.record import RequestRecord
from app.api.respond import ErrorResponse

_OPEN_PATHS = frozenset({"/health", "/ready", "/"})
_OPEN_PREFIX = "/page/"
_METRICS_PATH = "/metrics"


class KeyLayer:
    """Asks for a key on every route but the open ones. Pure ASGI, inside the layer that makes the record."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None, metrics_keys: KeyRing | None) -> None:
        self._app = app
        self._keys = keys
        self._metrics_keys = metrics_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        rings = [ring for ring in self._rings(path) if ring is not None]
        record = RequestRecord.of(scope)
        if rings:
            presented = _presented(Headers(scope=scope))
            key = next((key for ring in rings for one in presented if (key := ring.find(one)) is not None), None)
            if key is None:
                error = Unauthorized(_explain(presented), code=None if presented else "missing_api_key")
                record.error_code = error.code or kind_of(error).code
                await ErrorResponse(error, scope)(scope, receive, send)
                return
            record.key_id, record.key_name, record.share = key.id, key.name, key.share
        await self._app(scope, receive, send)

    def _rings(self, path: str) -> tuple[KeyRing | None, ...]:
        """Any key of these rings opens the path; none are needed where there are none."""
        if path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX):
            return ()
        return (self._keys, self._metrics_keys) if path == _METRICS_PATH else (self._keys,)


def _presented(headers: Headers) -> list[str]:
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = [bearer.strip()] if scheme.lower() == "bearer" else []
    given.append(headers.get("x-api-key", ""))
    return [one for one in given if one]


def _explain(presented: Sequence[str]) -> str:
    if presented:
        return "The API key is not one of this server's."
    return "This server needs an API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`."
