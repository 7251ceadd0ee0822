"""The split of reasoning: the same at every boundary, and what is joined is what was written."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.text.reasoning import FORMS, ReasoningForm, ReasoningParser, Start

QWEN, ASSUMED = FORMS["qwen3"], FORMS["deepseek_r1"]
PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<",
        "<th",
        "</",
        "</thin",
        "k>",
        " ",
        "\n",
        "\n\n",
        "Hm",
        "你好",
        "🌍",
        "a < b",
        ">",
        "<tool_call>",
    ]
)


def split(form: ReasoningForm, start: Start, parts: list[str]) -> tuple[str, str]:
    parser = ReasoningParser(form, start)
    steps = [*map(parser.push, parts), parser.finish()]
    return "".join(step.reasoning for step in steps), "".join(step.text for step in steps)


@pytest.mark.parametrize(
    ("form", "start", "text", "reasoning", "answer"),
    [
        (QWEN, Start.OPEN, "<think>\nHm.\n\nSo.\n</think>\n\nYes.\n", "Hm.\n\nSo.", "Yes.\n"),
        (QWEN, Start.OPEN, "\n <think>Hm.</think>Yes.", "Hm.", "Yes."),
        (QWEN, Start.OPEN, "Yes. </think> <think>No.</think>", "", "Yes. </think> <think>No.</think>"),
        (QWEN, Start.OPEN, "  Yes.", "", "  Yes."),
        (QWEN, Start.OPEN, "<thin", "", "<thin"),
        (QWEN, Start.OPEN, "<think>Hm", "Hm", ""),
        (QWEN, Start.OPEN, "<think>\n\n</think>\n\nYes.", "", "Yes."),
        (QWEN, Start.OPEN, "", "", ""),
        (QWEN, Start.INSIDE, "Hm.</think>Yes.<think>No.</think>", "Hm.", "Yes.<think>No.</think>"),
        (QWEN, Start.INSIDE, "\n<think>\nHm. </thin </think>", "Hm. </thin", ""),
        (QWEN, Start.INSIDE, "Hm. </thi", "Hm. </thi", ""),
        (QWEN, Start.INSIDE, "</think>\n", "", ""),
        (QWEN, Start.INSIDE, "<", "<", ""),
        (QWEN, Start.OVER, "<think>No.</think> Yes.", "", "<think>No.</think> Yes."),
        (QWEN, Start.INSIDE, 'So.</think>\n<tool_call>{"name": "f"}', "So.", '<tool_call>{"name": "f"}'),
    ],
)
def test_what_is_what(form: ReasoningForm, start: Start, text: str, reasoning: str, answer: str) -> None:
    for parts in ([text], list(text), [text[:3], text[3:]]):
        assert split(form, start, parts) == (reasoning, answer)


@settings(max_examples=300)
@given(pieces=st.lists(PIECES, max_size=12), cuts=st.lists(st.integers(0, 60)), start=st.sampled_from(Start))
def test_where_the_text_was_split_does_not_matter(pieces: list[str], cuts: list[int], start: Start) -> None:
    text = "".join(pieces)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[one:other] for one, other in pairwise(edges)]
    whole = split(QWEN, start, [text])
    assert split(QWEN, start, parts) == split(QWEN, start, list(text)) == whole
    tags = text.replace("<think>", "").replace("</think>", "")
    joined = "".join(whole).replace("<think>", "").replace("</think>", "")
    assert "".join(joined.split()) == "".join(tags.split()), "nothing but tags and white space is dropped"


@settings(max_examples=100)
@given(thought=st.text(max_size=30), answer=st.text(max_size=30))
def test_what_a_template_writes_is_read_back(thought: str, answer: str) -> None:
    if "think>" in thought + answer:
        return
    trimmed = thought.strip(" \t\r\n"), answer.lstrip(" \t\r\n")
    for start, head in ((Start.OPEN, "<think>\n"), (Start.INSIDE, "")):
        assert split(QWEN, start, list(f"{head}{thought}\n</think>\n\n{answer}")) == trimmed


def test_whether_it_is_reasoning() -> None:
    for start, before in ((Start.OPEN, False), (Start.INSIDE, True)):
        parser = ReasoningParser(QWEN, start)
        assert parser.is_reasoning is before
        parser.push("<think>Hm")
        assert parser.is_reasoning
        parser.push("</think>")
        assert not parser.is_reasoning


@pytest.mark.parametrize(
    ("prompt", "continued", "start"),
    [
        ("<|im_start|>assistant\n", "", Start.OPEN),
        ("<|im_start|>assistant\n<think>\n", "", Start.INSIDE),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", Start.OVER),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\nIt is", "It is", Start.OVER),
        ("<|im_start|>assistant\n<think>Hm", "<think>Hm", Start.INSIDE),
        ("<|im_start|>assistant\n<think>Hm</think>It", "<think>Hm</think>It", Start.OVER),
        ("<|im_start|>user\n<think>x<|im_end|>\n<|im_start|>assistant\n", "", Start.OPEN),
    ],
)
def test_the_prompt_decides_where_an_output_begins(prompt: str, continued: str, start: Start) -> None:
    assert QWEN.start_after(prompt, continued=continued) is start
    assert ASSUMED.start_after(prompt, continued=continued) is (Start.INSIDE if start is Start.OPEN else start)
