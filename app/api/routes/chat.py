"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Response

from app.api.chat_form import ChatEndpoint
from app.api.deps import ServerContext
from app.api.generation import GenerationRun
from app.api.openapi import json_body, json_reply
from app.api.schemas.chat import ChatRequest, ChatResponse


def routes(context: ServerContext) -> APIRouter:
    """The chat route."""
    router = APIRouter(tags=["chat"])
    endpoint = ChatEndpoint()

    @router.post(
        "/v1/chat/completions",
        responses=json_reply(ChatResponse),
        openapi_extra=json_body(ChatRequest),
        response_class=Response,
    )
    async def create_chat_completion() -> Response:
        """Answer a conversation. Every field: docs/reference/chat.md."""
        return GenerationRun(context, endpoint)

    return router
