"""`POST /v1/responses` as OpenAI's own client uses it: whole and streamed, with tools, forms and log-probabilities."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage

from app.api.key_ring import KeyRing
from app.api.responses_store import ResponseStore
from app.client.engine_client import EngineState
from tests.contract.serving import MODEL, TEXT, FakeServer, fake_server, message_events_of, wait_until
from tests.contract.test_chat import TEMPLATE, prompt_of
from tests.contract.test_tools import CALLS, TAGGED
from tests.text_tokenizers import byte_level

ROUTE = "/v1/responses"
NUM_TOKENS = len(byte_level().encode_now(TEXT, False))
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "description": "天气", "parameters": SCHEMA, "strict": True},
    {"type": "function", "name": "clock", "parameters": None, "strict": None},
]
CALL = {"call_id": "c1", "name": "clock", "arguments": '{"z": "北"}', "type": "function_call"}


@pytest.fixture(scope="module")
def responses_server() -> Iterator[FakeServer]:
    with fake_server(chat_template=TAGGED, max_model_len=2048) as server:
        yield server


@pytest.fixture
def server(responses_server: FakeServer) -> Iterator[FakeServer]:
    """The module's server, checked to be idle afterwards."""
    say(responses_server, TEXT)
    responses_server.engine.requests.clear()
    yield responses_server
    responses_server.engine.tokens_per_output, responses_server.engine.num_cached_tokens = 1, 0
    wait_until(responses_server.is_idle)


@pytest.fixture
def client(server: FakeServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def say(server: FakeServer, text: str) -> None:
    server.engine.script = tuple(byte_level().encode_now(text, False))


def refusal(server: FakeServer, **fields: Any) -> dict[str, Any]:
    response = server.post({"input": "Hi"} | fields, ROUTE)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def events(server: FakeServer, **fields: Any) -> list[dict[str, Any]]:
    response = server.post({"input": "Hi", "stream": True} | fields, ROUTE)
    assert response.status_code == 200, response.text
    found = message_events_of(response.text)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(response: dict[str, Any]) -> list[dict[str, Any]]:
    """The output items without what is drawn for each."""
    return [{name: value for name, value in item.items() if not name.endswith("id")} for item in response["output"]]


def test_an_answer(server: FakeServer, client: openai.OpenAI) -> None:
    server.engine.num_cached_tokens = 3
    answer = client.responses.create(
        model=MODEL, input="Hi", instructions="Be kind.", metadata={"a": "b"}, max_output_tokens=200, temperature=0.5
    )
    assert (answer.object, answer.status, answer.model, answer.error) == ("response", "completed", MODEL, None)
    assert answer.id.startswith("resp_") and answer.output_text == TEXT
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage) and message.id.startswith("msg_")
    assert (message.role, message.status, len(message.content)) == ("assistant", "completed", 1)
    assert prompt_of(server) == "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Be kind.", {"a": "b"}, 0.5)
    assert (answer.max_output_tokens, answer.incomplete_details, answer.previous_response_id) == (200, None, None)
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(server.engine.requests[-1].prompt_token_ids)
    assert answer.usage.input_tokens_details.cached_tokens == 3
    assert answer.usage.output_tokens == NUM_TOKENS + 1
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert server.engine.requests[-1].params.max_tokens == 200


def test_the_events_of_a_stream(server: FakeServer) -> None:
    server.engine.tokens_per_output = 1000
    found = events(server)
    assert [event["type"] for event in found] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.delta", "response.output_text.done", "response.content_part.done"),
        *("response.output_item.done", "response.completed"),
    ]
    begun, whole = found[0]["response"], found[-1]["response"]
    assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
    assert found[2]["item"]["content"] == [] and found[2]["item"]["status"] == "in_progress"
    assert found[-2]["item"] == whole["output"][0] and whole["output"][0]["status"] == "completed"
    assert whole["id"] == begun["id"] and whole["output"][0]["content"][0]["text"] == TEXT
    assert {event["item_id"] for event in found if "item_id" in event} == {found[2]["item"]["id"]}


