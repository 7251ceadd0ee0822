"""Stop strings, characters and counts of one sequence, however the engine groups its tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.reasoning import ReasoningPlan
from app.api.schemas.completions import CompletionRequest
from app.api.sequence_text import Delta, SequenceText
from app.api.tools import ToolPlan, ToolText
from app.api.translate import PreparedPrompt, PreparedSequence
from app.core.errors import EngineFailed, EngineUnavailable, InvalidRequest
from app.core.types import EngineOutput, EngineRequest, FinishReason, SamplingParams
from app.text.reasoning import FORMS, ReasoningForm, Start
from tests.text_tokenizers import byte_level

TEXT = "ab你好 🌍🚀 naïve 世界 end"
IDS = tuple(byte_level().encode_now(TEXT, False))
END = 1


def make(request: CompletionRequest, min_tokens: int = 0, *, reasoning: ReasoningPlan | None = None) -> SequenceText:
    params = SamplingParams(seed=1, max_tokens=1000, min_tokens=min_tokens)
    engine_request = EngineRequest(request_id="r", prompt_token_ids=(5,), params=params)
    sequence = PreparedSequence(0, 0, PreparedPrompt((5,), "x"), engine_request)
    return SequenceText(sequence, request, byte_level(), eos_token_ids=(END,), reasoning=reasoning)


def run(text: SequenceText, sizes: list[int], ids: tuple[int, ...] = (*IDS, END)) -> list[Delta]:
    """Feed `ids` in groups of the given sizes, over and over; the last token ends the sequence."""
    deltas: list[Delta] = []
    start, turn = 0, 0
    while start < len(ids):
        end = min(len(ids), start + sizes[turn % len(sizes)])
        reason = FinishReason.STOP if end == len(ids) else None
        delta = text.feed(EngineOutput("r", ids[start:end], finish_reason=reason))
        assert delta is not None
        deltas.append(delta)
        if delta.finish_reason is not None:
            break
        start, turn = end, turn + 1
    return deltas


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    stops=st.lists(
        st.tuples(st.integers(0, len(TEXT) - 1), st.integers(1, 6)).map(lambda cut: TEXT[cut[0] : cut[0] + cut[1]]),
        max_size=3,
    ),
    include=st.booleans(),
    min_tokens=st.integers(0, 8),
)
def test_grouping_changes_nothing(sizes: list[int], stops: list[str], include: bool, min_tokens: int) -> None:
    request = CompletionRequest(prompt="x", stop=list(stops), include_stop_str_in_output=include)
    one, other = make(request, min_tokens), make(request, min_tokens)
    single, grouped = run(one, [1]), run(other, sizes)
    assert "".join(delta.text for delta in single) == "".join(delta.text for delta in grouped)
    assert [i for delta in single for i in delta.token_ids] == [i for delta in grouped for i in delta.token_ids]
    assert one.num_output_tokens == other.num_output_tokens == sum(len(delta.token_ids) for delta in grouped)
    assert (single[-1].finish_reason, single[-1].stop_reason) == (grouped[-1].finish_reason, grouped[-1].stop_reason)
    if stops and not min_tokens and not include:
        text = "".join(delta.text for delta in single)
        assert not any(stop in text for stop in stops)


ARGUMENTS = '{"a": "é 🚀"}'
SAID = (
    "<think>\nHm, 世界 < 🌍: <tool_call>.\n</think>\n\nSo 好.\n"
    f'<tool_call>{{"name": "f", "arguments": {ARGUMENTS}}}</tool_call>'
)
SAID_IDS = tuple(byte_level().encode_now(SAID, False))


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    stops=st.lists(
        st.tuples(st.integers(0, len(SAID) - 1), st.integers(1, 6)).map(lambda cut: SAID[cut[0] : cut[0] + cut[1]]),
        max_size=2,
    ),
    start=st.sampled_from([Start.OPEN, Start.INSIDE]),
)
def test_grouping_changes_nothing_with_reasoning_and_calls(sizes: list[int], stops: list[str], start: Start) -> None:
    request = CompletionRequest(prompt="x", stop=list(stops))

    def read(sizes: list[int]) -> tuple[object, ...]:
        text = make(request, reasoning=ReasoningPlan(FORMS["qwen3"], start, opening_id=None, closing_id=None))
        deltas = run(text, sizes, (*SAID_IDS, END))
        tools = ToolText(ToolPlan(frozenset({"f"}), single=False, grammar=None), id_key="same")
        reasoning = "".join(delta.reasoning for delta in deltas)
        last = deltas[-1]
        answer, calls = tools.whole(deltas)
        told = [(call.name, call.arguments) for call in calls]
        return reasoning, answer, told, text.num_output_tokens, text.num_reasoning_tokens, last.stop_reason

    whole = read([1000])
    assert read(sizes) == read([1]) == whole
    if not stops:
        end = len(byte_level().encode_now(SAID.partition("</think>")[0] + "</think>", False))
        assert whole[:3] == ("Hm, 世界 < 🌍: <tool_call>.", "So 好.", [("f", ARGUMENTS)])
        assert whole[3:5] == (len(SAID_IDS) + 1, end)


def test_tags_that_are_control_tokens_are_seen() -> None:
    """`<|start|>`, which is left out of texts, stands for the end of reasoning."""
    ids = (*byte_level().encode_now("Hm", False), 0, *byte_level().encode_now("So", False))
    form = ReasoningForm("<|end|>", "<|start|>")
    plan = ReasoningPlan(form, Start.INSIDE, opening_id=1, closing_id=0, hidden_tags={0: "<|start|>"})
    deltas = run(make(CompletionRequest(prompt="x"), reasoning=plan), [2], (*ids, END))
    assert ["".join(parts) for parts in zip(*((d.reasoning, d.text) for d in deltas), strict=True)] == ["Hm", "So"]


def test_a_chunk_of_prefill_brings_nothing() -> None:
    assert make(CompletionRequest(prompt="x")).feed(EngineOutput("r")) is None


def test_a_sequence_that_only_scores_ends_without_tokens() -> None:
    text = make(CompletionRequest(prompt="x"))
    delta = text.feed(EngineOutput("r", finish_reason=FinishReason.LENGTH))
    assert delta == Delta("", (), (), FinishReason.LENGTH, None)


def test_a_cut_character_is_shown_as_lost_at_the_end() -> None:
    ids = byte_level().encode_now("a世", False)
    for stop in (None, "zz"):
        text = make(CompletionRequest(prompt="x", stop=stop))
        first = text.feed(EngineOutput("r", tuple(ids[:2])))
        last = text.feed(EngineOutput("r", (), finish_reason=FinishReason.LENGTH))
        assert first is not None and last is not None and first.text + last.text == "a\ufffd"


def test_a_held_start_of_a_stop_string_is_released_at_the_end() -> None:
    text = make(CompletionRequest(prompt="x", stop="end of all"))
    deltas = run(text, [1])
    assert "".join(delta.text for delta in deltas) == TEXT and deltas[-1].text == " end".lstrip()


@pytest.mark.parametrize(
    ("reason", "error"), [(FinishReason.ERROR, EngineFailed), (FinishReason.ABORT, EngineUnavailable)]
)
def test_what_the_engine_gave_up_is_raised(reason: FinishReason, error: type[Exception]) -> None:
    with pytest.raises(error):
        make(CompletionRequest(prompt="x")).feed(EngineOutput("r", finish_reason=reason, error="why."))


def test_what_the_requests_own_parameters_brought_about_is_its_fault() -> None:
    output = EngineOutput("r", finish_reason=FinishReason.ERROR, error="nothing is left", is_request_fault=True)
    with pytest.raises(InvalidRequest, match=r"^Nothing is left\.$"):
        make(CompletionRequest(prompt="x")).feed(output)


def test_the_token_that_ends_a_grammar_is_text() -> None:
    """Where the grammar allows nothing more, the sequence ends without an EOS, perhaps without any token."""
    ended = make(CompletionRequest(prompt="x"))
    assert "".join(delta.text for delta in run(ended, [2], IDS)) == TEXT
    assert ended.num_output_tokens == len(IDS)
    empty = make(CompletionRequest(prompt="x"))
    delta = empty.feed(EngineOutput("r", (), finish_reason=FinishReason.STOP))
    assert delta is not None and (delta.text, delta.finish_reason) == ("", FinishReason.STOP)


@pytest.mark.parametrize("sizes", [[1], [2], [100]])
@pytest.mark.parametrize(
    ("stop", "min_tokens", "expected"),
    [("c d", 3, "ab"), ("c d", 5, "abc de"), ("b", 2, "abc de"), ("bc", 2, "a"), ("e", 5, "abc d"), ("e", 6, "abc de")],
)
def test_a_stop_string_ends_behind_min_tokens(sizes: list[int], stop: str, min_tokens: int, expected: str) -> None:
    """Where it begins does not matter: it is held back from its first character on."""
    ids = tuple(byte_level().encode_now(char, False)[0] for char in "abc de")
    deltas = run(make(CompletionRequest(prompt="x", stop=stop), min_tokens), sizes, (*ids, END))
    assert "".join(delta.text for delta in deltas) == expected
