"""`POST /v1/embeddings`: refused in words. Vectors that look right and are not help nobody."""

from typing import Any

from fastapi import APIRouter, Request, Response

from app.api.aside import aside
from app.api.body import check_headers, read_body
from app.api.deps import ServerContext
from app.api.openapi import BODY_ERRORS, json_reply
from app.api.record import RequestRecord
from app.api.schemas.decode import decode_keys
from app.core.errors import EngineUnavailable, InvalidRequest, NotFound

_ANY: dict[str, Any] = {"type": "object", "description": "Whatever an embedding model takes."}


def routes(context: ServerContext) -> APIRouter:
    """The route that says why there is none."""
    router = APIRouter(tags=["embeddings"])

    @router.post(
        "/v1/embeddings",
        responses=json_reply(None, [error for error in BODY_ERRORS if error not in (NotFound, EngineUnavailable)]),
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _ANY}}}},
        response_class=Response,
    )
    async def create_embedding(request: Request) -> Response:
        """Always refused: the served model writes text and is no embedding model."""
        check_headers(request.scope, context.limits)
        with context.admission.enter(RequestRecord.of(request.scope).share) as room:
            body = await read_body(request.receive, context.limits, room=room)
            await aside(len(body), decode_keys, body)
        raise InvalidRequest(
            f"The served model {context.model_names[0]} writes text; it is no embedding model. "
            "Send this request to a server of one.",
            param="model",
            code="not_an_embedding_model",
        )

    return router