@pytest.mark.parametrize("tokens_per_output", [1, 5, 1000])
def test_the_stream_helper(server: FakeServer, client: openai.OpenAI, tokens_per_output: int) -> None:
    say(server, CALLS)
    server.engine.tokens_per_output = tokens_per_output
    whole = client.responses.create(model=MODEL, input="Hi", tools=TOOLS)
    with client.responses.stream(model=MODEL, input="Hi", tools=TOOLS) as stream:
        snapshot = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    posted = server.post({"input": "Hi", "tools": TOOLS}, ROUTE).json()
    assert without_ids(posted) == without_ids(events(server, tools=TOOLS)[-1]["response"])
    message, weather, clock = final.output
    assert message.type == "message" and whole.output_text == "Let me look."
    assert isinstance(weather, ResponseFunctionToolCall) and isinstance(clock, ResponseFunctionToolCall)
    assert (weather.name, json.loads(weather.arguments)) == ("get_weather", {"city": "北京 🌍"})
    assert (clock.name, clock.arguments, clock.status) == ("clock", "{}", "completed")
    assert snapshot[-1] == "{}" and weather.call_id != clock.call_id and weather.call_id.startswith("call_")
    assert weather.id != clock.id and weather.parsed_arguments == {"city": "北京 🌍"}
    deltas = [event.type for event in client.responses.create(model=MODEL, input="Hi", stream=True)]
    assert deltas[0] == "response.created" and deltas[-1] == "response.completed"


async def test_the_asynchronous_client(server: FakeServer) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        answer = await client.responses.create(model=MODEL, input="Hi")
        assert answer.output_text == TEXT
        async with client.responses.stream(model=MODEL, input="Hi") as stream:
            text = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert "".join(text) == TEXT == final.output_text
        assert (await client.responses.retrieve(final.id)).output_text == TEXT
        await client.responses.delete(final.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(final.id)


def test_an_answer_that_is_cut(server: FakeServer, client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Hi", max_output_tokens=3)
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens" and answer.completed_at is None
    assert isinstance(answer.output[0], ResponseOutputMessage) and answer.output[0].status == "incomplete"
    found = events(server, max_output_tokens=3)
    assert found[-1]["type"] == "response.incomplete" and found[-2]["item"]["status"] == "incomplete"
    say(server, CALLS)
    cut = client.responses.create(model=MODEL, input="Hi", tools=TOOLS, max_output_tokens=75)
    assert [getattr(item, "status", None) for item in cut.output] == ["completed", "incomplete"]


def test_a_schema_and_the_parse_helper(server: FakeServer, client: openai.OpenAI) -> None:
    class City(pydantic.BaseModel):
        city: str

    say(server, '{"city": "北京"}')
    answer = client.responses.parse(model=MODEL, input="Where?", text_format=City)
    assert answer.output_parsed == City(city="北京")
    grammar = server.engine.requests[-1].params.grammar
    assert grammar is not None and '"city"' in grammar.source
    assert answer.text is not None and answer.text.format is not None and answer.text.format.type == "json_schema"
    with client.responses.stream(model=MODEL, input="Where?", text_format=City) as stream:
        assert stream.get_final_response().output_parsed == City(city="北京")
    client.responses.create(model=MODEL, input="Hi", text={"format": {"type": "json_object"}})
    assert server.engine.requests[-1].params.grammar is not None
    client.responses.create(model=MODEL, input="Hi", text={"format": {"type": "text"}, "verbosity": "medium"})
    assert server.engine.requests[-1].params.grammar is None


def test_tool_choices(server: FakeServer, client: openai.OpenAI) -> None:
    say(server, '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>')

    def grammar_of(choice: Any, **fields: Any) -> str | None:
        answer = client.responses.create(model=MODEL, input="Hi", tools=TOOLS, tool_choice=choice, **fields)
        assert answer.tool_choice == choice or answer.tool_choice.type == "function"
        assert [tool.name for tool in answer.tools] == ["get_weather", "clock"]
        grammar = server.engine.requests[-1].params.grammar
        return None if grammar is None else grammar.source

    every = grammar_of("required")
    assert every is not None and "clock" in every and "get_weather" in every and "{0,7}" in every
    single = grammar_of("required", parallel_tool_calls=False)
    assert single is not None and "{0,7}" not in single
    named = grammar_of({"type": "function", "name": "clock"})
    assert named is not None and "get_weather" not in named
    assert grammar_of("auto") is None
    assert '"parameters": {"type": "object"' in prompt_of(server)
    assert grammar_of("none") is None and "get_weather" not in prompt_of(server)


def test_items_reach_the_template_as_it_knows_them(server: FakeServer, client: openai.OpenAI) -> None:
    history: list[Any] = [
        {"role": "developer", "content": "Rules."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "So.", "annotations": []}],
        },
        CALL,
        {**CALL, "call_id": "c2", "arguments": "nope"},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "no"}]},
        {"role": "assistant", "content": "It is noon."},
        {"role": "user", "content": "And?"},
    ]
    client.responses.create(model=MODEL, input=history, max_output_tokens=1)
    assert prompt_of(server) == (
        "<|start|>system\nRules.<|end|>\n<|start|>user\na\nb<|end|>\n"
        '<|start|>assistant\nSo.{"z": "北"}"nope"<|end|>\n<|start|>tool\nnoon<|end|>\n<|start|>tool\nno<|end|>\n'
        "<|start|>assistant\nIt is noon.<|end|>\n<|start|>user\nAnd?<|end|>\n<|start|>assistant\n"
    )


