"""Tools on `/v1/chat/completions`: by OpenAI's client, whole and streamed; what is shown, forced and refused."""

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from app.api.deps import ApiLimits
from app.grammar.child import try_grammar
from app.text import ChatTemplate
from tests.contract.serving import MODEL, FakeServer, chunks_of, fake_server, wait_until
from tests.contract.test_chat import ROUTE, SPECIAL, TEMPLATE, USER, prompt_of
from tests.text_tokenizers import byte_level

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "天气", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALLS = (
    'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京 🌍"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
BARE = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
ROME = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
ANSWER = {
    "type": "json_schema",
    "json_schema": {
        "name": "a",
        "schema": {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]},
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SOURCE = (
    "{% if tools %}<|start|>tools <tool_call>\n{% for one in tools %}{{ one | tojson }}\n{% endfor %}<|end|>\n"
    "{% endif %}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TAGGED = ChatTemplate({"default": SOURCE}, special_tokens=SPECIAL)
UNTAGGED = ChatTemplate({"default": SOURCE.replace("<tool_call>", "")}, special_tokens=SPECIAL)


@pytest.fixture(scope="module")
def tools_server() -> Iterator[FakeServer]:
    with fake_server(
        chat_template=TAGGED, max_model_len=4096, limits=ApiLimits(max_body_size=8 * 1024 * 1024)
    ) as server:
        yield server


@pytest.fixture
def tools(tools_server: FakeServer) -> Iterator[FakeServer]:
    """The module's server, checked to be idle afterwards."""
    say(tools_server, CALLS)
    tools_server.engine.requests.clear()
    yield tools_server
    tools_server.engine.tokens_per_output = 1
    wait_until(tools_server.is_idle)


def say(server: FakeServer, text: str) -> None:
    server.engine.script = tuple(byte_level().encode_now(text, False))


def ask(server: FakeServer, **fields: Any) -> dict[str, Any]:
    response = server.post({"messages": USER, "tools": [WEATHER, CLOCK]} | fields, ROUTE)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def calls_of(choice: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["function"]["name"], one["function"]["arguments"]) for one in choice["message"].get("tool_calls", [])]


def test_openai_client_gets_calls(tools: FakeServer) -> None:
    answer = tools.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        tools=[WEATHER, CLOCK],  # type: ignore[list-item]
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    assert choice.message.tool_calls is not None
    for call in choice.message.tool_calls:
        assert call.type == "function" and call.id.startswith("call_")
    first, second = choice.message.tool_calls
    assert first.id != second.id and first.type == second.type == "function"
    assert json.loads(first.function.arguments) == {"city": "北京 🌍"} and second.function.arguments == "{}"
    shown = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in (WEATHER, CLOCK))
    assert prompt_of(tools).startswith(f"<|start|>tools <tool_call>\n{shown}<|end|>\n<|start|>user\nHi")
    assert tools.engine.requests[-1].params.grammar is None


@pytest.mark.parametrize("tokens_per_output", [1, 4, 1000])
@pytest.mark.parametrize("text", [CALLS, BARE, "No call.", '{"answer": 5} ', CALLS + "\n\nDone. "])
@pytest.mark.parametrize("fields", [{}, {"n": 2, "logprobs": True, "return_token_ids": True}, {"max_tokens": 40}])
def test_the_joined_stream_is_the_whole_answer(
    tools: FakeServer, text: str, fields: dict[str, Any], tokens_per_output: int
) -> None:
    say(tools, text)
    is_cut = fields.get("max_tokens", 1000) <= len(tools.engine.script)
    tools.engine.tokens_per_output = tokens_per_output
    body = {"messages": USER, "tools": [WEATHER, CLOCK]} | fields
    whole = tools.post(body, ROUTE).json()
    response = tools.post(body | {"stream": True}, ROUTE)
    chunks = chunks_of(response.text)
    for choice in whole["choices"]:
        parts = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == (choice["message"]["content"] or "")
        calls: list[list[str]] = []
        for delta in [call for part in parts for call in part["delta"].get("tool_calls", [])]:
            if "id" in delta:
                assert delta["index"] == len(calls) and delta["type"] == "function"
                calls.append([delta["function"]["name"], ""])
            calls[delta["index"]][1] += delta["function"]["arguments"]
        assert [tuple(call) for call in calls] == calls_of(choice)
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert choice["finish_reason"] == ("length" if is_cut else "tool_calls" if calls else "stop")
        if "token_ids" in choice:
            assert [item for part in parts[1:] for item in part["token_ids"]] == choice["token_ids"]


class GetWeather(pydantic.BaseModel):
    city: str


def test_openai_stream_helper_parses_arguments(tools: FakeServer) -> None:
    say(tools, CALLS.replace("get_weather", "GetWeather").partition('\n<tool_call>\n{"name": "clock')[0])
    with tools.client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
    ) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == GetWeather(city="北京 🌍")


