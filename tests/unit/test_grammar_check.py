"""Grammars tried in the check process: what passes, what is refused in whose words, and what is killed."""

import asyncio
import os
import signal
from typing import Any

import pytest

from app.core.types import Grammar, GrammarKind
from app.grammar import source
from app.grammar.check import GrammarChecker
from app.grammar.child import try_grammar
from app.grammar.errors import GrammarError

# Complements and intersections like these, found by a fuzzer, cost the library seconds that it counts as no fuel.
SLOW = r"""start: r0
r0: r6 T2 (/(éb(?i:k)){1,1000}a\wéb\w\d\db中b/){0,1000} r4 | (("x ")? /(.(\w)+([a-z]){1,1})*/ T0){0,1000} r1 ((r6)){2,50}
r1: r0 | (/é/ T0){2,50} T2 r6
r2: "ab" r6 r1
r3: /(\s){2,99999}/ T3 T1 | (r4)* | /([^x])*(\p{L})?é/ "a" T1
r4: r6 (/\s[a-z]((?i:k)|[a-z])\s\p{L}(?i:k)\w(é)+/ r1 /((\x{10ffff})?[\s\S]b\p{L}){2,3}/)*
r6: r2 | (T1 ("x " r1)? "x ")+ r1 | r1 ("x " | r3) r4
T0: /(((a){2,10000})?)+/ & ~/(((\w|[\s\S]|\w|\x{10ffff}))+|(\d[^x]\s|\p{L}.\x{10ffff}\x{10ffff}\x{10ffff}|([\s\S]){2,12}|(a){5,1000}|(b){5,15})|(中){1,11}|(\x{10ffff}中é\d)+)/
T1: /((((?i:k)){20,10000}|\x{10ffff}|(a|a|(?i:k)))\d)*/
T2: "abc"
T3: /[\s\S]/
"""  # noqa: E501


def one_of(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"const": 1}
    for level in range(depth):
        schema = {"oneOf": [schema, {"properties": {f"k{level}": schema}}, {"type": "array", "items": schema}]}
    return schema


def told_by(kind: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"kind": {"const": kind}, kind: {"type": "string"}},
        "required": ["kind", kind],
    }


def any_of(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "pattern": "a{1,50}"}
    for level in range(depth):
        schema = {"anyOf": [schema, {"properties": {f"k{level}": schema}}, {"type": "array", "items": schema}]}
    return schema


def chained_refs(count: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {f"d{count}": {"type": "object", "properties": {"z": {"type": "string"}}}}
    for index in range(count):
        below = {"$ref": f"#/$defs/d{index + 1}"}
        other = {"type": "object", "properties": {f"p{index}": {"type": "string"}}}
        definitions[f"d{index}"] = {"allOf": [below, {"anyOf": [below, other]}]}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (source.json_schema({"type": "strin"}), "Invalid type: strin"),
        (source.json_schema({"not": {}}), "not"),
        (source.json_schema({"uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (source.json_schema({"$ref": "https://example.com/a.json"}), "example.com"),
        (source.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "no text"),
        (source.json_schema(one_of(4)), "oneOf"),
        (source.json_schema(chained_refs(16)), "schema too large"),
        (source.regex("(?=a)b"), "look-around"),
        (source.regex("("), "unclosed group"),
        (source.lark("start: a"), "unknown name"),
        (source.lark("start: start"), "no text"),
        (source.lark('root ::= "a'), "GBNF"),
        (source.regex("((a{1,100}){1,100}){1,100}"), "too many expressions"),
        (Grammar(GrammarKind.JSON_SCHEMA, "[" * 100_000), "recursion limit"),
    ],
    ids=lambda value: value.source[:30] if isinstance(value, Grammar) else None,
)
def test_what_cannot_be_compiled_says_why(grammar: Grammar, message: str) -> None:
    verdict = try_grammar(grammar)
    assert verdict.grammar is None
    assert message in verdict.error
    assert len(verdict.error) <= 301 and verdict.error.isprintable()


@pytest.mark.parametrize(
    "grammar",
    [
        source.json_object(),
        source.json_schema(any_of(6)),
        source.json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}}),
        source.json_schema({"enum": [f"value number {index}" for index in range(5000)]}),
        source.json_schema({"type": "array", "minItems": 1, "maxItems": 10**9, "items": {"type": "number"}}),
        source.json_schema({"type": "string", "format": "date-time"}),
        source.json_schema({"oneOf": [told_by(kind) for kind in ("one", "two", "三")]}),
        source.choice([f"option {index} \x00 (x|y) é🌍" for index in range(1024)]),
        source.regex(""),
        source.regex(r"(a+)+\\"),
        source.regex(r"(x+x+)+y"),
        source.regex("(a?){500}a{500}"),
        source.lark('start: "a" WORD %import common.INT\nWORD: /\\w+/'.replace(" %", "\n%")),
    ],
    ids=lambda grammar: grammar.source[:30],
)
def test_what_can_be_compiled_passes_as_it_is(grammar: Grammar) -> None:
    assert try_grammar(grammar).grammar == grammar


def test_gbnf_is_translated() -> None:
    verdict = try_grammar(source.lark('root ::= "a" digits\ndigits ::= [0-9]{2}'))
    assert verdict.grammar is not None and verdict.grammar.kind is GrammarKind.LARK
    assert "start: " in verdict.grammar.source and not source.is_gbnf(verdict.grammar.source)


async def test_the_checker_survives_what_kills_its_process() -> None:
    checker = GrammarChecker()
    bomb, fine = source.lark(SLOW), source.json_object()
    results = await asyncio.gather(
        *(checker.check(grammar) for grammar in (fine, bomb, fine, bomb, source.regex("a"))), return_exceptions=True
    )
    assert [results[index] for index in (0, 2, 4)] == [fine, fine, source.regex("a")]
    for index in (1, 3):
        assert isinstance(results[index], GrammarError) and "0.4 s" in str(results[index])


async def test_a_check_process_that_somebody_ended_is_replaced() -> None:
    checker = GrammarChecker()
    await checker.check(source.json_object())
    os.kill(_child_of(checker), signal.SIGKILL)
    assert await checker.check(source.regex("b")) == source.regex("b")


async def test_a_check_process_that_somebody_stopped_is_replaced() -> None:
    checker = GrammarChecker(wall_seconds=3.0)
    await checker.check(source.json_object())
    os.kill(_child_of(checker), signal.SIGSTOP)
    assert await checker.check(source.regex("b")) == source.regex("b")


def _child_of(checker: GrammarChecker) -> int:
    child = checker._process._child
    assert child is not None
    return child.pid


async def test_the_event_loop_goes_on_meanwhile() -> None:
    """The thread waits for a pipe: a check that takes its whole time lets the loop run."""
    checker = GrammarChecker()
    task = asyncio.ensure_future(checker.check(source.lark(SLOW)))
    num_turns = 0
    while not task.done():
        await asyncio.sleep(0.005)
        num_turns += 1
    with pytest.raises(GrammarError):
        await task
    assert num_turns > 20
