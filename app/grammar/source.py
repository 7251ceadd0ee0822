"""Makes a `Grammar` of what a client sent, and refuses at once what is too large or too deep to look into.

The limits stand before any library sees the text: what passes them is checked by `app.grammar.check` within a
bounded time. Imports nothing heavy, because the API process does so at its start.
"""

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from app.core.types import Grammar, GrammarKind
from app.grammar.errors import GrammarError

MAX_SCHEMA_BYTES = 128 * 1024
MAX_SCHEMA_DEPTH = 64
"""Levels of objects and lists in a schema; the library's own reader stops at 128."""
MAX_PROPERTIES = 400
"""Of one object. Each optional one is four items in a row of the parser, which takes 2,000."""
MAX_REGEX_CHARS = 8 * 1024
MAX_GRAMMAR_CHARS = 64 * 1024
MAX_GBNF_CHARS = 8 * 1024
"""Its translation takes time that grows with the square."""
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 32 * 1024
"""Of all choices together."""
MAX_NESTING = 200
"""Open brackets in a regular expression or a Lark grammar."""
MAX_MULTIPLE = 10_000
"""Product of the different `multipleOf` of a schema, powers of ten left out: the library builds one state for each
remainder, and counts none of them as fuel."""

MAX_FRAMES = 64
MAX_REPEATS = 8
"""Of framed schemas in one output: a small model that may go on goes on for ever."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between the tokens of JSON. Bounded, because a small model in doubt writes spaces without an end."""
SCHEMA_OPTIONS: Mapping[str, object] = MappingProxyType(
    {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
)
"""How llguidance reads schemas: what it cannot hold the output to is an error."""

_LARK_START = re.compile(r"^[ \t]*(?:%llguidance\b|start[ \t]*:)(?!:=)", re.MULTILINE)
_DIRECTIVE = re.compile(r"%(\w+)")
_DIRECTIVES = frozenset({"ignore", "import", "llguidance"})
"""Others bring in notations of their own, JSON Schema among them, past the limits for those."""

ANY_OBJECT: Mapping[str, object] = {"type": "object"}


def json_schema(schema: Mapping[str, object]) -> Grammar:
    """JSON that validates against `schema`. Raises GrammarError."""
    _check_shape(schema)
    source = msgspec.json.encode(schema).decode()
    _check_size(len(source.encode()), MAX_SCHEMA_BYTES, what="the schema", unit="bytes")
    return Grammar(GrammarKind.JSON_SCHEMA, source)


def json_object() -> Grammar:
    """Any JSON object."""
    return json_schema(ANY_OBJECT)


class FramedSchema(NamedTuple):
    """JSON by a schema, between two texts."""

    before: str
    schema: Mapping[str, object]
    after: str


def framed_json(
    frames: Sequence[FramedSchema], *, separator: str | None = None, otherwise: Mapping[str, object] | None = None
) -> Grammar:
    """One of `frames`, or with a `separator` up to MAX_REPEATS of them; or JSON by the schema `otherwise`.

    Raises GrammarError.
    """
    if not frames:
        raise GrammarError("there is nothing to choose from")
    _check_size(len(frames), MAX_FRAMES, what="the list", unit="schemas")
    rest = "" if separator is None else f" ({_quoted(separator)} one){{0,{MAX_REPEATS - 1}}}"
    start = "start: frames" if otherwise is None else "start: frames | other"
    rules = [start, f"frames: one{rest}", "one: " + " | ".join(f"frame_{index}" for index in range(len(frames)))]
    schemas = [frame.schema for frame in frames] + ([] if otherwise is None else [otherwise])
    size = sum(len(json_schema(schema).source.encode()) for schema in schemas)
    _check_size(size, MAX_SCHEMA_BYTES, what="all schemas together", unit="bytes")
    for index, frame in enumerate(frames):
        rules.append(f"frame_{index}: {_quoted(frame.before)} json_{index} {_quoted(frame.after)}")
        rules.append(f"json_{index}: {_json_rule(frame.schema)}")
    if otherwise is not None:
        rules.append(f"other: {_json_rule(otherwise)}")
    return Grammar(GrammarKind.LARK, "\n".join(rules) + "\n")


def regex(pattern: str) -> Grammar:
    """A text that `pattern` matches as a whole. Raises GrammarError."""
    _check_size(len(pattern), MAX_REGEX_CHARS, what="the regular expression", unit="characters")
    _check_nesting(pattern, what="the regular expression")
    return Grammar(GrammarKind.REGEX, pattern)


def choice(options: Sequence[str]) -> Grammar:
    """One of `options`. Raises GrammarError."""
    if not options:
        raise GrammarError("there is no choice: give at least one")
    if not all(options):
        raise GrammarError("one of the choices is the empty text: leave it out")
    _check_size(len(options), MAX_CHOICES, what="the list", unit="choices")
    _check_size(sum(map(len, options)), MAX_CHOICE_CHARS, what="all choices together", unit="characters")
    return Grammar(GrammarKind.CHOICE, msgspec.json.encode(list(dict.fromkeys(options))).decode())


def lark(grammar: str) -> Grammar:
    """A text of the language of a Lark grammar, or of one in llama.cpp's GBNF. Raises GrammarError."""
    limit = MAX_GBNF_CHARS if is_gbnf(grammar) else MAX_GRAMMAR_CHARS
    _check_size(len(grammar), limit, what="the grammar", unit="characters")
    _check_nesting(grammar, what="the grammar")
    for directive in _DIRECTIVE.findall(grammar):
        if directive not in _DIRECTIVES and not is_gbnf(grammar):
            raise GrammarError(f"%{directive} is not taken in a grammar; %ignore and %import are")
    return Grammar(GrammarKind.LARK, grammar)


def is_gbnf(grammar: str) -> bool:
    """Whether it is written as `root ::= ...`, and not as Lark's `start: ...`."""
    return "::=" in grammar and _LARK_START.search(grammar) is None


def _json_rule(schema: Mapping[str, object]) -> str:
    return f"%json {msgspec.json.encode({**schema, 'x-guidance': dict(SCHEMA_OPTIONS)}).decode()}"


def _quoted(text: str) -> str:
    """A literal of Lark, which is one of JSON."""
    return msgspec.json.encode(text).decode()


def _check_size(size: int, limit: int, *, what: str, unit: str) -> None:
    if size > limit:
        raise GrammarError(f"{what} has {size} {unit}, more than {limit}")


def _check_nesting(text: str, *, what: str) -> None:
    """Count brackets without a look at quotes: too strict for few, and no way around it."""
    depth = 0
    for char in text:
        if char in "([{":
            depth += 1
            if depth > MAX_NESTING:
                raise GrammarError(f"{what} is nested deeper than {MAX_NESTING} brackets")
        elif char in ")]}":
            depth = max(0, depth - 1)


def _check_shape(schema: object) -> None:
    """Level by level with a list of our own: the schema may be as deep as the body's reader allows."""
    level: list[object] = [schema]
    multiples: set[int] = set()
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                _check_object(value, multiples)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        level = [value for value in below if isinstance(value, Mapping | list)]
        if not level:
            return
    raise GrammarError(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")


def _check_object(schema: Mapping[str, object], multiples: set[int]) -> None:
    """One object of a schema; `multiples` are those seen before."""
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and len(properties) > MAX_PROPERTIES:
        raise GrammarError(f"an object of the schema has {len(properties)} properties, more than {MAX_PROPERTIES}")
    multiple = schema.get("multipleOf")
    if isinstance(multiple, int | float):
        multiples.add(_significant(multiple))
        if math.prod(multiples) > MAX_MULTIPLE:
            raise GrammarError(f"multipleOf {multiple} is too large for a grammar, or too many others stand beside it")


def _significant(number: float) -> int:
    """The digits of a number without its power of ten: 25 for 0.25 and for 2500."""
    return abs(int("".join(map(str, Decimal(repr(number)).normalize().as_tuple().digits)))) or 1
