"""`response_format` and `structured_outputs`: which grammar reaches the engine, and what is refused."""

import json
import time
from typing import Any

import pytest

from app.core.types import Grammar, GrammarKind
from tests.contract.serving import TEXT, FakeServer
from tests.contract.test_chat import ROUTE, USER, chat, chat_server

__all__ = ["chat", "chat_server"]  # fixtures

SCHEMA = {"type": "object", "properties": {"城": {"type": "string"}}, "required": ["城"], "additionalProperties": False}
AS_SCHEMA = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":")))
ANY_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')
BODIES: list[tuple[str, dict[str, Any]]] = [
    (ROUTE, {"messages": USER, "max_tokens": 2}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=["chat", "completions"])
@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "[0-9]+"}}, ("regex", "[0-9]+")),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            AS_SCHEMA,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, AS_SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, AS_SCHEMA),
        ({"structured_outputs": {"json_object": True, "regex": None}}, ANY_OBJECT),
        ({"structured_outputs": {"choice": ["是", "no"]}}, ("choice", '["是","no"]')),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, ("lark", 'start: "a" | "b"')),
    ],
    ids=str,
)
def test_the_grammar_reaches_the_engine(
    chat: FakeServer, path: str, body: dict[str, Any], fields: dict[str, Any], grammar: object
) -> None:
    response = chat.post(body | fields | {"n": 2}, path)
    assert response.status_code == 200, response.text
    expected = Grammar(GrammarKind(grammar[0]), grammar[1]) if isinstance(grammar, tuple) else grammar
    assert [request.params.grammar for request in chat.engine.requests] == [expected, expected]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_other_ends_are_taken_beside_a_form(chat: FakeServer, path: str, body: dict[str, Any]) -> None:
    fields = {"response_format": {"type": "json_object"}, "stop": "世界", "stop_token_ids": [7], "ignore_eos": True}
    choice = chat.post(body | fields | {"max_tokens": 100}, path).json()["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert text == TEXT.partition("世界")[0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "世界")
    params = chat.engine.requests[-1].params
    assert params.grammar is not None and params.stop_token_ids == (7,) and params.ignore_eos


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(" * 5000 + ")" * 5000}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["x"] * 2000}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "nonsense ::"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[1"}}, "structured_outputs"),
        ({"structured_outputs": {"json": nested(100)}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"guided_json": SCHEMA}, "guided_json"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_followed_is_refused(chat: FakeServer, fields: dict[str, Any], param: str) -> None:
    began = time.monotonic()
    for path, body in BODIES:
        response = chat.post(body | fields, path)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
    assert chat.engine.requests == []
    assert time.monotonic() - began < 10, "refused, and not after ages"


def test_a_schema_of_a_hundred_thousand_levels_is_refused(chat: FakeServer) -> None:
    deep = '{"type":"array","items":' * 60_000 + "{}" + "}" * 60_000
    body = f'{{"prompt":"a","structured_outputs":{{"json":{deep}}}}}'
    response = chat.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
