"""`POST /v1/completions`."""

from fastapi import APIRouter, Response

from app.api.completion_form import CompletionEndpoint
from app.api.deps import ServerContext
from app.api.generation import GenerationRun
from app.api.openapi import json_body, json_reply
from app.api.schemas.completions import CompletionRequest, CompletionResponse


def routes(context: ServerContext) -> APIRouter:
    """The completion route."""
    router = APIRouter(tags=["completions"])
    endpoint = CompletionEndpoint()

    @router.post(
        "/v1/completions",
        responses=json_reply(CompletionResponse),
        openapi_extra=json_body(CompletionRequest),
        response_class=Response,
    )
    async def create_completion() -> Response:
        """Go on from a prompt. Every field: docs/reference/completions.md."""
        return GenerationRun(context, endpoint)

    return router
