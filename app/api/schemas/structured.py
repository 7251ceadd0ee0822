"""`response_format` and `structured_outputs`: what a request says of the form of its output."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

JsonSchema = dict[str, Any]


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Free text."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """Some JSON object."""


class JsonSchemaSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A schema with a name."""

    schema: JsonSchema
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """Accepted either way: the output is always held to the schema."""


class JsonSchemaFormat(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True
):
    """JSON that validates against a schema."""

    json_schema: JsonSchemaSpec


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's form: exactly one of these."""

    json: JsonSchema | str | None = None
    """A JSON Schema, or one as JSON text."""
    json_object: bool | None = None
    """True: some JSON object."""
    regex: Annotated[str, Meta(min_length=1)] | None = None
    """The whole output matches it."""
    choice: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)] | None = None
    """The output is one of these."""
    grammar: Annotated[str, Meta(min_length=1)] | None = None
    """A grammar in Lark's notation or llama.cpp's GBNF."""
