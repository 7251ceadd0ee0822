"""`POST /v1/chat/completions` as OpenAI's own clients use it, and what the template gets to see."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from app.api.deps import ApiLimits
from app.api.schemas.field_rules import UnknownFields
from app.text import ChatTemplate
from tests.contract.fake_engine import END
from tests.contract.serving import MODEL, TEXT, FakeServer, chunks_of, fake_server, wait_until
from tests.text_tokenizers import byte_level

ROUTE = "/v1/chat/completions"
NUM_TOKENS = len(byte_level().encode_now(TEXT, False))
SPECIAL = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
TEMPLATE = ChatTemplate(
    {
        "default": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ m.mood }}<|end|>\n{% endfor %}"
        "{% if enable_thinking is defined %}think={{ enable_thinking }}\n{% endif %}"
        "{% if messages[-1].role == 'tool' and messages | length == 1 %}{{ raise_exception('no call') }}{% endif %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    },
    special_tokens=SPECIAL,
)
USER = [{"role": "user", "content": "你好 🌍"}]


@pytest.fixture(scope="module")
def chat_server() -> Iterator[FakeServer]:
    with fake_server(chat_template=TEMPLATE, max_model_len=512) as server:
        yield server


@pytest.fixture
def chat(chat_server: FakeServer) -> Iterator[FakeServer]:
    """The module's server, checked to be idle afterwards."""
    chat_server.engine.requests.clear()
    yield chat_server
    wait_until(chat_server.is_idle)


def ask(server: FakeServer, **fields: Any) -> dict[str, Any]:
    response = server.post({"messages": USER} | fields, ROUTE)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(server: FakeServer, **fields: Any) -> list[dict[str, Any]]:
    response = server.post({"messages": USER, "stream": True} | fields, ROUTE)
    assert response.status_code == 200, response.text
    return chunks_of(response.text)


def refusal(server: FakeServer, **fields: Any) -> dict[str, Any]:
    response = server.post({"messages": USER} | fields, ROUTE)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def prompt_of(server: FakeServer) -> str:
    """What the last request put before the engine, special tokens shown."""
    return byte_level().decode(server.engine.requests[-1].prompt_token_ids, False)


def test_openai_client_gets_an_answer(chat: FakeServer) -> None:
    answer = chat.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "你好 🌍"}])
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == MODEL
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.message.refusal is None and choice.message.tool_calls is None and choice.logprobs is None
    assert prompt_of(chat) == "<|start|>user\n你好 🌍<|end|>\n<|start|>assistant\n"
    prompt_ids = chat.engine.requests[-1].prompt_token_ids
    assert prompt_ids[0] == 0 and END in prompt_ids, "special tokens of the template are tokens, BOS stands once"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt_ids)
    assert answer.usage.completion_tokens == NUM_TOKENS + 1
    # Without a limit of its own an answer may take the rest of the context.
    assert chat.engine.requests[-1].params.max_tokens == 512 - len(prompt_ids)


def test_openai_client_streams(chat: FakeServer) -> None:
    chunks = list(
        chat.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == TEXT and not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in chunks[:-1])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (NUM_TOKENS + 1) + ["stop"]
    assert {(chunk.object, chunk.id) for chunk in chunks} == {("chat.completion.chunk", chunks[0].id)}
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_asynchronous_client_streams_and_waits(chat: FakeServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], n=2)
        assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
        streamed = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        parts = [chunk.choices[0].delta.content or "" async for chunk in streamed]
        assert "".join(parts) == TEXT


