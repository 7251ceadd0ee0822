"""Tool calls in text, as models of several families write them, split at every character and at random."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.text.call_reader import MAX_OPENING
from app.text.tools import CallForm, ToolParser, call_frame

NAMES = ("get_weather", "f", "天气")
PARIS = '{"city": "Paris", "days": [1, {"x": "}\\"<tool_call>"}]}'
# Outputs of Hermes 2 Pro, Qwen 2.5 and Qwen 3, Llama 3.1 and 3.2, Mistral, and their usual slips.
CASES: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "qwen": (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        "",
        [("get_weather", PARIS)],
    ),
    "text first, two calls": (
        'Let me look.\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "天气", "arguments": {"城": "北京 🌍"}}\n</tool_call>\n',
        "Let me look.",
        [("f", "{}"), ("天气", '{"城": "北京 🌍"}')],
    ),
    "hermes, arguments first": (
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "qwen 3, thought before": (
        '<think>\nA < b, so <tool>.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": null}}\n</tool_call>',
        "<think>\nA < b, so <tool>.\n</think>",
        [("f", '{"a": null}')],
    ),
    "an unknown name in tags": ('<tool_call>{"name": "nope", "arguments": {}}</tool_call>', "", [("nope", "{}")]),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    "null": ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    "a string of JSON": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "two objects in one tag": (
        '<tool_call>\n{"name": "f", "arguments": {}}\n{"name": "f", "arguments": {"b": 2}}\n</tool_call>',
        "",
        [("f", "{}"), ("f", '{"b": 2}')],
    ),
    "a brace too many": ('<tool_call>\n{"name": "f", "arguments": {}}}\n</tool_call>\nDone', "\nDone", [("f", "{}")]),
    "no end": ('<tool_call>\n{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    "cut in the tag": ("So <tool_c", "So <tool_c", []),
    "cut before the name's end": ('<tool_call>\n{"name": "get', '<tool_call>\n{"name": "get', []),
    "no JSON": ("a <tool_call>oh</tool_call> b ", "a <tool_call>oh</tool_call> b ", []),
    "arguments that are a list": (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [],
    ),
    "arguments that are a word": (
        '<tool_call>{"name": "f", "arguments": nope}</tool_call>',
        '<tool_call>{"name": "f", "arguments": nope}</tool_call>',
        [],
    ),
    "escapes": (
        '<tool_call>{"a\\"b": "\\"}", "arguments": null, "name": "x\\y", "arguments": {"b": 1}}</tool_call>',
        "",
        [("x\\y", "{}")],
    ),
    "more behind the arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": [{}]}, "id": 7, "parameters": {}, "x": [1, "]"] }</tool_call>',
        "",
        [("f", '{"a": [{}]}')],
    ),
    "broken arguments are passed on": (
        '<tool_call>{"name": "f", "arguments": {"a": nope,}}</tool_call>',
        "",
        [("f", '{"a": nope,}')],
    ),
    "garbage behind the arguments": (
        '<tool_call>{"name": "f", "arguments": {} oh}</tool_call> x',
        "oh}</tool_call> x",
        [("f", "{}")],
    ),
    "text between tags": (
        '<tool_call>{"name": "f", "arguments": {}} </tool> then',
        "</tool> then",
        [("f", "{}")],
    ),
    "llama": ('{"name": "get_weather", "parameters": {"city": "Rome"}}', "", [("get_weather", '{"city": "Rome"}')]),
    "llama, two": (
        '\n{"type": "function", "name": "f", "parameters": {}}; {"name": "f", "parameters": {"a": 1}}',
        "",
        [("f", "{}"), ("f", '{"a": 1}')],
    ),
    "mistral": (
        '[{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {}}]',
        "",
        [("f", '{"a": 1}'), ("get_weather", "{}")],
    ),
    "JSON that is the answer": ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    "JSON with a tool's name and no arguments": ('{"name": "f"}\n', '{"name": "f"}\n', []),
    "JSON of other keys": ('{"city": {"name": "f"}} ', '{"city": {"name": "f"}} ', []),
    "a list": ("[ 1, 2]", "[ 1, 2]", []),
    "the beginning of a list": ("\n[ ", "\n[ ", []),
    "numbers": ('{"id": 7, "name": "f", "arguments": {}}', "", [("f", "{}")]),
    "a remark, then a call": (
        '[Note] <tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "[Note]",
        [("f", "{}")],
    ),
    "nothing": ("", "", []),
    "space": (" \n", " \n", []),
    "text": ("Hello 🌍, it is 5 < 6.\n", "Hello 🌍, it is 5 < 6.\n", []),
}


def run(pieces: list[str], **options: Any) -> tuple[str, list[tuple[str | None, str]]]:
    parser = ToolParser(NAMES, **options)
    text, calls = "", dict[int, tuple[str | None, str]]()
    for step in [*map(parser.push, pieces), parser.finish()]:
        text += step.text
        for delta in step.calls:
            if delta.call not in calls:
                assert delta.name is not None and delta.call == len(calls)
                calls[delta.call] = (delta.name, delta.arguments)
            else:
                assert delta.name is None
                name, arguments = calls[delta.call]
                calls[delta.call] = (name, arguments + delta.arguments)
    assert parser.has_calls == bool(calls)
    return text, [calls[index] for index in sorted(calls)]


@pytest.mark.parametrize("case", CASES)
def test_each_family_split_at_every_character(case: str) -> None:
    text, content, calls = CASES[case]
    assert run([text]) == (content, calls)
    assert run(list(text)) == (content, calls)
    for cut in range(len(text)):
        assert run([text[:cut], text[cut:]]) == (content, calls)


FRAGMENTS = st.sampled_from(
    (
        *("<tool_call>", "</tool_call>", "<tool", "{", "}", "[", "]", '"name"', '"arguments"', ":", ",", '"f"'),
        *('"\\"', " ", "\n", "x", "🌍", '{"name": "f", "arguments": {"a": 1}}', "null", "1", '"parameters"', ";", "\\"),
    )
)


@settings(max_examples=500)
@given(st.lists(FRAGMENTS, max_size=14), st.lists(st.integers(0, 200), max_size=6), st.booleans())
@example(["<tool_call>", "<tool_call>", '{"name": "f", "arguments": {"a": 1}}'], [3], False)
def test_the_splits_do_not_matter_and_nothing_is_lost_without_calls(
    parts: list[str], cuts: list[int], single: bool
) -> None:
    text = "".join(parts)
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    whole = run([text], single=single)
    assert run(pieces, single=single) == whole == run(list(text), single=single)
    content, calls = whole
    if not calls:
        assert content == text
    assert not single or len(calls) <= 1


@settings(max_examples=300)
@given(st.lists(FRAGMENTS, max_size=14), st.integers(0, 200), st.booleans())
def test_what_is_released_behind_a_text_does_not_depend_on_its_splits(parts: list[str], cut: int, single: bool) -> None:
    """A stream that goes on elsewhere is told its first part at once, and must add what was left to say."""
    text = "".join(parts)
    cut %= len(text) + 1
    by_character, at_once = ToolParser(NAMES, single=single), ToolParser(NAMES, single=single)
    steps = [by_character.push(char) for char in text[:cut]]
    step = at_once.push(text[:cut])
    assert "".join(one.text for one in steps) == step.text
    for call in {delta.call for one in steps for delta in one.calls} | {delta.call for delta in step.calls}:
        pieces = [delta.arguments for one in steps for delta in one.calls if delta.call == call]
        assert "".join(pieces) == next(delta.arguments for delta in step.calls if delta.call == call)


def test_arguments_are_streamed_as_they_come_and_text_is_not_held() -> None:
    parser = ToolParser(NAMES)
    assert parser.push("Well, ").text == "Well,"
    assert parser.push("a<b").text == " a<b"
    assert parser.push(' <tool_call>{"name": "f", "argu').calls == ()
    assert [parser.push(piece).calls[0] for piece in ('ments": {"a', '": 1', "}")] == [
        (0, "f", '{"a'),
        (0, None, '": 1'),
        (0, None, "}"),
    ]


def test_calls_in_calls_that_are_none_cost_no_time_and_no_stack() -> None:
    text = '<tool_call>{"x": "' * 3000
    assert run([text]) == (text, []) == run([text], single=True)
    ended = text + '"' + "}" * 5
    assert run([ended]) == (ended, [])
    late = '<tool_call>{"x": "' + "y" * MAX_OPENING + '", "name": "f"}</tool_call>'
    assert run([late]) == (late, []) == run(list(late))


def test_only_the_first_call_counts_where_one_is_asked_for() -> None:
    text = CASES["text first, two calls"][0] + "more"
    assert run([text], single=True) == ("Let me look.", [("f", "{}")])


@settings(max_examples=60)
@given(
    st.sampled_from(CallForm),
    st.dictionaries(st.text(max_size=5), st.none() | st.text(max_size=8) | st.lists(st.floats()), max_size=2),
    st.booleans(),
)
def test_what_a_frame_makes_is_read_back(form: CallForm, arguments: dict[str, Any], ascii_only: bool) -> None:
    frame = call_frame(form, "f")
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    assert run([frame.before + written + frame.after]) == ("", [("f", written)])
