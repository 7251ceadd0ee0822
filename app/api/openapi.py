"""The OpenAPI document: bodies are read by msgspec, so their schemas come from msgspec too."""

from typing import Any

import msgspec
from fastapi import FastAPI

from app.api.errors import ErrorBody
from app.api.schemas import chat, completions, engine, server, tokens

_TEMPLATE = "#/components/schemas/{name}"
_TYPES: tuple[type[msgspec.Struct], ...] = (
    ErrorBody,
    chat.ChatRequest,
    chat.ChatResponse,
    chat.ChatChunk,
    completions.CompletionRequest,
    completions.CompletionResponse,
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


def json_body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `kind` as JSON."""
    return {"requestBody": {"required": True, "content": _content(kind)}}


def json_reply(kind: type[msgspec.Struct] | None) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers `kind` as JSON, or an error body."""
    error: dict[int | str, dict[str, Any]] = {"default": {"description": "An error.", "content": _content(ErrorBody)}}
    return error if kind is None else {200: {"description": "OK", "content": _content(kind)}, **error}


def add_schemas(app: FastAPI) -> None:
    """Put the schemas that the routes refer to into the application's OpenAPI document."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        _, schemas = msgspec.json.schema_components(_TYPES, ref_template=_TEMPLATE)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _content(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _TEMPLATE.format(name=kind.__name__)}}}