@pytest.mark.parametrize("tokens_per_output", [1, 3, 1000])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_completion_tokens": 23, "max_tokens": 2},
        {"stop": ["世界", "🚀"]},
        {"stop": "🚀 na", "include_stop_str_in_output": True, "n": 2},
        {"stop": "👨", "logprobs": True, "top_logprobs": 3},
        {"max_tokens": 9, "logprobs": True, "return_token_ids": True, "n": 3},
        {"max_tokens": 90, "ignore_eos": True, "skip_special_tokens": False},
    ],
    ids=str,
)
def test_the_joined_stream_is_the_whole_answer(
    chat: FakeServer, fields: dict[str, Any], tokens_per_output: int
) -> None:
    chat.engine.tokens_per_output = tokens_per_output
    try:
        whole = ask(chat, **fields)
        chunks = stream(chat, **fields, stream_options={"include_usage": True})
    finally:
        chat.engine.tokens_per_output = 1
    assert chunks[-1]["usage"] == whole["usage"] and "seed" in chunks[-1]
    for choice in whole["choices"]:
        parts = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        if choice["logprobs"] is not None:
            streamed = [item for part in parts[1:] for item in part["logprobs"]["content"]]
            assert streamed == choice["logprobs"]["content"]
        if "token_ids" in choice:
            assert [item for part in parts[1:] for item in part["token_ids"]] == choice["token_ids"]
            assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]


def test_logprobs_have_the_bytes_of_parts_of_characters(chat: FakeServer) -> None:
    answer = chat.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    data = b"".join(bytes(one.bytes or []) for one in logprobs.content[:-1])
    assert data.decode() == TEXT
    assert any(one.token.startswith("bytes:\\x") for one in logprobs.content)
    assert all(len(one.top_logprobs) == 2 for one in logprobs.content)
    equal = [one for one in logprobs.content if one.token == one.top_logprobs[0].token]
    assert equal and all(one.logprob == one.top_logprobs[0].logprob for one in equal)


def test_continuous_usage_and_prompt_logprobs(chat: FakeServer) -> None:
    chunks = stream(chat, max_tokens=3, stream_options={"continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3]
    answer = ask(chat, max_tokens=1, prompt_logprobs=1, return_token_ids=True)
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]


def test_parts_roles_and_tool_history_reach_the_template(chat: FakeServer) -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"城": "北京"}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": '{"broken'}},
        "not even an object",
    ]
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}], "mood": "!"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "name": None},
    ]
    ask(chat, messages=messages, max_tokens=1)
    shown = [json.dumps({**calls[0], "function": {"name": "f", "arguments": {"城": "北京"}}}, ensure_ascii=False)]  # type: ignore[dict-item]
    shown += [json.dumps(one) for one in calls[1:]]
    assert prompt_of(chat) == (
        "<|start|>system\nBe kind.<|end|>\n<|start|>user\nOne\ntwo!<|end|>\n"
        f"<|start|>assistant\n{''.join(shown)}<|end|>\n<|start|>tool\n42<|end|>\n<|start|>assistant\nNo.<|end|>\n"
        "<|start|>assistant\n"
    )


def test_a_final_message_is_continued(chat: FakeServer) -> None:
    messages = [*USER, {"role": "assistant", "content": "It is  "}]
    ask(chat, messages=messages, continue_final_message=True, max_tokens=1)
    assert prompt_of(chat) == "<|start|>user\n你好 🌍<|end|>\n<|start|>assistant\nIt is  "
    echoed = ask(chat, messages=messages, continue_final_message=True, echo=True)
    assert echoed["choices"][0]["message"]["content"] == "It is  " + TEXT
    chunks = stream(chat, messages=messages, continue_final_message=True, echo=True)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "It is  "}
    ask(chat, messages=messages, add_generation_prompt=False, max_tokens=1)
    assert prompt_of(chat).endswith("It is  <|end|>\n")


