"""The OpenAPI document: bodies are read by msgspec, so their schemas come from msgspec too.

What msgspec cannot know is added here: the tables' accepted values and refusals, the statuses that errors
have, the events of streams. `scripts/describe_api.py` prints the document; docs/openapi.json is held to it.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

import msgspec
from fastapi import FastAPI

from app.api.cursor import LAST_EVENT_ID, MAX_CURSOR_CHARS
from app.api.deadline import MAX_SECONDS
from app.api.errors import BodyTimeout, ErrorBody, MessagesErrorBody, ResumeConflict, Unauthorized, kind_of
from app.api.openapi_rules import add_rules
from app.api.schemas import chat, completions, engine, messages, responses, responses_input, server, tokens
from app.api.schemas import responses_events as events
from app.api.schemas.field_rules import FieldTable, UnknownFields
from app.api.schemas.fields import CHAT, COMPLETIONS, COUNT_TOKENS, MESSAGES, RESPONSES
from app.core.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    InvalidRequest,
    NotFound,
    TooManyRequests,
    UnsupportedMedia,
)

Schema = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]

_TEMPLATE = "#/components/schemas/{name}"
_MESSAGES_EVENTS: tuple[type[msgspec.Struct], ...] = (
    messages.MessageStart,
    messages.Ping,
    messages.ContentBlockStart,
    messages.ContentBlockDelta,
    messages.ContentBlockStop,
    messages.MessageDelta,
    messages.MessageStop,
)
_RESPONSES_EVENTS: tuple[type[msgspec.Struct], ...] = get_args(events.Event)
_TYPES: tuple[type[msgspec.Struct], ...] = (
    ErrorBody,
    chat.ChatRequest,
    chat.ChatResponse,
    chat.ChatChunk,
    completions.CompletionRequest,
    completions.CompletionResponse,
    MessagesErrorBody,
    messages.MessagesRequest,
    messages.MessagesResponse,
    *_MESSAGES_EVENTS,
    messages.CountTokensRequest,
    messages.CountTokensResponse,
    responses.ResponsesRequest,
    responses.ResponseObject,
    responses.DeletedResponse,
    responses_input.InputItemList,
    *_RESPONSES_EVENTS,
    server.ModelEntry,
    server.ModelList,
    server.Readiness,
    server.Liveness,
    server.Version,
    engine.EngineView,
    tokens.TokenizeRequest,
    tokens.TokenizeResponse,
    tokens.DetokenizeRequest,
    tokens.DetokenizeResponse,
    tokens.TokenizerInfo,
)
_TABLES: tuple[tuple[str, FieldTable], ...] = (
    ("ChatRequest", CHAT),
    ("CompletionRequest", COMPLETIONS),
    ("MessagesRequest", MESSAGES),
    ("CountTokensRequest", COUNT_TOKENS),
    ("ResponsesRequest", RESPONSES),
)

BODY_ERRORS: tuple[type[Exception], ...] = (
    InvalidRequest,
    NotFound,
    BodyTimeout,
    BodyTooLarge,
    UnsupportedMedia,
    TooManyRequests,
    EngineUnavailable,
)
"""What a route that reads a body about the model may answer."""
GENERATION_ERRORS: tuple[type[Exception], ...] = (*BODY_ERRORS, EngineFailed, DeadlineExceeded)

OPEN: dict[str, Any] = {"security": []}
"""`openapi_extra` of a route that needs no key."""

_DESCRIPTIONS: Mapping[type[Exception], str] = MappingProxyType(
    {
        InvalidRequest: "The request is wrong; `error.param` names the field.",
        Unauthorized: "No API key, or an unknown one. Only where the server has keys.",
        NotFound: "No such model, or no such stored response.",
        BodyTimeout: "The body did not arrive in time.",
        BodyTooLarge: "The body is too large.",
        UnsupportedMedia: "The body is not JSON, or is compressed.",
        ResumeConflict: "The cursor belongs to another server's model or another request; `error.code` says which.",
        TooManyRequests: "Too much is in flight.",
        DeadlineExceeded: "The time that the client or the operator gave the request is up.",
        EngineFailed: "The server failed this request.",
        EngineUnavailable: "No engine takes requests now: it is starting, failing again and again, or draining.",
    }
)
_PARAMETER_ERROR = "422"
_REQUEST_ID = {"description": "Id of the request in the server's log.", "schema": {"type": "string"}}
_RETRY_AFTER = {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}
_GENERATION_HEADERS: Schema = {
    "Headwater-Seed": {"description": "The seed that repeats the answer.", "schema": {"type": "integer"}},
    "Headwater-Resume": {
        "description": "Whether an answer that outlives its engine goes on with the very same tokens.",
        "schema": {"enum": ["exact", "approximate"]},
    },
    "Headwater-Resumed": {
        "description": "Of a stream that goes on: where the tokens came from that its client had.",
        "schema": {"enum": ["journal", "tokens", "decode"]},
    },
    "Headwater-Ignored": {"description": "Fields without effect.", "schema": {"type": "string"}},
}


_DEADLINE: Schema = {
    "name": "X-Request-Deadline",
    "in": "header",
    "required": False,
    "description": "Seconds from now that the answer may take, whole; then it is ended. No exponent.",
    "schema": {"type": "number", "exclusiveMinimum": -1e10, "maximum": MAX_SECONDS},
}


_LAST_EVENT_ID: Schema = {
    "name": LAST_EVENT_ID,
    "in": "header",
    "description": "The `id` of the last event of a resumable stream, with its request: it goes on behind it.",
    "schema": {"type": "string", "maxLength": MAX_CURSOR_CHARS, "pattern": "^[A-Za-z0-9_-]*$"},
}


def timed_body(kind: type[msgspec.Struct], **examples: object) -> dict[str, Any]:
    """The same as `json_body` for a generating route, which takes a deadline."""
    return {**json_body(kind, **examples), "parameters": [_DEADLINE]}


def resumable_body(kind: type[msgspec.Struct], **examples: object) -> dict[str, Any]:
    """The same for one whose streams can be gone on with."""
    return {**json_body(kind, **examples), "parameters": [_DEADLINE, _LAST_EVENT_ID]}


def json_body(kind: type[msgspec.Struct], **examples: object) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `kind` as JSON."""
    content = _json_of(kind)
    if examples:
        content["application/json"]["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": content}}


