"""`POST /v1/messages` and `/v1/messages/count_tokens`."""

from fastapi import APIRouter, Request, Response

from app.api.aside import aside
from app.api.body import check_headers, read_body
from app.api.deps import ServerContext
from app.api.errors import MessagesErrorBody
from app.api.generation_run import GenerationRun
from app.api.messages_form import MessagesEndpoint
from app.api.messages_prompt import render_conversation
from app.api.openapi import BODY_ERRORS, json_body, json_reply, messages_reply, timed_body
from app.api.record import RequestRecord
from app.api.respond import JsonResponse
from app.api.schemas.decode import decode_keys, decode_struct
from app.api.schemas.field_rules import ignored_header
from app.api.schemas.fields import COUNT_TOKENS
from app.api.schemas.messages import CountTokensRequest, CountTokensResponse, MessagesRequest
from app.api.translate import check_text_size

_QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
_EXAMPLES = {
    "a_question": {**_QUESTION, "max_tokens": 32},
    "a_stream": {**_QUESTION, "system": "Be brief.", "max_tokens": 32, "stop_sequences": ["\n\n"], "stream": True},
}


def routes(context: ServerContext) -> APIRouter:
    """The routes of Anthropic's API."""
    router = APIRouter(tags=["messages"])
    endpoint = MessagesEndpoint()

    @router.post(
        "/v1/messages",
        responses=messages_reply(),
        openapi_extra=timed_body(MessagesRequest, **_EXAMPLES),
        response_class=Response,
    )
    async def create_message() -> Response:
        """Answer a conversation in Anthropic's form. Every field: docs/reference/messages.md."""
        return GenerationRun(context, endpoint)

    @router.post(
        "/v1/messages/count_tokens",
        responses=json_reply(CountTokensResponse, BODY_ERRORS, failure=MessagesErrorBody),
        openapi_extra=json_body(CountTokensRequest, a_question=_QUESTION),
        response_class=Response,
    )
    async def count_message_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a conversation has."""
        check_headers(request.scope, context.limits)
        with context.admission.enter(RequestRecord.of(request.scope).share) as room:
            return await _count(await read_body(request.receive, context.limits, room=room), context)

    return router


async def _count(body: bytes, context: ServerContext) -> Response:
    fields = await aside(len(body), decode_keys, body)
    unknown = COUNT_TOKENS.unknown if context.limits.unknown_fields is None else context.limits.unknown_fields
    ignored = COUNT_TOKENS.sort(fields, unknown=unknown)
    counted = await aside(len(body), decode_struct, body, CountTokensRequest, fields=fields)
    context.check_model(counted.model)
    limits = context.known_limits()
    prompt = await render_conversation(counted, context, num_tool_bytes=len(bytes(fields.get("tools", b""))))
    check_text_size([prompt.text], context.tokenizer, field="messages", max_tokens=limits.max_model_len)
    (token_ids,) = await context.tokenizer.encode([prompt.text], False)
    response = JsonResponse(CountTokensResponse(input_tokens=len(token_ids)))
    if ignored:
        response.raw_headers.append((b"headwater-ignored", ignored_header(ignored)))
    return response
