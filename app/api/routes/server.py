"""`/health`, `/ready`, `/version`: for probes and operators."""

from fastapi import APIRouter, Response

from app.api.deps import ServerContext
from app.api.errors import error_headers, kind_of
from app.api.openapi import OPEN, json_reply, status_reply
from app.api.respond import JsonResponse
from app.api.schemas.server import Liveness, Readiness, Version
from app.client.engine_client import EngineState
from app.core.errors import EngineUnavailable


def routes(context: ServerContext) -> APIRouter:
    """The operators' routes."""
    router = APIRouter(tags=["server"])

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=status_reply(Liveness), openapi_extra=OPEN, response_class=Response)
    async def health() -> Response:
        """200 while the process is sane; 503 when its engine cannot come back and only a restart helps."""
        if context.engine.status.state is EngineState.FAILED:
            return JsonResponse(Liveness(status="failed"), status=kind_of(EngineUnavailable).status)
        return JsonResponse(Liveness(status="ok"))

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", responses=status_reply(Readiness), openapi_extra=OPEN, response_class=Response)
    async def ready() -> Response:
        """200 while requests are taken; 503 with the state while starting, stalled, restarting or draining."""
        status, limits = context.engine.status, context.engine.limits
        is_ready = status.state is EngineState.READY and limits is not None and not status.is_stalled
        is_stalled = status.state is EngineState.READY and status.is_stalled
        content = Readiness(
            state="stalled" if is_stalled else status.state.value,
            generation=status.generation,
            detail=status.detail,
            row_independent=None if limits is None else limits.row_independent,
            engine_pid=status.engine_pid,
            last_step_age=None if status.last_step_age is None else round(status.last_step_age, 3),
            fingerprint=None if limits is None else limits.fingerprint,
        )
        if is_ready:
            return JsonResponse(content)
        response = JsonResponse(content, status=kind_of(EngineUnavailable).status)
        response.raw_headers += error_headers(EngineUnavailable(status.detail))
        return response

    @router.get("/version", responses=json_reply(Version), response_class=Response)
    async def version() -> Response:
        """The server's version."""
        return JsonResponse(Version(version=context.version))

    return router
