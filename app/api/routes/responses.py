"""`POST /v1/responses`, and `GET` and `DELETE /v1/responses/{id}` of those that are stored."""

from fastapi import APIRouter, Request, Response

from app.api.deps import ServerContext
from app.api.generation_run import GenerationRun
from app.api.openapi import json_reply, responses_reply, timed_body
from app.api.record import RequestRecord
from app.api.respond import JSON, JsonResponse
from app.api.responses_form import ResponsesEndpoint
from app.api.schemas.decode import shown
from app.api.schemas.responses import DeletedResponse, ResponseObject, ResponsesRequest
from app.core.errors import InvalidRequest, NotFound

_EXAMPLES = {
    "a_question": {"input": "What is the capital of France?", "max_output_tokens": 32},
    "a_stream": {
        "instructions": "Be brief.",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "max_output_tokens": 32,
        "stream": True,
        "store": False,
    },
}


def routes(context: ServerContext) -> APIRouter:
    """The routes of the Responses API."""
    router = APIRouter(tags=["responses"])
    endpoint = ResponsesEndpoint()
    store = context.responses

    @router.post(
        "/v1/responses",
        responses=responses_reply(),
        openapi_extra=timed_body(ResponsesRequest, **_EXAMPLES),
        response_class=Response,
    )
    async def create_response() -> Response:
        """Answer a text, items or a stored conversation. Every field: docs/reference/responses.md."""
        return GenerationRun(context, endpoint)

    @router.get(
        "/v1/responses/{response_id}",
        responses=json_reply(ResponseObject, (InvalidRequest, NotFound)),
        response_class=Response,
    )
    async def get_response(request: Request, response_id: str, stream: bool = False) -> Response:
        """A stored response."""
        found = store.find(RequestRecord.of(request.scope).tenant, response_id)
        if found is None:
            raise _not_found(response_id)
        if stream:
            raise InvalidRequest("`stream` is not served here: a stored response is whole.", param="stream")
        return Response(found.body, media_type=JSON)

    @router.delete(
        "/v1/responses/{response_id}", responses=json_reply(DeletedResponse, (NotFound,)), response_class=Response
    )
    async def delete_response(request: Request, response_id: str) -> Response:
        """Forget a stored response. What was gone on from it stays."""
        if not store.remove(RequestRecord.of(request.scope).tenant, response_id):
            raise _not_found(response_id)
        return JsonResponse(DeletedResponse(id=response_id))

    return router


def _not_found(response_id: str) -> NotFound:
    return NotFound(
        f"No response with id `{shown(response_id)}` is stored: it never was, was deleted, made room for others, or "
        "is from before the server's start.",
        param="response_id",
        code="response_not_found",
    )