def json_reply(
    kind: type[msgspec.Struct] | None,
    errors: Sequence[type[Exception]] = (),
    *,
    is_open: bool = False,
    failure: type[msgspec.Struct] = ErrorBody,
) -> Responses:
    """`responses` of a route that answers `kind` as JSON, or one of the errors as `failure`."""
    replies: Responses = {}
    if kind is not None:
        replies[200] = {"description": "OK", "headers": {"X-Request-Id": _REQUEST_ID}, "content": _json_of(kind)}
    for error in (*errors, *(() if is_open else (Unauthorized,))):
        replies[kind_of(error).status] = error_reply(error, failure)
    return dict(sorted(replies.items()))


def stream_reply(whole: type[msgspec.Struct], chunk: type[msgspec.Struct]) -> Responses:
    """`responses` of a generating route: the whole answer, or a stream of chunks."""
    replies = json_reply(whole, (*GENERATION_ERRORS, ResumeConflict))
    replies[200]["description"] = f"The answer; with `stream: true` as server-sent events of {chunk.__name__}."
    end = "A failure after the first byte is an ErrorBody. The last event is `[DONE]`."
    _add_events(replies, (chunk, ErrorBody), end)
    event = replies[200]["content"]["text/event-stream"]["schema"]
    event["properties"]["id"] = {"type": "string", "description": f"For `{LAST_EVENT_ID}`, in a resumable stream."}
    return replies


