"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Response

from app.api.chat_form import ChatEndpoint
from app.api.deps import ServerContext
from app.api.generation_run import GenerationRun
from app.api.openapi import resumable_body, stream_reply
from app.api.schemas.chat import ChatChunk, ChatRequest, ChatResponse

_EXAMPLES = {
    "a_question": {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32},
    "a_stream_with_usage": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "going_on_with_a_message": {
        "messages": [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "An"}],
        "continue_final_message": True,
        "max_tokens": 8,
    },
}


def routes(context: ServerContext) -> APIRouter:
    """The chat route."""
    router = APIRouter(tags=["chat"])
    endpoint = ChatEndpoint()

    @router.post(
        "/v1/chat/completions",
        responses=stream_reply(ChatResponse, ChatChunk),
        openapi_extra=resumable_body(ChatRequest, **_EXAMPLES),
        response_class=Response,
    )
    async def create_chat_completion() -> Response:
        """Answer a conversation. Every field: docs/reference/chat.md."""
        return GenerationRun(context, endpoint)

    return router