async def test_the_asynchronous_client_streams_calls(tools: FakeServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{tools.url}/v1", api_key="none", max_retries=0) as client:
        offered: list[Any] = [WEATHER, CLOCK]
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], tools=offered, stream=True
        )
        arguments = ""
        async for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or []:
                arguments += (call.function and call.function.arguments) or ""
    assert arguments == '{"city": "北京 🌍"}{}'


def test_what_is_asked_for_is_what_is_found(tools: FakeServer) -> None:
    none = ask(tools, tool_choice="none")
    assert none["message"]["content"] == CALLS and none["finish_reason"] == "stop"
    assert not prompt_of(tools).startswith("<|start|>tools")
    assert calls_of(ask(tools, parallel_tool_calls=False)) == [("get_weather", '{"city": "北京 🌍"}')]
    assert len(calls_of(ask(tools, tool_choice="auto"))) == 2
    assert "tool_calls" not in ask(tools, tools=[])["message"]
    say(tools, BARE)
    choice = ask(tools)
    assert calls_of(choice) == [("get_weather", '{"city": "Rome"}')] and choice["message"]["content"] is None


@pytest.mark.parametrize(
    ("template", "fields", "accepted", "others"),
    [
        (
            TAGGED,
            {"tool_choice": NAMED},
            [ROME],
            ["{", '<tool_call>\n{"name": "clock"', ROME.replace('"Rome"', "1"), ROME + "\n" + ROME],
        ),
        (
            TAGGED,
            {"tool_choice": "required"},
            [CALLS.partition("\n")[2], NOW, ROME + "\n" + NOW],
            ["Let", NOW.replace("{}", '{"x": 1}'), "\n".join([NOW] * 9)],
        ),
        (TAGGED, {"tool_choice": "required", "parallel_tool_calls": False}, [NOW, ROME], [ROME + "\n" + NOW]),
        (TEMPLATE, {"tool_choice": NAMED}, [ROME.replace("Rome", "x")], [NOW]),
        (TAGGED, {"tool_choice": "required", "response_format": ANSWER}, [ROME], ['{"answer": 5}']),
        (
            TAGGED,
            {"response_format": ANSWER},
            [ROME + "\n" + NOW, '{"answer": 5}'],
            ["Let", '{"answer": "x"}', ROME.replace('"Rome"', "1")],
        ),
        (UNTAGGED, {"tool_choice": "required"}, [BARE, '{"name": "clock", "parameters": {}}'], ["<", BARE + BARE]),
    ],
    ids=["named", "required", "one", "template without tools", "required and a form", "auto and a form", "bare"],
)
def test_forced_calls_are_held_to_the_schemas(
    template: ChatTemplate, fields: dict[str, Any], accepted: list[str], others: list[str]
) -> None:
    from llguidance import LLTokenizer

    from app.grammar.compiler import compile_grammar

    with fake_server(chat_template=template, max_model_len=4096) as server:
        say(server, accepted[0])
        choice = ask(server, **fields)
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert all(json.loads(arguments) is not None for _, arguments in calls_of(choice))
        grammar = server.engine.requests[-1].params.grammar
    assert grammar is not None and try_grammar(grammar).grammar == grammar
    for text in accepted:
        matcher = compile_grammar(grammar, LLTokenizer("byte"))
        assert all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()
    for text in others:
        matcher = compile_grammar(grammar, LLTokenizer("byte"))
        assert not all(matcher.consume_token(byte) for byte in text.encode()), text


