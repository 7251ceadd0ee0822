"""The outermost layer of ours: request ids, the log line, the last net for exceptions. Pure ASGI.

It passes `receive` through as it is, so that a closed connection reaches the route at once, and it never
holds a body.
"""

import logging
import re
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import HeadTooLarge
from app.api.front import ARRIVED
from app.api.record import RequestRecord
from app.api.respond import ErrorResponse, is_messages_path
from app.api.tracing import traced
from app.observability.metrics import Metrics
from app.observability.tracing import RequestTracer

_SANE_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
_QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics", "/engine"})
"""Asked every few seconds by machines: logged at debug level."""
_UNMATCHED = "unmatched"
MAX_HEADERS = 128

_requests = logging.getLogger("headwater.request")
_api = logging.getLogger("headwater.api")


class RequestLayer:
    """Wraps the application for each HTTP request."""

    def __init__(
        self, app: ASGIApp, *, routes: Sequence[BaseRoute], metrics: Metrics, tracer: RequestTracer | None = None
    ) -> None:
        """`routes` name a request that no route has seen, since it was refused before."""
        self._app = app
        self._routes = routes
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the request an id and a record, serve it, log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), arrived=scope.get(ARRIVED))
        record.attach(scope)
        id_headers = [(b"x-request-id", record.request_id.encode())]
        if is_messages_path(scope):
            id_headers.append((b"request-id", record.request_id.encode()))  # as Anthropic's clients read it

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message["headers"], *id_headers]}
            await send(message)

        try:
            if len(scope["headers"]) > MAX_HEADERS:
                record.error_code = "headers_too_large"
                error = HeadTooLarge(
                    f"The request has {len(scope['headers'])} headers; at most {MAX_HEADERS} are taken."
                )
                await ErrorResponse(error, scope)(scope, receive, send_with_id)
                return
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _api.exception("A request failed unexpectedly.", extra={"facts": {"request_id": record.request_id}})
            if record.status is None:
                record.error_code = "internal_error"
                await ErrorResponse(error, scope)(scope, receive, send_with_id)
        finally:
            self._account(scope, record)

    def _account(self, scope: Scope, record: RequestRecord) -> None:
        # Only routes of ours become label values and log fields: paths are the client's text.
        seen = scope.get("route") or next(
            (one for one in self._routes if one.matches(scope)[0] is not Match.NONE), None
        )
        route = getattr(seen, "path", _UNMATCHED)
        self._metrics.count_response(handler=route, method=_method(scope), status=record.status)
        client = scope.get("client")
        facts = {
            "client": client[0] if client else None,
            "method": _method(scope),
            "route": route,
            "status": record.status,
        } | record.facts()
        if self._tracer is not None and route not in _QUIET_ROUTES:
            self._tracer.record(traced(scope, record, method=_method(scope), route=route))
        level = logging.DEBUG if route in _QUIET_ROUTES else logging.INFO
        _requests.log(level, "request", extra={"facts": facts})


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_ID.match(given) else secrets.token_hex(16)


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in {"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"} else "other"
