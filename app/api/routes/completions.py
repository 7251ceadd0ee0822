"""`POST /v1/completions`."""

from fastapi import APIRouter, Response

from app.api.completion_form import CompletionEndpoint
from app.api.deps import ServerContext
from app.api.generation_run import GenerationRun
from app.api.openapi import resumable_body, stream_reply
from app.api.schemas.completions import CompletionRequest, CompletionResponse

_EXAMPLES = {
    "a_text": {"prompt": "The sea is", "max_tokens": 32, "temperature": 0.2},
    "token_ids_scored_without_output": {"prompt": [1, 2, 3], "max_tokens": 0, "echo": True, "logprobs": 1},
}


def routes(context: ServerContext) -> APIRouter:
    """The completion route."""
    router = APIRouter(tags=["completions"])
    endpoint = CompletionEndpoint()

    @router.post(
        "/v1/completions",
        responses=stream_reply(CompletionResponse, CompletionResponse),
        openapi_extra=resumable_body(CompletionRequest, **_EXAMPLES),
        response_class=Response,
    )
    async def create_completion() -> Response:
        """Go on from a prompt. Every field: docs/reference/completions.md."""
        return GenerationRun(context, endpoint)

    return router