def test_template_variables_by_allow_list(chat: FakeServer) -> None:
    body = {"messages": USER, "max_tokens": 1}
    answer = chat.post(body | {"chat_template_kwargs": {"enable_thinking": False, "nope": 1, "messages": "x"}}, ROUTE)
    assert answer.status_code == 200 and "think=False\n" in prompt_of(chat) and "你好" in prompt_of(chat)
    assert answer.headers["headwater-ignored"] == "chat_template_kwargs.nope, chat_template_kwargs.messages"
    assert refusal(chat, chat_template_kwargs={"enable_thinking": [1]})["param"].startswith("chat_template_kwargs")
    effort = chat.post(body | {"reasoning_effort": "low", "zz": 1, "user": "me"}, ROUTE)
    assert effort.headers["headwater-ignored"] == "user, zz, reasoning_effort"
    with fake_server(chat_template=TEMPLATE, limits=ApiLimits(unknown_fields=UnknownFields.REFUSE)) as strict:
        error = refusal(strict, chat_template_kwargs={"bos_token": "x"})
        assert error["param"] == "chat_template_kwargs.bos_token" and "enable_thinking" in error["message"]
        assert refusal(strict, zz=1)["param"] == "zz"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "length"),
        ({"messages": None}, "messages", "array"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "wizard"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "int"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            MODEL,
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no call"),
        ({"messages": [{"role": "assistant", "content": "x" * 3000}]}, "messages", "context"),
        ({"max_completion_tokens": 600}, "max_completion_tokens", "context"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        ({"logprobs": 3}, "logprobs", "bool"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"functions": [{"name": "f"}]}, "functions", "empty list"),
        ({"chat_template": "{{ messages }}"}, "chat_template", "operator"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "yaml"),
        ({"n": 2000}, "n", "1024"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_named(chat: FakeServer, fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(chat, **fields)
    assert error["param"] == param and words in error["message"]
    assert chat.engine.requests == []


def test_messages_are_required_and_an_unknown_model_is_a_404(chat: FakeServer) -> None:
    response = chat.post({}, ROUTE)
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages"
    response = chat.post({"messages": USER, "model": "nope"}, ROUTE)
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_a_model_without_a_template_says_what_to_do(server: FakeServer) -> None:
    error = refusal(server)
    assert error["code"] == "no_chat_template" and "--chat-template" in error["message"]
    assert server.post({"messages": USER}, "/tokenize").json()["error"]["code"] == "no_chat_template"


def test_a_failing_stream_ends_with_an_error_event(chat: FakeServer) -> None:
    chat.engine.fail_at = 3
    try:
        events = stream(chat)
    finally:
        chat.engine.fail_at = None
    assert events[-1]["error"]["type"] == "server_error" and "choices" in events[-2]


def test_tokenize_takes_messages(chat: FakeServer) -> None:
    answer = chat.post({"messages": USER, "return_token_strs": True}, "/tokenize").json()
    assert "".join(answer["token_strs"][:2]) == "<|start|>u" and answer["count"] == len(answer["tokens"])
    ask(chat, max_tokens=1)
    assert tuple(answer["tokens"]) == chat.engine.requests[-1].prompt_token_ids
    final = {"messages": [{"role": "assistant", "content": "So"}], "continue_final_message": True}
    tokens = chat.post(final, "/tokenize").json()["tokens"]
    assert byte_level().decode(tokens, False) == "<|start|>assistant\nSo"
    mistakes: list[dict[str, Any]] = [
        {},
        {"prompt": "a", "messages": USER},
        {"prompt": "a", "add_generation_prompt": True},
        {"messages": USER, "chat_template_kwargs": {"nope": 1}},
        {"messages": []},
    ]
    for wrong in mistakes:
        assert chat.post(wrong, "/tokenize").status_code == 400


def test_embeddings_are_refused_in_words(chat: FakeServer) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat.client.embeddings.create(model=MODEL, input="x")
    assert refused.value.code == "not_an_embedding_model" and MODEL in str(refused.value)


def test_answers_pass_the_clients_strict_validation(chat: FakeServer) -> None:
    with openai.OpenAI(
        base_url=f"{chat.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        messages: list[Any] = [{"role": "user", "content": "Hi"}]
        answer = client.chat.completions.create(model=MODEL, messages=messages, n=2, logprobs=True, top_logprobs=2)
        assert [choice.index for choice in answer.choices] == [0, 1]
        with client.chat.completions.stream(model=MODEL, messages=messages, logprobs=True) as events:
            kinds = {event.type for event in events}
            final = events.get_final_completion()
        assert {"chunk", "content.delta", "content.done"} <= kinds
        assert final.choices[0].message.content == TEXT and final.choices[0].finish_reason == "stop"


def test_samples_are_streamed_side_by_side(chat: FakeServer) -> None:
    chunks = stream(chat, n=3, max_tokens=5, seed=7)
    for index in range(3):
        parts = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        assert [part["delta"].get("role") for part in parts] == ["assistant"] + [None] * 5
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert len({request.params.seed for request in chat.engine.requests}) == 3
