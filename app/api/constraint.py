"""From `response_format` and `structured_outputs` to the grammar that the engine follows, checked beforehand."""

import asyncio
from collections.abc import Mapping

import msgspec

from app.api.reasoning import ReasoningPlan
from app.api.schemas.generation import GenerationRequest
from app.api.schemas.structured import JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from app.core.errors import InvalidRequest
from app.core.types import Grammar
from app.grammar import source
from app.grammar.check import GrammarChecker
from app.grammar.errors import GrammarError


async def prepare_grammar(
    request: GenerationRequest,
    checker: GrammarChecker,
    *,
    forced: Grammar | None = None,
    reasoning: ReasoningPlan | None = None,
) -> Grammar | None:
    """The request's grammar, or None for free text. `forced` is that of tool calls. Raises InvalidRequest."""
    field = "response_format" if request.structured_outputs is None else "structured_outputs"
    field = field if forced is None else "tools"
    try:
        if forced is None and not _is_constrained(request):
            return None
        # Every part of a schema is looked at, and it may be as large as the body.
        grammar = await asyncio.to_thread(_grammar_of, request) if forced is None else forced
        if grammar is None:
            return None
        if forced is not None:
            _check_stops(request, field)
        checked = await checker.check(grammar)
        return checked if reasoning is None else reasoning.behind_reasoning(checked, field=field)
    except GrammarError as error:
        raise InvalidRequest(f"`{field}`: {error}.", param=field, code="invalid_grammar") from error


def _is_constrained(request: GenerationRequest) -> bool:
    return request.structured_outputs is not None or request.response_format is not None


def _grammar_of(request: GenerationRequest) -> Grammar | None:
    form, outputs = request.response_format, request.structured_outputs
    if outputs is not None:
        if isinstance(form, JsonObjectFormat | JsonSchemaFormat):
            raise InvalidRequest(
                "`response_format` and `structured_outputs` exclude each other: set one of them.",
                param="structured_outputs",
            )
        return _of_outputs(outputs)
    schema = format_schema(request)
    return None if schema is None else source.json_schema(schema)


def format_schema(request: GenerationRequest) -> Mapping[str, object] | None:
    """The schema that `response_format` asks for; None for free text."""
    form = request.response_format
    if isinstance(form, JsonSchemaFormat):
        return form.json_schema.schema
    return source.ANY_OBJECT if isinstance(form, JsonObjectFormat) else None


def _of_outputs(outputs: StructuredOutputs) -> Grammar:
    given = [name for name in outputs.__struct_fields__ if getattr(outputs, name) not in (None, False)]
    if len(given) != 1:
        known = ", ".join(outputs.__struct_fields__)
        raise GrammarError(f"it needs exactly one of {known}; {len(given)} are given")
    if outputs.regex is not None:
        return source.regex(outputs.regex)
    if outputs.choice is not None:
        return source.choice(outputs.choice)
    if outputs.grammar is not None:
        return source.lark(outputs.grammar)
    return source.json_object() if outputs.json is None else source.json_schema(_schema_of(outputs.json))


def _schema_of(schema: dict[str, object] | str) -> dict[str, object]:
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(schema, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise GrammarError("`json` is a text that is no JSON object") from error


def _check_stops(request: GenerationRequest, field: str) -> None:
    """What could end a call before it is whole: a tool must not run on half of its arguments."""
    for name in ("stop", "stop_token_ids"):
        if getattr(request, name):
            raise InvalidRequest(
                f"`{name}` could end a call that `{field}` and `tool_choice` ask for before it is whole: "
                "leave one of them out.",
                param=name,
            )
