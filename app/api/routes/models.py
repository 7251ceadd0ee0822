"""`GET /v1/models` and `/v1/models/{id}`."""

from fastapi import APIRouter, Response

from app.api.deps import ServerContext
from app.api.openapi import json_reply
from app.api.respond import JsonResponse
from app.api.schemas.server import ModelEntry, ModelList
from app.core.errors import EngineUnavailable, NotFound


def routes(context: ServerContext) -> APIRouter:
    """The model routes. 503 until the first engine is ready: its limits are part of the answer."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", responses=json_reply(ModelList, (EngineUnavailable,)), response_class=Response)
    async def list_models() -> Response:
        """All names under which the model is served."""
        return JsonResponse(ModelList(data=[_entry(name, context) for name in context.model_names]))

    # A name may hold slashes: hub repositories do.
    @router.get(
        "/v1/models/{model:path}",
        responses=json_reply(ModelEntry, (NotFound, EngineUnavailable)),
        response_class=Response,
    )
    async def get_model(model: str) -> Response:
        """One of them."""
        context.check_model(model)
        return JsonResponse(_entry(model, context))

    return router


def _entry(name: str, context: ServerContext) -> ModelEntry:
    limits = context.known_limits()
    return ModelEntry(
        id=name,
        created=context.created,
        root=context.model_names[0],
        max_model_len=limits.max_model_len,
        fingerprint=limits.fingerprint,
        tier=limits.tier,
        device=limits.device,
        dtype=limits.dtype,
        row_independent=limits.row_independent,
    )
