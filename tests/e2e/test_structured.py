"""Schemas, expressions and grammars held by the default model on the native tier, through HTTP."""

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest

from tests.e2e.serving import serve_default_model

PATIENCE = 60.0
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 24},
        "kind": {"enum": ["metropolis", "town", "村庄", "🏝️ island"]},
        "population": {"type": "integer", "minimum": 0, "maximum": 40_000_000},
        "coast": {"type": "boolean"},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 2},
        "mayor": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/person"}]},
    },
    "required": ["name", "kind", "population", "coast", "rivers", "mayor"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": "object",
            "properties": {"id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, "age": {"type": "integer"}},
            "required": ["id"],
            "additionalProperties": False,
        }
    },
}
SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 3, "maxLength": 20}, "size": {"enum": [1, 2.5, "大"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
PLACES = (
    *("Berlin", "Paris", "北京", "東京", "Köln", "São Paulo", "Nairobi", "Reykjavík", "Москва", "القاهرة"),
    *("Lima", "Oslo", "Atlantis 🧜", "Rome", "Quito", "Hanoi", "Perth", "Dakar", "a village", "42"),
)


class Server:
    """The running server, asked from several threads."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=PATIENCE)

    def complete(self, **fields: Any) -> dict[str, Any]:
        response = self.http.post("/v1/completions", json={"model": None, "max_tokens": 120} | fields)
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    def complete_all(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda fields: self.complete(**fields), requests))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_default_model(tmp_path_factory.mktemp("log") / "serve.log") as (_, url):
        server = Server(url)
        with server.http:
            yield server


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def about(place: str, index: int) -> dict[str, Any]:
    """Greedy and sampled in turn."""
    prompt = f"Facts about {place} as JSON:\n"
    return {"prompt": prompt, "temperature": float(index % 2), "seed": index, **of_schema(CITY)}


def test_every_answer_that_stops_validates(server: Server) -> None:
    choices = server.complete_all([about(place, index) for index, place in enumerate(PLACES)])
    stopped = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert len(stopped) >= 15
    for choice in stopped:
        jsonschema.validate(json.loads(choice["text"]), CITY)
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}
    assert len({choice["text"] for choice in stopped}) > 5


def test_plain_rows_beside_constrained_ones_are_unchanged(server: Server) -> None:
    plain = [
        {"prompt": f"Once upon a time in {place}", "temperature": float(index % 2), "seed": index, "max_tokens": 40}
        for index, place in enumerate(PLACES[:6])
    ]
    alone = server.complete_all(plain)
    mixed = server.complete_all(
        [*plain, *(about(place, index) | {"max_tokens": 40} for index, place in enumerate(PLACES[:6]))]
    )
    assert [choice["text"] for choice in mixed[:6]] == [choice["text"] for choice in alone]


def test_choice_regex_grammar_and_any_object(server: Server) -> None:
    prompt = "The answer is: "
    forms: list[dict[str, Any]] = [
        {"structured_outputs": {"choice": ["是的 ✅", 'no "never"\n', "perhaps"]}},
        {"structured_outputs": {"regex": r"[A-Z][a-z]{2,9} \d{4}[。！]"}},
        {
            "structured_outputs": {
                "grammar": 'start: greeting " " NAME "!"\ngreeting: "Hello" | "你好"\nNAME: /[A-Z][a-z]{1,8}/'
            }
        },
        {"structured_outputs": {"grammar": 'root ::= "<" [0-9]+ ">" | "[" [a-f]{3} "]"'}, "max_tokens": 20},
        {"response_format": {"type": "json_object"}, "max_tokens": 60},
        {"structured_outputs": {"json": {"type": "string", "maxLength": 3}}, "logit_bias": {"0": -100}},
    ]
    choice, regex, lark, gbnf, any_object, text = server.complete_all(
        [{"prompt": prompt, "temperature": 1.0, "seed": 7, "logprobs": 2, **form} for form in forms]
    )
    assert choice["text"] in ("是的 ✅", 'no "never"\n', "perhaps") and choice["finish_reason"] == "stop"
    assert re.fullmatch(r"[A-Z][a-z]{2,9} \d{4}[。！]", regex["text"]) and regex["finish_reason"] == "stop"
    assert re.fullmatch(r"(Hello|你好) [A-Z][a-z]{1,8}!", lark["text"]) and lark["finish_reason"] == "stop"
    assert gbnf["finish_reason"] == "length" or re.fullmatch(r"<\d+>|\[[a-f]{3}\]", gbnf["text"])
    assert any_object["finish_reason"] == "length" or isinstance(json.loads(any_object["text"]), dict)
    assert len(json.loads(text["text"])) <= 3
    # Logprobs are of the raw logits: what the grammar forbade is among the most likely.
    assert any(token not in top for token, top in zip(regex["logprobs"]["tokens"], _tops(regex), strict=True))


def test_a_kill_in_the_middle_of_the_json_changes_nothing(server: Server) -> None:
    asked = about("Zürich", 1) | of_schema(SMALL)
    whole = server.complete(**asked)
    text = ""
    is_killed = False
    with server.http.stream(
        "POST", "/v1/completions", json={"model": None, "max_tokens": 120, "stream": True} | asked
    ) as lines:
        for line in lines.iter_lines():
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            text += json.loads(data)["choices"][0]["text"]
            if not is_killed and text.count('"') >= 3:
                os.kill(server.http.get("/ready").json()["engine_pid"], signal.SIGKILL)
                is_killed = True
    assert is_killed and text == whole["text"]
    assert whole["finish_reason"] == "stop"
    jsonschema.validate(json.loads(text), SMALL)


def _tops(choice: dict[str, Any]) -> list[dict[str, float]]:
    """The two most likely tokens at each place, without the chosen one where it was added to them."""
    tops: list[dict[str, float]] = choice["logprobs"]["top_logprobs"]
    return [dict(sorted(top.items(), key=lambda item: -item[1])[:2]) for top in tops]


MOVE: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "fast": {"type": "boolean"}},
    "required": ["x", "fast"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "move_to", "parameters": MOVE}},
    {"type": "function", "function": {"name": "resize", "parameters": SMALL}},
]


def forced_calls(choice: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    called = [call["function"] for call in choice["message"]["tool_calls"]]
    return [(one["name"], json.loads(one["arguments"])) for one in called]


def test_forced_calls_parse_and_validate(server: Server) -> None:
    """The default model's template knows no tools: the grammar alone makes the calls."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    named = {"type": "function", "function": {"name": "resize"}}

    def call(place: str, index: int, **fields: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": f"How large is {place}?"}], "tools": TOOLS, "seed": index}
        response = server.http.post("/v1/chat/completions", json=body | {"max_tokens": 120} | fields)
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    one = {"tool_choice": "required", "parallel_tool_calls": False}
    with ThreadPoolExecutor(6) as pool:
        choices = list(
            pool.map(lambda index: call(PLACES[index], index, **({"tool_choice": named}, one)[index % 2]), range(6))
        )
    ended = [choice for choice in choices if choice["finish_reason"] == "tool_calls"]
    assert len(ended) >= 4 and {choice["finish_reason"] for choice in choices} <= {"tool_calls", "length"}
    for choice in ended:
        ((name, arguments),) = forced_calls(choice)
        jsonschema.validate(arguments, schemas[name])
        assert choice["message"]["content"] is None
    auto = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    refused = server.http.post("/v1/chat/completions", json=auto)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "tools_not_supported"


def test_anthropics_client_with_the_default_model(server: Server) -> None:
    model = server.http.get("/v1/models").json()["data"][0]["id"]
    ask: list[Any] = [{"role": "user", "content": "Once upon a time"}]
    tool: Any = {"name": "move_to", "input_schema": MOVE}
    with anthropic.Anthropic(base_url=str(server.http.base_url), api_key="none", max_retries=0) as client:
        counted = client.messages.count_tokens(model=model, messages=ask)
        with client.messages.stream(model=model, max_tokens=12, messages=ask) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text and final.stop_reason == "max_tokens" and final.usage.output_tokens == 12
        cached = final.usage.cache_read_input_tokens or 0
        assert final.usage.input_tokens + cached == counted.input_tokens
        forced = client.messages.create(
            model=model, max_tokens=120, messages=ask, tools=[tool], tool_choice={"type": "tool", "name": "move_to"}
        )
    assert forced.stop_reason == "tool_use"
    (block,) = forced.content
    assert block.type == "tool_use"
    jsonschema.validate(block.input, MOVE)


def test_openais_responses_with_the_default_model(server: Server) -> None:
    model = server.http.get("/v1/models").json()["data"][0]["id"]
    form: Any = {"format": {"type": "json_schema", "name": "move", "schema": MOVE}}
    tool: Any = {"type": "function", "name": "move_to", "parameters": MOVE, "strict": True}
    with openai.OpenAI(base_url=f"{server.http.base_url}/v1", api_key="none", max_retries=0) as client:
        with client.responses.stream(model=model, input="What is the capital of France?", temperature=0) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            first = stream.get_final_response()
        assert text and first.output_text == text
        moved = client.responses.create(model=model, input="Where?", previous_response_id=first.id, text=form)
        assert moved.status == "completed"
        jsonschema.validate(json.loads(moved.output_text), MOVE)
        call = client.responses.create(
            model=model, input="Go.", tools=[tool], tool_choice="required", parallel_tool_calls=False, store=False
        )
    (item,) = call.output
    assert item.type == "function_call"
    jsonschema.validate(json.loads(item.arguments), MOVE)


def test_parameters_that_leave_no_token_are_the_requests_fault(server: Server) -> None:
    body = {"prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}, "allowed_token_ids": [5]}
    refused = server.http.post("/v1/completions", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "output_impossible"
    assert "leave no token to draw" in refused.json()["error"]["message"]
    streamed = server.http.post("/v1/completions", json=body | {"stream": True})
    assert streamed.status_code == 400, "nothing was sent yet"
