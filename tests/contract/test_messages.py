"""`POST /v1/messages` and its count of tokens as Anthropic's own client uses them."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from app.api.deps import ApiLimits
from app.api.key_ring import KeyRing
from app.api.schemas.field_rules import UnknownFields
from app.client.engine_client import EngineState
from tests.contract.serving import MODEL, TEXT, FakeServer, fake_server, message_events_of, wait_until
from tests.contract.test_chat import TEMPLATE, prompt_of
from tests.contract.test_tools import CALLS, TAGGED
from tests.text_tokenizers import byte_level

ROUTE = "/v1/messages"
NUM_TOKENS = len(byte_level().encode_now(TEXT, False))
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"name": "get_weather", "description": "天气", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    {"name": "clock", "input_schema": {"type": "object", "properties": {}}},
]
HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def messages_server() -> Iterator[FakeServer]:
    with fake_server(chat_template=TAGGED, max_model_len=2048) as server:
        yield server


@pytest.fixture
def server(messages_server: FakeServer) -> Iterator[FakeServer]:
    """The module's server, checked to be idle afterwards."""
    say(messages_server, TEXT)
    messages_server.engine.requests.clear()
    yield messages_server
    messages_server.engine.tokens_per_output, messages_server.engine.num_cached_tokens = 1, 0
    wait_until(messages_server.is_idle)


@pytest.fixture
def client(server: FakeServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def say(server: FakeServer, text: str) -> None:
    server.engine.script = tuple(byte_level().encode_now(text, False))


def refusal(server: FakeServer, path: str = ROUTE, **fields: Any) -> dict[str, Any]:
    response = server.post({"messages": HI, "max_tokens": 50} | fields, path)
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


def test_the_client_gets_an_answer(server: FakeServer, client: anthropic.Anthropic) -> None:
    server.engine.num_cached_tokens = 3
    answer = client.messages.create(model=MODEL, max_tokens=200, system="Be kind.", messages=HI)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", MODEL)
    assert answer.id.startswith("msg_") and answer._request_id
    (block,) = answer.content
    assert block.type == "text" and block.text == TEXT
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert prompt_of(server) == "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    num_prompt = len(server.engine.requests[-1].prompt_token_ids)
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (num_prompt - 3, 3)
    assert usage.output_tokens == NUM_TOKENS + 1 and usage.cache_creation_input_tokens == 0
    params = server.engine.requests[-1].params
    assert (params.max_tokens, params.temperature) == (200, 1.0)


def test_fields_reach_the_engine(server: FakeServer, client: anthropic.Anthropic) -> None:
    answer = client.messages.create(
        model=MODEL,
        max_tokens=200,
        messages=HI,
        stop_sequences=["世界", "zz"],
        metadata={"user_id": "me"},
        service_tier="auto",
        thinking={"type": "disabled"},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 7},
    )
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "世界")
    assert answer.content[0].type == "text" and answer.content[0].text == TEXT.partition("世界")[0]
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 7)
    assert client.messages.create(model=MODEL, max_tokens=3, messages=HI).stop_reason == "max_tokens"
    long: list[Any] = [{"role": "user", "content": "x" * 2000}]
    server.engine.script *= 3
    assert client.messages.create(model=MODEL, max_tokens=99, messages=long).stop_reason == (
        "model_context_window_exceeded"
    )


