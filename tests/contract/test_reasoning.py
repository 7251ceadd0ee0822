"""Reasoning told from answers, by the real clients: on chat, on Anthropic's messages, on responses."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from app.api.reasoning import ReasoningPlan, plan_reasoning
from app.core.errors import InvalidRequest
from app.grammar import source
from app.main import choose_reasoning
from app.text import ChatTemplate
from app.text.reasoning import FORMS, ReasoningForm, Start
from tests.contract.serving import MODEL, FakeServer, chunks_of, fake_server, message_events_of, wait_until
from tests.contract.test_chat import SPECIAL, TEMPLATE, prompt_of
from tests.text_tokenizers import byte_level

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
THOUGHT, ANSWER = "The user says 你好.\nSo do I < 🌍.", "你好！"
SAID = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
HI: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SOURCE = (
    "{% if tools %}<tool_call>{% endif %}{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
THINKS = ChatTemplate({"default": SOURCE}, special_tokens=SPECIAL)
SIZES = pytest.mark.parametrize("tokens_per_output", [1, 3, 1000])


def count(text: str) -> int:
    return len(byte_level().encode_now(text, False))


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[FakeServer]:
    with fake_server(chat_template=THINKS, reasoning=FORMS["qwen3"], max_model_len=2048) as server:
        yield server


@pytest.fixture
def server(thinking_server: FakeServer) -> Iterator[FakeServer]:
    """The module's server, checked to be idle afterwards."""
    say(thinking_server, SAID)
    thinking_server.engine.requests.clear()
    yield thinking_server
    thinking_server.engine.tokens_per_output = 1
    wait_until(thinking_server.is_idle)


def say(server: FakeServer, text: str) -> None:
    server.engine.script = tuple(byte_level().encode_now(text, False))


def ask(server: FakeServer, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    said = {"input": "Hi"} if path == RESPONSES else {"messages": HI}
    response = server.post(said | ({"max_tokens": 500} if path == MESSAGES else {}) | fields, path)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def joined(chunks: list[dict[str, Any]], field: str) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(field) or "" for delta in deltas)


@SIZES
def test_chat_whole_and_streamed(server: FakeServer, tokens_per_output: int) -> None:
    server.engine.tokens_per_output = tokens_per_output
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", _strict_response_validation=True)
    answer = client.chat.completions.create(model=MODEL, messages=HI)
    message = answer.choices[0].message
    assert message.content == ANSWER and answer.choices[0].finish_reason == "stop"
    assert message.reasoning_content == message.reasoning == THOUGHT  # type: ignore[attr-defined]
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens == count(SAID) + 1
    num_reasoning = answer.usage.completion_tokens_details.reasoning_tokens
    assert num_reasoning == count(SAID.partition("</think>")[0] + "</think>")
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of(server.post(body, CHAT).text)
    assert joined(chunks, "reasoning_content") == joined(chunks, "reasoning") == THOUGHT
    assert joined(chunks, "content") == ANSWER
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_reasoning}
    client.close()


