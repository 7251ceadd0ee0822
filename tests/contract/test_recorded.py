"""What other people's clients really send: bodies recorded from them, replayed against a server with a real engine.

tests/contract/recorded/CLIENT.json holds a client's requests as its release sent them, with that release. The
engine is the scripted tier: it follows grammars, and says nothing of sense otherwise.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.serving import chunks_of, message_events_of
from tests.contract.test_openapi import check
from tests.fuzz.run import scripted_server

FOLDER = Path(__file__).parent / "recorded"
VOCABULARY = 4096
REQUESTS = [
    pytest.param(request["path"], request["body"], id=f"{client['client']}-{client['version']}-{request['name']}")
    for client in (json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json")))
    for request in client["requests"]
]
REASONS = {"stop", "length", "tool_calls"}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("recorded") / "server.log"
    with scripted_server(log, max_model_len=4096) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.mark.parametrize(("path", "recorded"), REQUESTS)
def test_a_recorded_request_gets_a_sane_answer(http: httpx.Client, path: str, recorded: dict[str, Any]) -> None:
    body = adapted(recorded)
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    check(response, path)
    if path == "/v1/messages":
        check_message(response, body)
    elif path == "/v1/responses":
        check_response(response, body)
    elif path != "/tokenize":
        check_choices(whole(response, body), body)


def adapted(body: dict[str, Any]) -> dict[str, Any]:
    """The body for another model than the one that it was recorded with: its name left out, its ids folded."""
    changed = {name: value for name, value in body.items() if name != "model"}
    prompt = changed.get("prompt")
    if isinstance(prompt, list) and isinstance(prompt[0], list):
        changed["prompt"] = [[token_id % VOCABULARY for token_id in ids] for ids in prompt]
    return changed


def whole(response: httpx.Response, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of an answer; of a stream one for each index, of what its chunks add up to."""
    if not body.get("stream"):
        choices: list[dict[str, Any]] = response.json()["choices"]
        return choices
    chunks = chunks_of(response.text)
    if body.get("stream_options", {}).get("include_usage"):
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        one = found.setdefault(choice["index"], {"message": {"content": "", "tool_calls": []}, "text": ""})
        delta = choice.get("delta", {})
        one["text"] += choice.get("text", "")
        one["message"]["content"] += delta.get("content") or ""
        one["message"]["tool_calls"] += [call for call in delta.get("tool_calls", ()) if "id" in call]
        one["finish_reason"] = choice["finish_reason"] or one.get("finish_reason")
    return list(found.values())


def check_choices(choices: list[dict[str, Any]], body: dict[str, Any]) -> None:
    prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [""]
    assert len(choices) == len(prompts) * (body.get("n") or 1)
    assert {choice["finish_reason"] for choice in choices} <= REASONS
    for index, choice in enumerate(choices):
        if body.get("echo"):
            check_scored(choice["logprobs"], len(prompts[index // (body.get("n") or 1)]))
        if body.get("tool_choice") not in (None, "auto"):
            names = {tool["function"]["name"] for tool in body["tools"]}
            assert {call["function"]["name"] for call in choice["message"]["tool_calls"]} <= names
        if body.get("response_format") is not None and choice["finish_reason"] == "stop":
            json.loads(choice["message"]["content"])


def check_scored(logprobs: dict[str, Any], num_prompt: int) -> None:
    """Every prompt token and the one after it; a token that is the likeliest has the same float in both lists."""
    assert {len(entries) for entries in logprobs.values()} == {num_prompt + 1}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for own, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert own <= max(top.values()) and (own in top.values() or own < min(top.values()))


def check_message(response: httpx.Response, body: dict[str, Any]) -> None:
    if body.get("stream"):
        events = message_events_of(response.text)
        assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
        return
    assert response.json()["stop_reason"] in {"end_turn", "max_tokens", "tool_use"}


def check_response(response: httpx.Response, body: dict[str, Any]) -> None:
    answer = message_events_of(response.text)[-1]["response"] if body.get("stream") else response.json()
    assert answer["status"] in {"completed", "incomplete"} and answer["usage"]["output_tokens"] > 0
    if body.get("tool_choice") == "required":
        assert {item["name"] for item in answer["output"]} <= {tool["name"] for tool in body["tools"]}
    if "text" in body and answer["status"] == "completed":
        json.loads(answer["output"][0]["content"][0]["text"])
