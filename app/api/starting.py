"""What answers before there is a model to serve.

`/health` says that the process lives, `/ready` what it is at; everything else is a 503 with Retry-After. No key is
asked for: nothing is told that `/ready` does not tell.
"""

from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from app.api.errors import error_headers, kind_of
from app.api.record import RequestRecord
from app.api.respond import ErrorResponse, JsonResponse
from app.api.schemas.server import Liveness, Readiness
from app.client.engine_client import EngineState
from app.core.errors import EngineUnavailable

RETRY_AFTER = 5


class StartingApp:
    """An ASGI application that says what the start is at."""

    def __init__(self, detail: Callable[[], str], *, root_path: str = "") -> None:
        """`detail`: what the start is at."""
        self._detail = detail
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(self._root_path)
        if path == "/health":
            await JsonResponse(Liveness(status="ok"))(scope, receive, send)
            return
        error = EngineUnavailable(f"The server is starting: {self._detail()}.", retry_after=RETRY_AFTER)
        if path != "/ready":
            RequestRecord("starting").attach(scope)
            await ErrorResponse(error, scope)(scope, receive, send)
            return
        content = Readiness(state=EngineState.STARTING.value, generation=0, detail=self._detail(), row_independent=None)
        response = JsonResponse(content, status=kind_of(error).status)
        response.raw_headers += error_headers(error)
        await response(scope, receive, send)