def messages_reply() -> Responses:
    """`responses` of `/v1/messages`."""
    replies = json_reply(messages.MessagesResponse, GENERATION_ERRORS, failure=MessagesErrorBody)
    replies[200]["description"] = "The answer; with `stream: true` as Anthropic's server-sent events."
    end = "The name of the event is its type. The last one is message_stop, or an error."
    _add_events(replies, (*_MESSAGES_EVENTS, MessagesErrorBody), end, is_done_told=False)
    return replies


def responses_reply() -> Responses:
    """`responses` of `POST /v1/responses`."""
    replies = json_reply(responses.ResponseObject, GENERATION_ERRORS)
    replies[200]["description"] = "The answer; with `stream: true` as OpenAI's typed server-sent events."
    end = "The name of the event is its type. The last one is response.completed, .incomplete or .failed."
    _add_events(replies, _RESPONSES_EVENTS, end, is_done_told=False)
    return replies


def _add_events(
    replies: Responses, kinds: Sequence[type[msgspec.Struct]], end: str, *, is_done_told: bool = True
) -> None:
    replies[200]["headers"] |= _GENERATION_HEADERS
    data: Schema = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"oneOf": [_ref(kind) for kind in kinds]},
        "description": end,
    }
    if is_done_told:
        data = {"anyOf": [data, {"const": "[DONE]"}]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"], "description": "One event."}
    replies[200]["content"]["text/event-stream"] = {"schema": event}


def status_reply(kind: type[msgspec.Struct]) -> Responses:
    """`responses` of an open route that answers `kind` with 200 or 503."""
    replies = json_reply(kind, is_open=True)
    unavailable = kind_of(EngineUnavailable).status
    replies[unavailable] = {**replies[200], "description": "The same, and the answer is no."}
    return replies


def error_reply(error: type[Exception], failure: type[msgspec.Struct] = ErrorBody) -> dict[str, Any]:
    """The response of one class of errors."""
    headers: dict[str, Any] = {"X-Request-Id": _REQUEST_ID}
    if error in (TooManyRequests, EngineUnavailable):
        headers["Retry-After"] = _RETRY_AFTER
    if error is Unauthorized:
        headers["WWW-Authenticate"] = {"schema": {"enum": ["Bearer"]}}
    return {"description": _DESCRIPTIONS[error], "headers": headers, "content": _json_of(failure)}


def add_schemas(app: FastAPI, *, unknown: UnknownFields | None = None) -> None:
    """Complete the application's OpenAPI document. `unknown`: what the operator decided about unknown fields."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        if "ErrorBody" in document.get("components", {}).get("schemas", {}):
            return document  # FastAPI keeps the document that it made
        _, schemas = msgspec.json.schema_components(_TYPES, ref_template=_TEMPLATE)
        for name, table in _TABLES:
            _add_table(schemas[name], table, table.unknown if unknown is None else unknown)
        add_rules(schemas)
        document["components"] = {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        }
        # Any of these; the empty one because a server may have no keys.
        document["security"] = [{}, {"bearer": []}, {"x-api-key": []}]
        _drop_foreign_answers(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _add_table(schema: Schema, table: FieldTable, unknown: UnknownFields) -> None:
    properties = schema["properties"]
    for one in table.honoured:
        properties[one.name]["description"] = f"{one.meaning} Default: {one.default}. Values: {one.range}."
    for harmless in table.harmless:
        accepted = {"description": f"No effect: {harmless.meaning} Accepted: {harmless.accepted}."}
        properties[harmless.name] = harmless.values.schema | accepted
    for refused in table.refused:
        properties[refused.name] = {"type": "null", "description": f"Not served: {refused.instead}."}
    if unknown is UnknownFields.REFUSE:
        schema["additionalProperties"] = False


def _drop_foreign_answers(document: dict[str, Any]) -> None:
    """FastAPI promises an answer of its own for parameters, and an empty 200 where we promise none."""
    for operations in document["paths"].values():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop(_PARAMETER_ERROR, None)
            if "content" not in responses.get("200", {"content": None}):
                del responses["200"]


def _ref(kind: type[msgspec.Struct]) -> Schema:
    return {"$ref": _TEMPLATE.format(name=kind.__name__)}


def _json_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(kind)}}