def test_fields_reach_the_engine_and_the_header(server: FakeServer) -> None:
    fields = {"top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    more = {"repetition_penalty": 1.5, "priority": 3, "cache_salt": "s", "logit_bias": {"7": 1.5}, "stop": "世界"}
    labels = {"user": "me", "service_tier": "auto", "background": False, "truncation": "disabled", "zz": 1}
    effort = {"reasoning": {"effort": "low", "summary": "auto"}, "include": ["reasoning.encrypted_content"]}
    response = server.post({"input": "Hi"} | fields | more | labels | effort, ROUTE)
    assert response.status_code == 200, response.text
    request = server.engine.requests[-1]
    assert all(getattr(request.params, name) == value for name, value in fields.items())
    assert (request.params.repetition_penalty, request.priority, request.cache_salt) == (1.5, 3, "s")
    assert request.params.logit_bias == ((7, 1.5),)
    answer = response.json()
    assert answer["output"][0]["content"][0]["text"] == TEXT.partition("世界")[0] and answer["seed"] == 5
    assert answer["reasoning"]["effort"] == "low"
    assert response.headers["headwater-ignored"] == (
        "background, service_tier, truncation, user, zz, reasoning.effort, reasoning.summary"
    )


def test_log_probabilities(server: FakeServer, client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Hi", include=["message.output_text.logprobs"], top_logprobs=2)
    part = answer.output[0].content[0]  # type: ignore[union-attr,index]
    assert part.type == "output_text" and part.logprobs is not None and len(part.logprobs) == NUM_TOKENS  # type: ignore[union-attr]
    assert b"".join(bytes(one.bytes) for one in part.logprobs).decode() == TEXT  # type: ignore[union-attr]
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)  # type: ignore[union-attr]
    found = events(server, top_logprobs=2)
    told = [one for event in found if event["type"] == "response.output_text.delta" for one in event["logprobs"]]
    assert told == found[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert [one["token"] for one in told] == [one.token for one in part.logprobs]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": None}, "`input`"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "`input[0]`: a message needs"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, MODEL),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "output"),
        ({"input": [{"type": "reasoning", "content": [{"type": "image"}]}]}, "image"),
        ({"input": "x" * 9000}, "`input` has 9019 and leaves no room for an output. Shorten it."),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "`max_output_tokens` is 5000"),
        ({"temperature": 2.5}, "temperature"),
        ({"previous_response_id": "resp_nope"}, "Previous response with id `resp_nope` not found"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "previous_response_id"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "x"}}, "input"),
        ({"messages": []}, "input"),
        ({"max_tokens": 5}, "max_output_tokens"),
        ({"response_format": {"type": "text"}}, "/v1/chat/completions"),
        ({"include": ["nope"]}, "include"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nope"}}}}, "`text.format`"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"tools": [{"type": "web_search"}]}, "`tools[0]` is of type web_search"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": []}}, "allowed_tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nope"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"mode": "pro"}}, "reasoning"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_served_is_named(server: FakeServer, fields: dict[str, Any], words: str) -> None:
    error = refusal(server, **fields)
    assert words in error["message"] and error["param"]
    assert server.engine.requests == []


