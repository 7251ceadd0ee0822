"""The OpenAPI document: committed as it is served, complete, and true of what the server answers."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.deps import ApiLimits
from app.api.key_ring import KeyRing
from app.client.engine_client import EngineState
from tests.contract.schema_check import problems
from tests.contract.serving import MODEL, TEXT, FakeServer, chunks_of, fake_server, message_events_of
from tests.contract.test_chat import TEMPLATE
from tests.text_tokenizers import byte_level

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "openapi.json"
DOCUMENT: dict[str, Any] = json.loads(COMMITTED.read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
OPERATIONS = [
    pytest.param(method, path, operation, id=operation["operationId"])
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]
CALL = 'So: <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ANTHROPIC_TOOL = {"name": "f", "input_schema": {"type": "object"}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
USAGE = {"include_usage": True, "continuous_usage_stats": True}
EXAMPLES = [
    pytest.param(path, example["value"], id=f"{path}-{name}")
    for path, operations in DOCUMENT["paths"].items()
    for operation in operations.values()
    for content in operation.get("requestBody", {}).get("content", {}).values()
    for name, example in content.get("examples", {}).items()
]
WITH_BODY = [path for path, operations in DOCUMENT["paths"].items() if "requestBody" in operations.get("post", {})]


@pytest.fixture(scope="module")
def chat() -> Iterator[FakeServer]:
    with fake_server(chat_template=TEMPLATE, limits=ApiLimits(max_body_size=100_000)) as server:
        yield server


def check(response: httpx.Response, path: str, method: str = "post") -> None:
    """The response is one that the document promises for this operation."""
    promised = DOCUMENT["paths"][path][method]["responses"]
    assert str(response.status_code) in promised, f"{response.status_code} is not promised: {response.text[:200]}"
    reply = promised[str(response.status_code)]
    media_type = response.headers["content-type"].partition(";")[0]
    content = reply["content"][media_type]
    for name, header in reply.get("headers", {}).items():
        assert name in response.headers or not header.get("required"), name
    if media_type == "text/event-stream":
        read = message_events_of if path.startswith(("/v1/messages", "/v1/responses")) else chunks_of
        data = content["schema"]["properties"]["data"]
        for event in read(response.text):
            assert problems(event, data.get("anyOf", [data])[0]["contentSchema"], SCHEMAS) == []
    elif media_type == "application/json":
        assert problems(response.json(), content["schema"], SCHEMAS) == []


def test_the_committed_document_is_current() -> None:
    command = [sys.executable, "scripts/describe_api.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONPATH": "."})
    assert printed.stdout == COMMITTED.read_text(), "PYTHONPATH=. python scripts/describe_api.py > docs/openapi.json"


def test_the_server_serves_the_committed_document(server: FakeServer) -> None:
    served = server.http.get("/openapi.json").json()
    assert served.pop("info")["version"] == server.context.version
    assert served == {name: value for name, value in DOCUMENT.items() if name != "info"}


def test_every_reference_leads_somewhere_and_no_schema_is_unused() -> None:
    named = set(re.findall(r'"#/components/schemas/([^"]*)"', COMMITTED.read_text()))
    assert named == set(SCHEMAS)


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_operations_are_described(method: str, path: str, operation: dict[str, Any]) -> None:
    assert operation["operationId"].isidentifier() and len(operation["tags"]) == 1 and operation["description"]
    is_open = path in ("/health", "/ready")
    assert (operation.get("security") == []) == is_open
    statuses = set(operation["responses"])
    assert ("401" in statuses) != is_open and "422" not in statuses
    if "requestBody" in operation:
        assert {"400", "401", "408", "413", "415", "429"} <= statuses
        assert operation["requestBody"]["required"]
    for status, response in operation["responses"].items():
        assert response["description"] and response["content"]
        if int(status) >= 400 and path not in ("/health", "/ready"):
            body = "/MessagesErrorBody" if path.startswith("/v1/messages") else "/ErrorBody"
            assert response["content"]["application/json"]["schema"]["$ref"].endswith(body)


def test_operation_ids_are_unique() -> None:
    ids = [param.values[2]["operationId"] for param in OPERATIONS]  # type: ignore[index]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("path", "example"), EXAMPLES)
def test_examples_are_served(chat: FakeServer, path: str, example: dict[str, Any]) -> None:
    response = chat.post(example, path)
    assert response.status_code == 200, response.text
    check(response, path)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "你好", "logprobs": 2, "echo": True, "return_token_ids": True, "n": 2}),
        ("/v1/completions", {"prompt": "a", "stop": "你", "user": "me"}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "n": 2}),
        ("/v1/chat/completions", {"stop": ["你"], "zz": 1}),
        ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "required"}),
        ("/v1/responses", {"input": "Hi", "top_logprobs": 2, "metadata": {"a": "b"}, "user": "me"}),
        ("/v1/responses", {"input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 2}),
        ("/v1/responses", {"input": "Hi", "tools": [FLAT_TOOL], "tool_choice": "required"}),
        ("/v1/messages", {"stop_sequences": ["世"], "max_tokens": 100, "user": "me"}),
        ("/v1/messages", {"max_tokens": 100, "tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "any"}}),
    ],
    ids=str,
)
def test_answers_are_as_described(chat: FakeServer, path: str, fields: dict[str, Any], stream: bool) -> None:
    takes_messages = path in ("/v1/chat/completions", "/v1/messages")
    body = fields | ({"messages": [{"role": "user", "content": "Hi"}]} if takes_messages else {})
    options = {} if path in ("/v1/messages", "/v1/responses") else {"stream_options": USAGE}
    if "tools" in fields:
        chat.engine.script = tuple(byte_level().encode_now(CALL, False))
    try:
        response = chat.post(body | ({"stream": True, **options} if stream else {}), path)
    finally:
        chat.engine.script = tuple(byte_level().encode_now(TEXT, False))
    assert "tools" not in fields or '"f"' in response.text
    assert response.status_code == 200, response.text
    check(response, path)


def test_prompt_logprobs_are_as_described(chat: FakeServer) -> None:
    check(chat.post({"prompt": "你好", "prompt_logprobs": 2}), "/v1/completions")
    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 1, "max_tokens": 1}
    check(chat.post(body, "/v1/chat/completions"), "/v1/chat/completions")


@pytest.mark.parametrize("path", WITH_BODY)
def test_refusals_are_as_described(chat: FakeServer, path: str) -> None:
    for content, headers, status in (
        (b"{", {"content-type": "application/json"}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"1" * 100_001, {"content-type": "application/json"}, 413),
    ):
        response = chat.http.post(path, content=content, headers=headers)
        assert response.status_code == status
        check(response, path)


def test_a_failing_engine_is_as_described() -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    path = "/v1/chat/completions"
    with fake_server(chat_template=TEMPLATE) as server:
        server.engine.fail_at = 3
        for where in (path, "/v1/messages", "/v1/responses"):
            whole = {"input": "Hi"} if where == "/v1/responses" else body | {"max_tokens": 50}
            for fields, status in (({}, 500), ({"stream": True}, 200)):
                response = server.post(whole | fields, where)
                assert response.status_code == status
                check(response, where)
        server.engine.fail_at = None
        server.engine.state = EngineState.STARTING
        for where in (path, "/v1/completions", "/tokenize", "/v1/messages", "/v1/messages/count_tokens"):
            response = server.post(body if where != "/v1/completions" else {"prompt": "a"}, where)
            assert response.status_code == 503
            check(response, where)
        for where in ("/v1/models", "/ready"):
            assert server.http.get(where).status_code == 503
            check(server.http.get(where), where, "get")


@pytest.mark.parametrize("path", [path for path, operations in DOCUMENT["paths"].items() if "get" in operations])
def test_what_is_read_is_as_described(chat: FakeServer, path: str) -> None:
    stored = chat.post({"input": "Hi", "max_output_tokens": 2}, "/v1/responses").json()["id"]
    check(chat.http.get(path.replace("{model}", MODEL).replace("{response_id}", stored)), path, "get")
    if "delete" in DOCUMENT["paths"][path]:
        for _ in ("it is there", "it is gone"):
            check(chat.http.delete(path.replace("{response_id}", stored)), path, "delete")
        check(chat.http.get(path.replace("{response_id}", stored)), path, "get")


def test_a_missing_key_and_a_wrong_parameter_are_as_described(chat: FakeServer) -> None:
    with fake_server(keys=KeyRing(keys=["0123456789abcdef"])) as locked:
        check(locked.post({}, "/v1/chat/completions"), "/v1/chat/completions")
        check(locked.http.get("/version"), "/version", "get")
    response = chat.http.get("/engine", params={"after": "x"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "after"
    check(response, "/engine", "get")


def test_the_page_needs_no_script_and_nothing_from_elsewhere(server: FakeServer) -> None:
    response = server.http.get("/docs")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    html = response.text
    assert "<script" not in html and " style=" not in html and not re.search(r'(src|href)="(https?:|//)', html)
    assert all(f'id="{name}"' in html for name in SCHEMAS)
    anchors = set(re.findall(r'href="#([^"]*)"', html))
    assert anchors <= set(re.findall(r'id="([^"]*)"', html))
    assert "curl &quot;$URL/v1/chat/completions&quot;" in html


def test_the_description_can_be_switched_off() -> None:
    with fake_server(docs=False) as server:
        assert server.http.get("/docs").status_code == 404 and server.http.get("/openapi.json").status_code == 404