def test_a_schema_without_a_type_is_of_an_object(tools: FakeServer) -> None:
    for parameters in ({"properties": {"a": {"const": 1}}}, {}):
        ask(tools, tools=[function(parameters=parameters)], tool_choice="required")
        grammar = tools.engine.requests[-1].params.grammar
        assert grammar is not None
        (line,) = [line for line in grammar.source.splitlines() if line.startswith("json_0")]
        assert json.loads(line.partition("%json ")[2])["type"] == "object"


def test_history_with_calls_goes_back_to_the_template(tools: FakeServer) -> None:
    choice = ask(tools)
    calls = choice["message"]["tool_calls"]
    calls[1]["function"]["arguments"] = '{"broken'
    messages = [
        *USER,
        choice["message"],
        *({"role": "tool", "tool_call_id": one["id"], "content": "5°"} for one in calls),
    ]
    say(tools, "It is 5°.")
    assert ask(tools, messages=messages)["message"]["content"] == "It is 5°."
    assert (
        '<|start|>assistant\nLet me look.{"city": "北京 🌍"}"{\\"broken"<|end|>\n'
        "<|start|>tool\n5°<|end|>\n<|start|>tool\n5°<|end|>\n" in prompt_of(tools)
    )


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | fields}


def bomb(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"type": ["object", "null"]})]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters=[1])]}, "tools[0].function.parameters"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": [function(name="clock\n")]}, "tools[0].function.name"),
        ({"tools": [function(), function()]}, "tools[1]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [function(name=f"f{index}") for index in range(200)]}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tools": [function(description="x" * 5_000_000)]}, "tools"),
        ({"tools": [function(description="x" * 5_000_000)], "tool_choice": "required"}, "tools"),
        ({"tools": [function(parameters=bomb(80))], "tool_choice": "required"}, "tools"),
        (
            {"tools": [function(parameters={"properties": {"a": {"pattern": "(("}}})], "tool_choice": "required"},
            "tools",
        ),
        (
            {"tools": [function(parameters={"properties": {"a": {"uniqueItems": True}}})], "tool_choice": "required"},
            "tools",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice.type"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"structured_outputs": {"regex": "a"}, "tool_choice": "required"}, "structured_outputs"),
        ({"tool_choice": "required", "stop": "x"}, "stop"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_served_is_refused_at_once(tools: FakeServer, fields: dict[str, Any], param: str) -> None:
    began = time.monotonic()
    response = tools.post({"messages": USER, "tools": [WEATHER]} | fields, ROUTE)
    elapsed = time.monotonic() - began
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert tools.engine.requests == [] and elapsed < 5


def test_a_form_of_the_answer_beside_tools_that_may_be_called(tools: FakeServer) -> None:
    answer = '{"name": "clock", "arguments": {}}'
    say(tools, answer)
    choice = ask(tools, response_format={"type": "json_object"})
    assert choice["message"] == {"role": "assistant", "content": answer, "refusal": None}
    assert choice["finish_reason"] == "stop"
    say(tools, NOW)
    assert calls_of(ask(tools, response_format={"type": "json_object"})) == [("clock", "{}")]
    with fake_server(chat_template=UNTAGGED, max_model_len=4096) as server:
        body = {"messages": USER, "tools": [WEATHER], "response_format": {"type": "json_object"}}
        assert server.post(body, ROUTE).json()["error"]["param"] == "response_format"


def test_a_template_that_reads_no_tools_says_what_to_do() -> None:
    with fake_server(chat_template=TEMPLATE, max_model_len=4096) as server:
        response = server.post({"messages": USER, "tools": [WEATHER]}, ROUTE)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "tools_not_supported" and "required" in error["message"]
        assert server.post({"messages": USER, "tools": [WEATHER], "tool_choice": "none"}, ROUTE).status_code == 200
