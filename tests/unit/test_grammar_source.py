"""What is refused of a grammar before any library looks at it."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from app.core.types import Grammar, GrammarKind
from app.grammar import source
from app.grammar.errors import GrammarError, safe_message


def nested(levels: int, *, through: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {through: schema}
    return schema


def multiples(*values: float) -> dict[str, Any]:
    return {"prefixItems": [{"type": "number", "multipleOf": value} for value in values]}


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(count)}}


def test_a_schema_is_kept_as_it_is_in_the_order_of_its_keys() -> None:
    schema = {"type": "object", "properties": {"b": {"const": "é🌍"}, "a": {}}}
    assert source.json_schema(schema) == Grammar(
        GrammarKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    )
    assert source.json_object() == Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


def test_framed_schemas_are_bounded_together() -> None:
    frame = source.FramedSchema("<", {"type": "object", "description": "x" * 50_000}, ">")
    assert source.framed_json([frame]).source.startswith(
        'start: frames\nframes: one\none: frame_0\nframe_0: "<" json_0 ">"\n'
    )
    with pytest.raises(GrammarError, match="together"):
        source.framed_json([frame, frame, frame])
    with pytest.raises(GrammarError, match="65 schemas"):
        source.framed_json([source.FramedSchema("", {}, "")] * 65)
    with pytest.raises(GrammarError, match="nothing"):
        source.framed_json([])
    with pytest.raises(GrammarError, match="deeper"):
        source.framed_json([source.FramedSchema("", nested(65), "")])


def test_choices_are_kept_once() -> None:
    assert source.choice(["b", "a", "b"]) == Grammar(GrammarKind.CHOICE, '["b","a"]')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: source.json_schema(nested(100_000)), "deeper than 64 levels"),
        (lambda: source.json_schema(nested(100_000, through="not")), "deeper than 64 levels"),
        (lambda: source.json_schema({"enum": ["x" * 200_000]}), "more than 131072"),
        (lambda: source.json_schema(properties(401)), "401 properties, more than 400"),
        (lambda: source.json_schema(nested(3) | {"items": properties(401)}), "401 properties"),
        (lambda: source.json_schema(multiples(10_007)), "multipleOf 10007 is too large"),
        (lambda: source.json_schema(multiples(0.0099991)), "too large"),
        (lambda: source.json_schema(multiples(97, 101, 103)), "too many others"),
        (lambda: source.regex("a" * 8193), "8193 characters, more than 8192"),
        (lambda: source.regex("(" * 201 + ")" * 201), "deeper than 200 brackets"),
        (lambda: source.lark("start: " + "(" * 50_000), "deeper than 200 brackets"),
        (lambda: source.lark("start: " + "a " * 40_000), "more than 65536"),
        (lambda: source.lark('root ::= "a"' + " " * 9000), "more than 8192"),
        (lambda: source.lark('start: x\nx: %json {"multipleOf": 99991}'), "%json is not taken"),
        (lambda: source.lark('%llguidance {}\nroot ::= "a"\nstart: x\nx: %regex {}'), "%regex is not taken"),
        (lambda: source.choice([]), "at least one"),
        (lambda: source.choice(["a", ""]), "empty text"),
        (lambda: source.choice([str(index) for index in range(1025)]), "1025 choices, more than 1024"),
        (lambda: source.choice(["x" * 32_769]), "more than 32768"),
    ],
)
def test_what_is_too_large_is_refused_at_once(make: Callable[[], Grammar], message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        make()


@pytest.mark.parametrize(
    "schema",
    [
        nested(63),
        properties(400),
        multiples(0.01, 0.5, 100, 1e-5, 1e6, 12, 60, 7),
        {"properties": {"multipleOf": {"type": "integer"}}},
        {"properties": {"properties": {"type": "object"}}},
        {"const": True},
    ],
    ids=["deep", "wide", "multiples", "a-property-of-that-name", "a-property-properties", "const"],
)
def test_what_people_send_is_taken(schema: dict[str, Any]) -> None:
    assert json.loads(source.json_schema(schema).source) == schema


def test_gbnf_is_told_from_lark() -> None:
    assert source.is_gbnf('root ::= "start: a"') and source.is_gbnf('ws ::= " "\nroot ::= ws')
    assert not source.is_gbnf('start: "::="') and not source.is_gbnf('%llguidance {}\nstart: "::="')
    assert not source.is_gbnf("nonsense")


def test_a_library_message_becomes_one_bounded_line() -> None:
    assert safe_message("at 1(8): bad\n   1 | start\x00\x1b[31m\n<non-verbose/>\n") == "at 1(8): bad    1 | start [31m"
    assert safe_message("x" * 1000) == "x" * 300 + "…"
