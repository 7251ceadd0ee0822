"""From a `Grammar` to llguidance: its own notation, and the limits under which everything is compiled and run.

Imported when the first grammar arrives, never at start: the library costs tens of milliseconds.
"""

import re
from typing import assert_never

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from app.core.types import Grammar, GrammarKind
from app.grammar.errors import GrammarError, safe_message
from app.grammar.source import SCHEMA_OPTIONS, is_gbnf

INITIAL_LEXER_FUEL = 200_000
MAX_GRAMMAR_SIZE = 100_000
STEP_LEXER_FUEL = 200_000
STEP_MAX_ITEMS = 20_000
MAX_LEXER_STATES = 50_000
"""About 1 to 2 kB each, for each sequence."""

_SPECIAL_IN_REGEX = re.compile(r"[^\w\s]", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def compile_grammar(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of the output. Releases the GIL. Raises GrammarError."""
    try:
        notation = to_llguidance(grammar)
    except ValueError as error:
        raise GrammarError(safe_message(str(error))) from None
    matcher = LLMatcher(tokenizer, notation, limits=_limits(), log_level=0)
    if matcher.is_error():
        raise GrammarError(safe_message(matcher.get_error()))
    return matcher


def translate(grammar: Grammar) -> Grammar:
    """A GBNF as Lark, anything else as it is. Raises GrammarError where a GBNF cannot be read."""
    if grammar.kind is not GrammarKind.LARK or not is_gbnf(grammar.source):
        return grammar
    try:
        return Grammar(GrammarKind.LARK, gbnf_to_lark(grammar.source))
    except Exception as error:  # it raises bare ones
        raise GrammarError(f"the GBNF cannot be read: {safe_message(str(error))}") from None


def to_llguidance(grammar: Grammar) -> str:
    """The same language in the library's notation. Raises ValueError where a schema is no JSON object."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            overrides = dict(SCHEMA_OPTIONS)
            return LLMatcher.grammar_from_json_schema(grammar.source, overrides=overrides)  # type: ignore[arg-type]
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.source)
        case GrammarKind.CHOICE:
            options = msgspec.json.decode(grammar.source, type=list[str])
            return LLMatcher.grammar_from_regex("|".join(map(_literal, options)))
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(grammar.source)
        case _:
            assert_never(grammar.kind)


def _literal(text: str) -> str:
    r"""A regular expression that matches `text` alone; controls as \xHH, which the library's reader wants."""
    escaped = _SPECIAL_IN_REGEX.sub(lambda match: "\\" + match[0] if match[0].isascii() else match[0], text)
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", escaped)


def _limits() -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=INITIAL_LEXER_FUEL,
        max_grammar_size=MAX_GRAMMAR_SIZE,
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_MAX_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        # It would take its fuel by the model's vocabulary: what the check let pass could fail in the engine.
        precompute_large_lexemes=False,
        verbose_errors=False,
    )