def test_the_stream_helper(server: FakeServer, client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=200, messages=HI) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == TEXT and final.content[0].type == "text" and final.content[0].text == TEXT
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == NUM_TOKENS + 1
    kinds = [event.type for event in client.messages.create(model=MODEL, max_tokens=2, messages=HI, stream=True)]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    server.engine.num_cached_tokens = 2
    events = message_events_of(server.post({"messages": HI, "max_tokens": 2, "stream": True}, ROUTE).text)
    assert [event["type"] for event in events] == [
        *("message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 2 and events[0]["message"]["content"] == []
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 2


async def test_the_asynchronous_client(server: FakeServer) -> None:
    async with anthropic.AsyncAnthropic(
        base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        answer = await client.messages.create(model=MODEL, max_tokens=200, messages=HI)
        assert answer.content[0].type == "text" and answer.content[0].text == TEXT
        async with client.messages.stream(model=MODEL, max_tokens=200, messages=HI) as stream:
            assert "".join([text async for text in stream.text_stream]) == TEXT
        counted = await client.messages.count_tokens(model=MODEL, messages=HI)
        assert counted.input_tokens == len(server.engine.requests[-1].prompt_token_ids)


@pytest.mark.parametrize("tokens_per_output", [1, 5, 1000])
def test_tools_whole_and_streamed(server: FakeServer, client: anthropic.Anthropic, tokens_per_output: int) -> None:
    say(server, CALLS)
    server.engine.tokens_per_output = tokens_per_output
    answer = client.messages.create(model=MODEL, max_tokens=500, messages=HI, tools=TOOLS)
    text, weather, clock = answer.content
    assert text.type == "text" and text.text == "Let me look." and answer.stop_reason == "tool_use"
    assert weather.type == clock.type == "tool_use" and weather.id.startswith("toolu_") and weather.id != clock.id
    assert (weather.name, weather.input, clock.input) == ("get_weather", {"city": "北京 🌍"}, {})
    assert '"parameters": {"type": "object"' in prompt_of(server) and "cache_control" not in prompt_of(server)
    with client.messages.stream(model=MODEL, max_tokens=500, messages=HI, tools=TOOLS) as stream:
        final = stream.get_final_message()
    assert [block.model_dump(exclude={"id"}) for block in final.content] == [
        block.model_dump(exclude={"id"}) for block in answer.content
    ]
    assert final.stop_reason == "tool_use"
    events = message_events_of(
        server.post({"messages": HI, "max_tokens": 500, "tools": TOOLS, "stream": True}, ROUTE).text
    )
    opened = [event["index"] for event in events if event["type"] == "content_block_start"]
    closed = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert opened == closed == [0, 1, 2]


def test_tool_choices(server: FakeServer, client: anthropic.Anthropic) -> None:
    say(server, '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>')

    def grammar_of(choice: Any) -> str | None:
        client.messages.create(model=MODEL, max_tokens=100, messages=HI, tools=TOOLS, tool_choice=choice)
        grammar = server.engine.requests[-1].params.grammar
        return None if grammar is None else grammar.source

    every = grammar_of({"type": "any"})
    assert every is not None and "clock" in every and "get_weather" in every and "{0,7}" in every
    one = grammar_of({"type": "any", "disable_parallel_tool_use": True})
    assert one is not None and "{0,7}" not in one
    named = grammar_of({"type": "tool", "name": "clock"})
    assert named is not None and "get_weather" not in named
    assert grammar_of({"type": "auto"}) is None
    assert grammar_of({"type": "none"}) is None and "get_weather" not in prompt_of(server)


def test_a_call_that_was_cut_is_text_and_no_call(server: FakeServer, client: anthropic.Anthropic) -> None:
    say(server, '<tool_call>\n{"name": "clock", "arguments": {"a": nope}}\n</tool_call>')
    answer = client.messages.create(model=MODEL, max_tokens=100, messages=HI, tools=TOOLS)
    assert answer.stop_reason == "end_turn" and answer.content[0].type == "text"
    assert answer.content[0].text.endswith('"arguments": {"a": nope}')


def test_history_reaches_the_template_as_it_knows_it(server: FakeServer, client: anthropic.Anthropic) -> None:
    history: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "b"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "So."},
                {"type": "tool_use", "id": "1", "name": "clock", "input": {"z": "北"}},
                {"type": "tool_use", "id": "2", "name": "clock", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "noon"},
                {
                    "type": "tool_result",
                    "tool_use_id": "2",
                    "content": [{"type": "text", "text": "no"}],
                    "is_error": True,
                },
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    system: list[Any] = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    client.messages.create(model=MODEL, max_tokens=1, system=system, messages=history)
    head = "<|start|>system\nOne.\nTwo.<|end|>\n<|start|>user\na\nb<|end|>\n"
    call = '<|start|>assistant\nSo.{"z": "北"}{}<|end|>\n'
    results = "<|start|>tool\nnoon<|end|>\n<|start|>tool\nno<|end|>\n"
    assert prompt_of(server) == head + call + results + "<|start|>user\nAnd?<|end|>\n<|start|>assistant\n"
    history[-1]["content"].pop()
    client.messages.create(model=MODEL, max_tokens=1, system=system, messages=history)
    assert prompt_of(server) == head + call + results + "<|start|>assistant\n"


def test_a_final_message_of_the_assistant_is_gone_on_with(server: FakeServer, client: anthropic.Anthropic) -> None:
    later: list[Any] = [*HI, {"role": "system", "content": "Now in French."}]
    client.messages.create(model=MODEL, max_tokens=1, messages=later)
    assert "<|start|>user\nHi<|end|>\n<|start|>system\nNow in French.<|end|>\n" in prompt_of(server)
    prefilled: list[Any] = [*HI, {"role": "assistant", "content": "It is ("}]
    client.messages.create(model=MODEL, max_tokens=1, messages=prefilled)
    assert prompt_of(server) == "<|start|>user\nHi<|end|>\n<|start|>assistant\nIt is ("


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]}, MODEL),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]}, "tool_use"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1",
                                                     "content": [{"type": "image"}]}]}]}, "image"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}]}, "name"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "context"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "any"}, "stop_sequences": ["x"]}, "`stop_sequences`"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"format": {}}}, "response_format"),
        ({"container": "x"}, "container"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_cannot_be_served_is_named(server: FakeServer, fields: dict[str, Any], words: str) -> None:
    assert words in refusal(server, **fields)["message"]
    assert server.engine.requests == []


def test_tokens_are_counted(server: FakeServer, client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=HI, system="Be kind.", tools=TOOLS)
    client.messages.create(model=MODEL, max_tokens=1, messages=HI, system="Be kind.", tools=TOOLS)
    assert counted.input_tokens == len(server.engine.requests[-1].prompt_token_ids)
    path = f"{ROUTE}/count_tokens"
    response = server.post({"messages": HI, "max_tokens": 5, "metadata": {}}, path)
    assert response.headers["headwater-ignored"] == "max_tokens, metadata"
    assert "messages" in refusal(server, path, messages=[])["message"]


def test_errors_have_anthropics_form(server: FakeServer, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nope", max_tokens=1, messages=HI)
    assert missing.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": missing.value.body["error"]["message"]},  # type: ignore[index]
        "request_id": missing.value.request_id,
    }
    with pytest.raises(anthropic.BadRequestError):
        client.messages.count_tokens(model=MODEL, messages=[])
    assert server.http.get(ROUTE).json()["type"] == "error"
    server.engine.fail_at = 3
    try:
        with pytest.raises(anthropic.InternalServerError):
            client.messages.create(model=MODEL, max_tokens=50, messages=HI)
        with (
            pytest.raises(anthropic.APIStatusError, match="not finite"),
            client.messages.stream(model=MODEL, max_tokens=50, messages=HI) as stream,
        ):
            stream.get_final_message()
    finally:
        server.engine.fail_at = None
    server.engine.state = EngineState.RESTARTING
    try:
        response = server.post({"messages": HI, "max_tokens": 1}, ROUTE)
    finally:
        server.engine.state = EngineState.READY
    assert response.status_code == 503 and response.json()["error"]["type"] == "overloaded_error"
    assert response.headers["retry-after"]


def test_keys_unknown_fields_and_a_template_without_tools() -> None:
    key = "0123456789abcdef"
    strict = ApiLimits(unknown_fields=UnknownFields.REFUSE)
    with fake_server(chat_template=TEMPLATE, keys=KeyRing(keys=[key]), limits=strict) as locked:
        for options in ({"api_key": key}, {"auth_token": key}):
            with anthropic.Anthropic(base_url=locked.url, max_retries=0, **options) as client:  # type: ignore[arg-type]
                assert client.messages.create(model=MODEL, max_tokens=1, messages=HI).stop_reason == "max_tokens"
                with pytest.raises(anthropic.BadRequestError, match="zz"):
                    client.messages.create(model=MODEL, max_tokens=1, messages=HI, extra_body={"zz": 1})
                with pytest.raises(anthropic.BadRequestError, match="chat template shows it no tools"):
                    client.messages.create(model=MODEL, max_tokens=1, messages=HI, tools=TOOLS)
        with (
            anthropic.Anthropic(base_url=locked.url, max_retries=0, api_key="wrong") as client,
            pytest.raises(anthropic.AuthenticationError) as refused,
        ):
            client.messages.create(model=MODEL, max_tokens=1, messages=HI)
        assert json.loads(refused.value.response.text)["error"]["type"] == "authentication_error"
