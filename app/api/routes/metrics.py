"""`/metrics`: on the server's own address, or on one of its own."""

from fastapi import APIRouter, Request, Response

from app.api.deps import ServerContext
from app.api.openapi import json_reply

_METRICS = {
    200: {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **json_reply(None),
}


def routes(context: ServerContext) -> APIRouter:
    """The route that Prometheus reads."""
    router = APIRouter(tags=["server"])

    @router.get("/metrics", responses=_METRICS, response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus exposition."""
        body, content_type = context.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return router