def test_failures(server: FakeServer, client: openai.OpenAI) -> None:
    server.engine.fail_at = 3
    try:
        with pytest.raises(openai.InternalServerError):
            client.responses.create(model=MODEL, input="Hi")
        found = events(server)
        told = list(client.responses.create(model=MODEL, input="Hi", stream=True))
    finally:
        server.engine.fail_at = None
    assert [event["type"] for event in found[-2:]] == ["error", "response.failed"]
    assert "not finite" in found[-2]["message"] and found[-2]["code"] == "engine_failed"
    failed = found[-1]["response"]
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"
    assert told[-1].type == "response.failed" and told[-1].response.error is not None
    assert server.http.get(f"{ROUTE}/{failed['id']}").status_code == 404
    server.engine.state = EngineState.RESTARTING
    try:
        assert server.post({"input": "Hi"}, ROUTE).status_code == 503
    finally:
        server.engine.state = EngineState.READY
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nope", input="Hi")


def test_a_stored_conversation_is_gone_on_with(server: FakeServer, client: openai.OpenAI) -> None:
    say(server, CALLS)
    first = client.responses.create(model=MODEL, input="Time?", instructions="Be kind.", tools=TOOLS)
    assert first.model_dump()["store"] is True
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    outputs: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": item.name}
        for item in first.output
        if item.type == "function_call"
    ]
    say(server, "Noon.")
    with client.responses.stream(model=MODEL, input=outputs, previous_response_id=first.id) as stream:
        second = stream.get_final_response()
    told = (
        '<|start|>user\nTime?<|end|>\n<|start|>assistant\nLet me look.{"city": "北京 🌍"}{}<|end|>\n'
        "<|start|>tool\nget_weather<|end|>\n<|start|>tool\nclock<|end|>\n<|start|>assistant\n"
    )
    assert prompt_of(server) == told and second.previous_response_id == first.id
    client.responses.delete(first.id)
    third = client.responses.create(
        model=MODEL, input="And?", previous_response_id=second.id, instructions="Short.", store=False
    )
    head = "<|start|>system\nShort.<|end|>\n"
    assert prompt_of(server) == f"{head}{told}Noon.<|end|>\n<|start|>user\nAnd?<|end|>\n<|start|>assistant\n"
    assert third.model_dump()["store"] is False
    for gone in (first.id, third.id):
        with pytest.raises(openai.NotFoundError) as missing:
            client.responses.retrieve(gone)
        assert missing.value.code == "response_not_found"
        assert server.http.delete(f"{ROUTE}/{gone}").status_code == 404
        assert refusal(server, previous_response_id=gone)["code"] == "previous_response_not_found"
    assert server.http.get(f"{ROUTE}/{second.id}", params={"stream": "true"}).status_code == 400
    deleted = server.http.delete(f"{ROUTE}/{second.id}")
    assert deleted.json() == {"id": second.id, "object": "response", "deleted": True}


