"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`."""

from collections.abc import Mapping
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from app.api.admission import BodyRoom
from app.api.aside import aside
from app.api.body import check_headers, read_body
from app.api.chat_prompt import check_kwargs, render, require_template
from app.api.deps import ServerContext
from app.api.openapi import BODY_ERRORS, json_body, json_reply
from app.api.record import RequestRecord
from app.api.respond import JsonResponse
from app.api.schemas.decode import decode_keys, decode_struct
from app.api.schemas.field_rules import UnknownFields
from app.api.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
    conversation_of,
)
from app.api.translate import check_text_size, check_token_ids
from app.text.tokenizer import Tokenizer

Body = TypeVar("Body", bound=msgspec.Struct)

_BYTES_AN_ID = 8
_EXAMPLES = {
    "a_text": {"prompt": "你好", "return_token_strs": True},
    "messages": {"messages": [{"role": "user", "content": "Hi"}]},
}


def routes(context: ServerContext) -> APIRouter:
    """The tokenizer's routes."""
    router = APIRouter(tags=["tokens"])

    @router.post(
        "/tokenize",
        responses=json_reply(TokenizeResponse, BODY_ERRORS),
        openapi_extra=json_body(TokenizeRequest, **_EXAMPLES),
        response_class=Response,
    )
    async def tokenize(request: Request) -> Response:
        """The token ids of a text, or of the prompt that messages make."""
        check_headers(request.scope, context.limits)
        with context.admission.enter(RequestRecord.of(request.scope).share) as room:
            body, fields = await _read(request, context, TokenizeRequest, room=room)
            return await _tokenize(body, fields, context)

    @router.post(
        "/detokenize",
        responses=json_reply(DetokenizeResponse, BODY_ERRORS),
        openapi_extra=json_body(DetokenizeRequest, some_ids={"tokens": [1, 2, 3]}),
        response_class=Response,
    )
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        check_headers(request.scope, context.limits)
        with context.admission.enter(RequestRecord.of(request.scope).share) as room:
            body, _ = await _read(request, context, DetokenizeRequest, room=room)
            return await _detokenize(body, context)

    @router.get("/tokenizer_info", responses=json_reply(TokenizerInfo), response_class=Response)
    async def tokenizer_info() -> Response:
        """The tokenizer's special tokens."""
        return JsonResponse(_info(context.tokenizer))

    return router


async def _read(
    request: Request, context: ServerContext, kind: type[Body], *, room: BodyRoom
) -> tuple[Body, dict[str, msgspec.Raw]]:
    body = await read_body(request.receive, context.limits, room=room)
    fields = await aside(len(body), decode_keys, body)
    return await aside(len(body), decode_struct, body, kind, fields=fields), fields


async def _tokenize(body: TokenizeRequest, fields: Mapping[str, msgspec.Raw], context: ServerContext) -> JsonResponse:
    context.check_model(body.model)
    limits = context.known_limits()
    conversation = conversation_of(body)
    if conversation is None:
        text, adds_special, field = body.prompt or "", body.add_special_tokens is not False, "prompt"
    else:
        kwargs = check_kwargs(body.chat_template_kwargs, require_template(context), unknown=UnknownFields.REFUSE)
        text = await render(conversation, fields["messages"], context, variables=kwargs)
        adds_special, field = bool(body.add_special_tokens), "messages"
    check_text_size([text], context.tokenizer, field=field, max_tokens=limits.max_model_len)
    (token_ids,) = await context.tokenizer.encode([text], adds_special)

    def answer() -> TokenizeResponse:
        spelled = _spell(token_ids, context.tokenizer) if body.return_token_strs else None
        return TokenizeResponse(
            count=len(token_ids), max_model_len=limits.max_model_len, tokens=token_ids, token_strs=spelled
        )

    return await JsonResponse.of(answer, num_bytes=_BYTES_AN_ID * len(token_ids))


async def _detokenize(body: DetokenizeRequest, context: ServerContext) -> JsonResponse:
    context.check_model(body.model)
    vocab_size = context.known_limits().vocab_size

    def answer() -> DetokenizeResponse:
        check_token_ids(body.tokens, field="tokens", vocab_size=vocab_size)
        text = context.tokenizer.decode(body.tokens, False)
        spelled = _spell(body.tokens, context.tokenizer) if body.return_token_strs else UNSET
        return DetokenizeResponse(prompt=text, token_strs=spelled)

    return await JsonResponse.of(answer, num_bytes=_BYTES_AN_ID * len(body.tokens))


def _spell(token_ids: list[int], tokenizer: Tokenizer) -> list[str]:
    # One text for equal ids: a million of their own would be freed in one go, and the lock held for it.
    texts = {token_id: tokenizer.token_text(token_id) for token_id in set(token_ids)}
    return [texts[token_id] for token_id in token_ids]


def _info(tokenizer: Tokenizer) -> TokenizerInfo:
    special = tokenizer.special_tokens
    return TokenizerInfo(
        vocab_size=tokenizer.vocab_size,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        pad_token=special.get("pad_token"),
    )