@SIZES
def test_a_call_behind_reasoning(server: FakeServer, tokens_per_output: int) -> None:
    say(server, f"<think>\nI need f, {CALL[:30]} maybe.\n</think>\n\n{CALL}")
    server.engine.tokens_per_output = tokens_per_output
    message = ask(server, tools=[TOOL])["choices"][0]["message"]
    assert message["reasoning"] == f"I need f, {CALL[:30]} maybe." and message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    chunks = chunks_of(server.post({"messages": HI, "tools": [TOOL], "stream": True}, CHAT).text)
    assert joined(chunks, "reasoning") == message["reasoning"] and joined(chunks, "content") == ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_answer_without_reasoning_and_one_that_is_cut_in_it(server: FakeServer) -> None:
    say(server, "Yes.")
    answer = ask(server)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    say(server, "<think>Is 1 <")
    assert ask(server)["choices"][0]["message"]["reasoning"] == "Is 1 <"
    say(server, SAID)
    cut = ask(server, max_tokens=12)
    assert cut["choices"][0]["message"]["content"] == "" and cut["choices"][0]["finish_reason"] == "length"
    assert THOUGHT.startswith(cut["choices"][0]["message"]["reasoning"])
    assert cut["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}


def test_several_answers_are_split_each(server: FakeServer) -> None:
    choices = ask(server, n=3)["choices"]
    assert [choice["message"]["reasoning"] for choice in choices] == [THOUGHT] * 3
    assert [choice["message"]["content"] for choice in choices] == [ANSWER] * 3


def test_switches(server: FakeServer) -> None:
    assert "reasoning" not in ask(server, include_reasoning=False)["choices"][0]["message"]
    hidden = chunks_of(server.post({"messages": HI, "include_reasoning": False, "stream": True}, CHAT).text)
    assert joined(hidden, "reasoning") == "" and joined(hidden, "content") == ANSWER
    whole = ask(server, separate_reasoning=False)
    assert whole["choices"][0]["message"]["content"] == SAID and "completion_tokens_details" not in whole["usage"]
    for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        answer = ask(server, **fields)
        assert prompt_of(server).endswith("<think>\n\n</think>\n\n")
        assert answer["choices"][0]["message"]["content"] == SAID, "the prompt closed the reasoning: this is the answer"
    completion = server.complete(max_tokens=500)
    assert completion["choices"][0]["text"] == SAID


def test_a_message_that_is_gone_on_with(server: FakeServer) -> None:
    def message(content: str) -> dict[str, Any]:
        history = [*HI, {"role": "assistant", "content": content}]
        found: dict[str, Any] = ask(server, messages=history, continue_final_message=True)["choices"][0]["message"]
        return found

    say(server, "so.</think>Yes.")
    inside = message("<think>Hm, ")
    assert (inside["reasoning"], inside["content"]) == ("so.", "Yes.")
    assert message("It is")["content"] == "so.</think>Yes."


def test_stop_strings_end_reasoning_too(server: FakeServer) -> None:
    answer = ask(server, stop="So do")
    assert answer["choices"][0]["message"]["reasoning"] == "The user says 你好."
    assert answer["choices"][0]["message"]["content"] == "" and answer["choices"][0]["stop_reason"] == "So do"
    assert ask(server, stop="好！")["choices"][0]["message"]["content"] == "你"


def test_a_stream_goes_on_in_the_middle_of_reasoning(server: FakeServer) -> None:
    body = {"messages": HI, "stream": True, "seed": 5, "stream_options": {"resumable": True}}

    def said(**headers: str) -> list[tuple[str, str, str]]:
        """The cursor of each event, its reasoning and its text."""
        response = server.post(body, CHAT, **headers)
        assert response.status_code == 200, response.text
        events = [event.removeprefix("id: ").split("\ndata: ") for event in response.text.split("\n\n") if event]
        deltas = [(at, json.loads(data)["choices"][0]["delta"]) for at, data in events if data != "[DONE]"]
        return [(at, delta.get("reasoning", ""), delta.get("content", "")) for at, delta in deltas]

    whole = said()
    for count in (1, 5, len(whole) // 2, len(whole) - 3):
        both = whole[:count] + said(**{"last-event-id": whole[count - 1][0]})
        assert "".join(reasoning for _, reasoning, _ in both) == THOUGHT
        assert "".join(text for _, _, text in both) == ANSWER


def test_log_probabilities_are_of_all_tokens(server: FakeServer) -> None:
    answer = ask(server, logprobs=True)
    assert len(answer["choices"][0]["logprobs"]["content"]) == answer["usage"]["completion_tokens"]


@SIZES
def test_messages_have_thinking_blocks(server: FakeServer, tokens_per_output: int) -> None:
    say(server, f"<think>\n{THOUGHT}\n</think>\n\nLet me see.\n{CALL}")
    server.engine.tokens_per_output = tokens_per_output
    tools: list[Any] = [{"name": "f", "input_schema": {"type": "object"}}]
    with anthropic.Anthropic(base_url=server.url, api_key="none", _strict_response_validation=True) as client:
        answer = client.messages.create(model=MODEL, max_tokens=500, messages=HI, tools=tools)
        with client.messages.stream(model=MODEL, max_tokens=500, messages=HI, tools=tools) as stream:
            final = stream.get_final_message()
    for message in (answer, final):
        thinking, text, call = message.content
        assert thinking.type == "thinking" and thinking.thinking == THOUGHT
        assert text.type == "text" and text.text == "Let me see." and call.type == "tool_use"
    assert final.stop_reason == "tool_use"


def test_thinking_can_be_asked_for_and_switched_off(server: FakeServer) -> None:
    off = {"thinking": {"type": "disabled"}}
    assert [block["type"] for block in ask(server, MESSAGES)["content"]] == ["thinking", "text"]
    assert [block["type"] for block in ask(server, MESSAGES, **off)["content"]] == ["text"]
    assert prompt_of(server).endswith("</think>\n\n")
    on = server.post(
        {"messages": HI, "max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 1024}}, MESSAGES
    )
    assert on.status_code == 200 and on.headers["headwater-ignored"] == "thinking.budget_tokens"
    assert prompt_of(server).endswith("assistant\n")
    counted = [
        server.post({"messages": HI} | fields, f"{MESSAGES}/count_tokens").json()["input_tokens"]
        for fields in ({}, off)
    ]
    assert counted[1] > counted[0]


@SIZES
def test_responses_have_a_reasoning_item(server: FakeServer, tokens_per_output: int) -> None:
    server.engine.tokens_per_output = tokens_per_output
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", _strict_response_validation=True) as client:
        answer = client.responses.create(model=MODEL, input="Hi")
        with client.responses.stream(model=MODEL, input="Hi") as stream:
            told = "".join(event.delta for event in stream if event.type == "response.reasoning_text.delta")
            final = stream.get_final_response()
        for response in (answer, final):
            reasoning, message = response.output
            assert reasoning.type == "reasoning" and reasoning.content is not None and reasoning.id.startswith("rs_")
            assert [part.text for part in reasoning.content] == [THOUGHT] and reasoning.status == "completed"
            assert message.type == "message" and response.output_text == ANSWER
            assert response.usage is not None
            assert response.usage.output_tokens_details.reasoning_tokens == count(SAID.partition("\n\n你")[0])
        assert told == THOUGHT
        client.responses.create(model=MODEL, input="And?", previous_response_id=answer.id)
    assert f"<|start|>assistant\n<think>{THOUGHT}</think>{ANSWER}<|end|>" in prompt_of(server)
    ask(server, RESPONSES, reasoning={"effort": "none"})
    assert prompt_of(server).endswith("</think>\n\n")


def test_the_events_of_a_reasoning_item(server: FakeServer) -> None:
    server.engine.tokens_per_output = 1000
    events = message_events_of(server.post({"input": "Hi", "stream": True}, RESPONSES).text)
    names = [event["type"].removeprefix("response.") for event in events]
    assert names == [
        *("created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["output_index"] for event in events if event["type"].endswith("item.done")] == [0, 1]


def test_without_a_known_form_all_is_the_answer() -> None:
    with fake_server(chat_template=THINKS, text=SAID, max_model_len=512) as plain:
        assert ask(plain)["choices"][0]["message"]["content"] == SAID
        assert [block["type"] for block in ask(plain, MESSAGES)["content"]] == ["text"]
        refused = plain.post({"messages": HI, "max_tokens": 9, "thinking": {"type": "enabled"}}, MESSAGES)
        assert refused.status_code == 400 and "--reasoning-parser" in refused.text


def test_the_parser_is_chosen_by_flag_or_template() -> None:
    assert choose_reasoning("auto", THINKS) == FORMS["qwen3"] == choose_reasoning("qwen3", None)
    assert choose_reasoning("auto", TEMPLATE) is None is choose_reasoning("auto", None)
    assert choose_reasoning("none", THINKS) is None and choose_reasoning("deepseek_r1", TEMPLATE) is not None


def test_tags_that_are_control_tokens_are_found(server: FakeServer) -> None:
    context = dataclasses.replace(server.context, reasoning=ReasoningForm("<|start|>", "</none>"))
    plan = plan_reasoning(context, "x")
    assert plan is not None and plan.hidden_tags == {0: "<|start|>"} and plan.closing_id is None
    for shown in (plan_reasoning(context, "x", shows_special=True), plan_reasoning(context, "x", is_split=False)):
        assert shown is not None and shown.hidden_tags == {}


def test_a_form_waits_for_the_end_of_reasoning() -> None:
    grammar = source.choice(["a"])

    def behind(start: Start, opening: int | None = 5, closing: int | None = 6) -> tuple[int | None, int | None]:
        plan = ReasoningPlan(FORMS["qwen3"], start, opening_id=opening, closing_id=closing)
        found = plan.behind_reasoning(grammar, field="response_format")
        return found.after, found.opened_by

    assert behind(Start.INSIDE) == (6, None) and behind(Start.OPEN) == (6, 5) and behind(Start.OVER) == (None, None)
    assert behind(Start.OPEN, opening=None) == behind(Start.OPEN, closing=None) == (None, None)
    with pytest.raises(InvalidRequest) as refused:
        behind(Start.INSIDE, closing=None)
    assert refused.value.param == "response_format"