def test_what_a_stored_response_was_asked_with(server: FakeServer, client: openai.OpenAI) -> None:
    given: list[Any] = [
        {"role": "system", "content": "Be kind."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "北京 🌍"}, {"type": "input_text", "text": "Now?"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "A clock."}]},
        CALL,
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": "Noon."},
        {"type": "message", "role": "user", "content": "And?"},
    ]
    answer = client.responses.create(model=MODEL, input=given)
    items = list(client.responses.input_items.list(answer.id, order="asc", limit=3))
    shown = [item.to_dict() for item in items]
    assert len({item.pop("id") for item in shown}) == len(given)
    assert {item.pop("status") for item in shown} == {"completed"}
    assert shown == [
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"type": "message", "role": "user", "content": given[1]["content"]},
        {"type": "reasoning", "summary": given[2]["summary"], "content": []},
        CALL,
        given[4],
        {"type": "message", **given[5]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Noon.", "annotations": [], "logprobs": []}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And?"}]},
    ]
    first_page = client.responses.input_items.list(answer.id, limit=2)
    assert [item.id for item in first_page.data] == [items[-1].id, items[-2].id] and first_page.has_more
    rest = client.responses.input_items.list(answer.id, after=items[-2].id)
    assert [item.id for item in rest.data] == [item.id for item in reversed(items[:-2])] and not rest.has_more
    for nowhere in ("nowhere", "", items[0].id.replace("msg", "fc"), f"{items[0].id[:-8]}ffffffff", f"{items[0].id}0"):
        with pytest.raises(openai.BadRequestError, match="no item of this response"):
            client.responses.input_items.list(answer.id, after=nowhere)
    assert client.responses.input_items.list(answer.id, after=items[0].id).data == []
    for fields in ({"limit": 0}, {"limit": 101}, {"order": "up"}):
        refused = server.http.get(f"{ROUTE}/{answer.id}/input_items", params=fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(fields)))
    text = client.responses.create(model=MODEL, input="Hi", previous_response_id=answer.id)
    (only,) = client.responses.input_items.list(text.id)
    assert only.type == "message" and only.to_dict()["content"] == [{"type": "input_text", "text": "Hi"}]
    client.responses.delete(text.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list(text.id)


def test_a_response_that_ended_cannot_be_cancelled(server: FakeServer, client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Hi")
    with pytest.raises(openai.BadRequestError, match="background") as refused:
        client.responses.cancel(answer.id)
    assert refused.value.code == "response_not_cancellable"
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_none")
    assert client.responses.retrieve(answer.id).status == "completed"


def test_a_client_that_goes_away_leaves_nothing_stored(server: FakeServer, client: openai.OpenAI) -> None:
    before = server.context.responses.num_responses
    server.engine.hold_at = 2
    try:
        with client.responses.create(model=MODEL, input="Hi", stream=True) as stream:
            begun = next(iter(stream))
        wait_until(server.is_idle)
    finally:
        server.engine.hold_at = None
    assert begun.type == "response.created" and server.context.responses.num_responses == before


def test_responses_are_there_for_their_own_key_alone() -> None:
    keys = ["0123456789abcdef", "fedcba9876543210"]
    with fake_server(chat_template=TAGGED, keys=KeyRing(keys=keys)) as locked:
        url = f"{locked.url}/v1"
        with (
            openai.OpenAI(base_url=url, api_key=keys[0]) as mine,
            openai.OpenAI(base_url=url, api_key=keys[1]) as other,
        ):
            answer = mine.responses.create(model=MODEL, input="Hi", max_output_tokens=5)
            assert mine.responses.retrieve(answer.id).id == answer.id
            calls = (other.responses.retrieve, other.responses.delete, other.responses.cancel)
            for call in (*calls, other.responses.input_items.list):
                with pytest.raises(openai.NotFoundError):
                    call(answer.id)
            with pytest.raises(openai.BadRequestError, match="not found"):
                other.responses.create(model=MODEL, input="Hi", previous_response_id=answer.id)
            assert mine.responses.create(model=MODEL, input="Hi", previous_response_id=answer.id).status == "completed"
            mine.responses.delete(answer.id)


def test_a_server_that_stores_nothing() -> None:
    with fake_server(chat_template=TAGGED, responses=ResponseStore(max_responses=0)) as forgetful:
        answer = forgetful.post({"input": "Hi"}, ROUTE).json()
        assert answer["store"] is False
        assert forgetful.http.get(f"{ROUTE}/{answer['id']}").status_code == 404
        assert "--max-stored-responses" in refusal(forgetful, store=True)["message"]


def test_a_template_without_tools() -> None:
    with fake_server(chat_template=TEMPLATE) as plain:
        error = refusal(plain, tools=TOOLS)
        assert error["code"] == "tools_not_supported"
