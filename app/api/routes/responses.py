"""`POST /v1/responses`, and what can be done with those that are stored: read, list their input, forget."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from app.api.aside import aside
from app.api.deps import ServerContext
from app.api.generation_run import GenerationRun
from app.api.openapi import json_reply, responses_reply, timed_body
from app.api.record import RequestRecord
from app.api.respond import JSON, JsonResponse
from app.api.responses_form import ResponsesEndpoint
from app.api.responses_input import list_items
from app.api.responses_store import ResponseStore, StoredResponse
from app.api.schemas.decode import shown
from app.api.schemas.responses import DeletedResponse, ResponseObject, ResponsesRequest
from app.api.schemas.responses_input import MAX_LISTED, InputItemList
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
        found = _find(store, request, response_id)
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

    @router.get(
        "/v1/responses/{response_id}/input_items",
        responses=json_reply(InputItemList, (InvalidRequest, NotFound)),
        response_class=Response,
    )
    async def list_input_items(
        request: Request,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        """What the request of a stored response sent as `input`, the last item first; of earlier turns nothing."""
        found = _find(store, request, response_id)
        size = len(found.input)
        return JsonResponse(
            await aside(size, list_items, response_id, found.input, order=order, limit=limit, after=after)
        )

    @router.post(
        "/v1/responses/{response_id}/cancel",
        responses=json_reply(None, (InvalidRequest, NotFound)),
        response_class=Response,
    )
    async def cancel_response(request: Request, response_id: str) -> Response:
        """Refused: a response that can be found by its id has ended. To end one that runs, close its connection."""
        _find(store, request, response_id)
        raise InvalidRequest(
            "Only a response made with `background: true` can be cancelled, and this server makes none: this one has "
            "ended. One that runs ends when its client closes the connection.",
            param="response_id",
            code="response_not_cancellable",
        )

    return router


def _find(store: ResponseStore, request: Request, response_id: str) -> StoredResponse:
    found = store.find(RequestRecord.of(request.scope).tenant, response_id)
    if found is None:
        raise _not_found(response_id)
    return found


def _not_found(response_id: str) -> NotFound:
    return NotFound(
        f"No response with id `{shown(response_id)}` is stored: it never was, was deleted, made room for others, or "
        "is from before the server's start.",
        param="response_id",
        code="response_not_found",
    )
