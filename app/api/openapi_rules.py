"""Rules of requests that the structs' types cannot say and JSON Schema can: fields that need or exclude others.

The code that refuses is beside each field (`schemas.*`, `constraint`, `tools`, `*_prompt`); here the OpenAPI document
says the same, so that whoever reads it alone sends nothing that is refused for its form. The fuzzer holds the two
together: a schema-valid request is refused for a reason of tests/fuzz/rules.py only, an invalid one never accepted.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from app.api.schemas.limits import INT32, MAX_PROMPTS

Schema = dict[str, Any]

_REF = "#/components/schemas/{name}"
_NULL: Schema = {"type": "null"}
_TEXT: Schema = {"type": "string"}
_TRUE: Schema = {"const": True}
_NOT_TRUE: Schema = {"enum": [False, None]}
_NOT_EMPTY: Schema = {"type": "array", "minItems": 1}
_EMPTY: Schema = {"anyOf": [{"type": "array", "maxItems": 0}, _NULL]}
_TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "exclusiveMaximum": INT32}
_JSON_FORMAT: Schema = {"type": "object", "properties": {"type": {"enum": ["json_object", "json_schema"]}}}
_FORCED: Schema = {"anyOf": [{"const": "required"}, {"type": "object"}]}
_FORCED_MESSAGES: Schema = {"type": "object", "properties": {"type": {"enum": ["any", "tool"]}}}


def add_rules(schemas: dict[str, Schema]) -> None:
    """Add them to the components of the document."""
    for name, rules in _CONDITIONS.items():
        schemas[name]["allOf"] = [*schemas[name].get("allOf", ()), *rules]
    for name, branches in _BRANCHES.items():
        schemas[name] |= branches
    for name in ("ChatRequest", "CompletionRequest"):
        _replace(schemas[name]["properties"]["truncate_prompt_tokens"], _truncation())
    for name in ("ChatRequest", "CompletionRequest", "ResponsesRequest"):
        ids = schemas[name]["properties"]["logit_bias"]["anyOf"][0]
        ids["propertyNames"] = {"pattern": "^(0|[1-9][0-9]{0,17})$"}
    _replace(schemas["CompletionRequest"]["properties"]["prompt"], _prompt())
    for name in ("MessagesRequest", "CountTokensRequest"):
        system = {"type": "array", "items": _text_block()}
        _replace(schemas[name]["properties"]["system"], {"anyOf": [_TEXT, system, _NULL]})
    _respell_patterns(schemas)


def _respell_patterns(node: object) -> None:
    """In ECMA's expressions the end is `$`, and nothing follows it; in Python's a newline may."""
    if isinstance(node, dict):
        if isinstance(pattern := node.get("pattern"), str):
            node["pattern"] = pattern.replace(r"\Z", "$")
        for value in node.values():
            _respell_patterns(value)
    elif isinstance(node, list):
        for value in node:
            _respell_patterns(value)


def _replace(schema: Schema, better: Schema) -> None:
    """Another type for a field whose description stays."""
    description = schema["description"]
    schema.clear()
    schema |= {"description": description, **better}


def _when(given: Mapping[str, Schema], then: Mapping[str, Schema], *, required: Iterable[str] = ()) -> Schema:
    """Where the fields of `given` are there and like that, those of `then` are; `required` ones are there, too."""
    condition = {"properties": dict(given), "required": list(given)}
    consequence: Schema = {"properties": dict(then)}
    if required:
        consequence["required"] = list(required)
    return {"if": condition, "then": consequence}


def _needs(field: str, value: Schema, other: str, other_value: Schema) -> Schema:
    return _when({field: value}, {other: other_value}, required=[other])


def _excludes(field: str, value: Schema, **others: Schema) -> Schema:
    return _when({field: value}, others)


def _function() -> Schema:
    return {"required": ["type", "name"], "properties": {"type": {"const": "function"}, "name": _TEXT}}


_SHARED: tuple[Schema, ...] = (
    _needs("stream_options", {"type": "object"}, "stream", _TRUE),
    _excludes("prompt_logprobs", {"type": "integer"}, stream=_NOT_TRUE),
    _needs("truncation_side", _TEXT, "truncate_prompt_tokens", {"type": "integer"}),
    _excludes("response_format", _JSON_FORMAT, structured_outputs=_NULL),
)
_ONE_OF_PROMPT: tuple[Schema, ...] = (_excludes("continue_final_message", _TRUE, add_generation_prompt=_NOT_TRUE),)
_MESSAGES: tuple[Schema, ...] = (_needs("tool_choice", _FORCED_MESSAGES, "tools", _NOT_EMPTY),)
_CONDITIONS: Mapping[str, tuple[Schema, ...]] = MappingProxyType(
    {
        "ChatRequest": (
            *_SHARED,
            *_ONE_OF_PROMPT,
            _needs("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs", _TRUE),
            _needs("tool_choice", _FORCED, "tools", _NOT_EMPTY),
            _excludes("tool_choice", _FORCED, stop=_EMPTY, stop_token_ids=_EMPTY),
            {
                "if": {
                    "properties": {"tools": _NOT_EMPTY, "structured_outputs": {"type": "object"}},
                    "required": ["tools", "structured_outputs"],
                },
                "then": {"properties": {"tool_choice": {"const": "none"}}, "required": ["tool_choice"]},
            },
        ),
        "CompletionRequest": (*_SHARED, _needs("max_tokens", {"const": 0}, "echo", _TRUE)),
        "TokenizeRequest": _ONE_OF_PROMPT,
        "ResponsesRequest": (
            _needs("stream_options", {"type": "object"}, "stream", _TRUE),
            _needs("tool_choice", _FORCED, "tools", _NOT_EMPTY),
            _excludes("tool_choice", _FORCED, stop=_EMPTY),
        ),
        "StreamOptions": (_needs("resume_token_ids", _NOT_EMPTY, "resumable", _TRUE),),
        "ResponseStreamOptions": ({"properties": {"include_obfuscation": _NOT_TRUE}},),
        "ResponseTool": (_function(),),
        "NamedFunction": (_function(),),
        "MessagesRequest": (*_MESSAGES, _excludes("tool_choice", _FORCED_MESSAGES, stop_sequences=_EMPTY)),
        "CountTokensRequest": _MESSAGES,
        "MessagesToolChoice": (_needs("type", {"const": "tool"}, "name", _TEXT),),
    }
)


def _part(field: str, *types: str) -> Schema:
    return {"required": ["type", field], "properties": {"type": {"enum": list(types)}, field: _TEXT}}


def _block(kind: str, **fields: Schema) -> Schema:
    """A block of Messages whose `fields` are required; what else it holds is left aside."""
    properties: Schema = {"type": {"const": kind}, **fields}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _text_block() -> Schema:
    return _block("text", text=_TEXT)


def _blocks(*kinds: Schema) -> Schema:
    return {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": list(kinds)}}]}


def _turn(role: str, *kinds: Schema) -> Schema:
    return {"properties": {"role": {"const": role}, "content": _blocks(_text_block(), *kinds)}}


def _turns() -> list[Schema]:
    """Which blocks a message of each role takes."""
    content: Schema = {"anyOf": [_TEXT, {"type": "array", "items": _text_block()}, _NULL]}
    result = _block("tool_result", tool_use_id=_TEXT)
    result["properties"]["content"] = content
    thinking = _block("thinking")
    thinking["properties"]["thinking"] = {"anyOf": [_TEXT, _NULL]}
    hidden = _block("redacted_thinking")
    return [
        _turn("user", result, hidden),
        _turn("assistant", _block("tool_use", id=_TEXT, name=_TEXT), thinking, hidden),
        _turn("system", hidden),
    ]


def _items() -> list[Schema]:
    """What each kind of an item of `/v1/responses` needs."""
    parts: Schema = {"type": "array"}
    content: Schema = {"anyOf": [_TEXT, parts]}
    of_output = _block("function_call_output", call_id=_TEXT, output=content)
    return [
        {
            "required": ["role", "content"],
            "properties": {"type": {"enum": ["message", None]}, "role": _TEXT, "content": content},
        },
        _block("function_call", call_id=_TEXT, name=_TEXT, arguments=_TEXT),
        of_output,
        _block("reasoning"),
    ]


def _exactly_one(*fields: str) -> list[Schema]:
    """One of these is there, and neither null nor false; the others are not."""
    absent: Schema = {"enum": [None, False]}
    return [
        {"required": [field], "properties": {**dict.fromkeys(fields, absent), field: {"not": absent}}}
        for field in fields
    ]


def _tokenize() -> list[Schema]:
    """A text or messages; what belongs to messages is null with a text."""
    of_messages = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
    text = {"prompt": _TEXT} | dict.fromkeys(of_messages, _NULL)
    messages = {"messages": {"type": "array"}, "prompt": _NULL}
    return [{"required": ["prompt"], "properties": text}, {"required": ["messages"], "properties": messages}]


_BRANCHES: Mapping[str, Schema] = MappingProxyType(
    {
        "ContentPart": {
            "anyOf": [_part("text", "text", "input_text", "output_text"), _part("refusal", "refusal")],
        },
        "InputPart": {
            "anyOf": [
                _part("text", "text", "input_text", "output_text", "reasoning_text", "summary_text"),
                _part("refusal", "refusal"),
            ],
        },
        "InputItem": {"oneOf": _items()},
        "MessageParam": {"oneOf": _turns()},
        "StructuredOutputs": {"oneOf": _exactly_one("json", "json_object", "regex", "choice", "grammar")},
        "TokenizeRequest": {"oneOf": _tokenize()},
    }
)


def _truncation() -> Schema:
    return {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1, "exclusiveMaximum": INT32}, _NULL]}


def _prompt() -> Schema:
    """One text, one list of ids, or a list of both: the struct's type cannot say that ids and lists do not mix."""
    text: Schema = {"type": "string", "minLength": 1}
    ids: Schema = {"type": "array", "items": _TOKEN_ID, "minItems": 1}
    several = {"type": "array", "items": {"anyOf": [text, ids]}, "minItems": 1, "maxItems": MAX_PROMPTS}
    return {"anyOf": [text, ids, several]}
