"""Each thing that a client can get wrong: the right status, OpenAI's error body, the field, and no cost."""

import json
from typing import Any

import openai
import pytest

from app.api.deps import ApiLimits
from app.api.schemas.field_rules import UnknownFields
from app.api.schemas.fields import COMPLETIONS
from tests.contract.serving import MODEL, FakeServer, fake_server

LONG = 10_000

ROWS: list[tuple[str, Any, int, str | None]] = [
    ("wrong-type-model", {"prompt": "a", "model": 5}, 400, "model"),
    ("wrong-type-prompt", {"prompt": 5}, 400, "prompt"),
    ("wrong-type-nested", {"prompt": [[1, 2], [3, "x"]]}, 400, "prompt[1][1]"),
    ("wrong-type-bool-for-int", {"prompt": "a", "n": True}, 400, "n"),
    ("wrong-type-string-for-int", {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
    ("wrong-type-int-for-bool", {"prompt": "a", "stream": 1}, 400, "stream"),
    ("wrong-type-stop", {"prompt": "a", "stop": [1]}, 400, "stop[0]"),
    ("wrong-type-logit-bias", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("wrong-type-option", {"prompt": "a", "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
    ("unknown-field", {"prompt": "a", "top_pp": 1}, 400, "top_pp"),
    ("unknown-option", {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options"),
    ("no-prompt", {}, 400, "prompt"),
    ("null-prompt", {"prompt": None}, 400, "prompt"),
    ("empty-prompt", {"prompt": ""}, 400, "prompt"),
    ("empty-prompt-list", {"prompt": []}, 400, "prompt"),
    ("empty-prompt-in-list", {"prompt": ["a", ""]}, 400, "prompt"),
    ("empty-ids-in-list", {"prompt": [[1], []]}, 400, "prompt"),
    ("mixed-prompt", {"prompt": [1, "a"]}, 400, "prompt"),
    ("1025-prompts", {"prompt": ["a"] * 1025}, 400, "prompt"),
    ("350000-prompts", {"prompt": [[5]] * 350_000}, 400, "prompt"),
    ("350000-prompts-of-both-kinds", {"prompt": ["a", *[[5]] * 350_000]}, 400, "prompt"),
    ("prompts-times-n", {"prompt": ["a"] * 600, "n": 2}, 400, "n"),
    ("long-prompt", {"prompt": "Hi " * 300}, 400, "prompt"),
    ("very-long-prompt", {"prompt": "你" * LONG}, 400, "prompt"),
    ("long-ids", {"prompt": [5] * 256}, 400, "prompt"),
    ("second-prompt-long", {"prompt": ["a", "Hi " * 300]}, 400, "prompt"),
    ("token-outside", {"prompt": [5, 303]}, 400, "prompt"),
    ("token-outside-nested", {"prompt": [[5], [6, 2**40]]}, 400, "prompt[1][1]"),
    ("token-negative", {"prompt": [-1]}, 400, "prompt[0]"),
    ("token-above-64-bit", {"prompt": [2**70]}, 400, "prompt[0]"),
    ("max-tokens-0", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("max-tokens-negative", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    ("max-tokens-float", {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
    ("max-tokens-over-context", {"prompt": "a", "max_tokens": 257}, 400, "max_tokens"),
    ("allowed-ids-banned", {"prompt": "a", "allowed_token_ids": [45], "bad_words": ["L"]}, 400, "allowed_token_ids"),
    ("allowed-ids-end", {"prompt": "a", "allowed_token_ids": [1], "min_tokens": 1}, 400, "allowed_token_ids"),
    ("min-over-max", {"prompt": "a", "max_tokens": 3, "min_tokens": 4}, 400, "min_tokens"),
    ("n-0", {"prompt": "a", "n": 0}, 400, "n"),
    ("n-10000", {"prompt": "a", "n": LONG}, 400, "n"),
    ("stop-10000", {"prompt": "a", "stop": ["x"] * LONG}, 400, "stop"),
    ("stop-17", {"prompt": "a", "stop": ["x"] * 17}, 400, "stop"),
    ("stop-empty", {"prompt": "a", "stop": ["x", ""]}, 400, "stop[1]"),
    ("logprobs-21", {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    ("logprobs-negative", {"prompt": "a", "logprobs": -1}, 400, "logprobs"),
    ("prompt-logprobs-21", {"prompt": "a", "prompt_logprobs": 21}, 400, "prompt_logprobs"),
    ("prompt-logprobs-stream", {"prompt": "a", "prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
    ("temperature-negative", {"prompt": "a", "temperature": -0.1}, 400, "temperature"),
    ("temperature-high", {"prompt": "a", "temperature": 2.1}, 400, "temperature"),
    ("top-p-0", {"prompt": "a", "top_p": 0}, 400, "top_p"),
    ("top-p-high", {"prompt": "a", "top_p": 1.01}, 400, "top_p"),
    ("top-k", {"prompt": "a", "top_k": -2}, 400, "top_k"),
    ("min-p", {"prompt": "a", "min_p": 1.5}, 400, "min_p"),
    ("presence", {"prompt": "a", "presence_penalty": 2.5}, 400, "presence_penalty"),
    ("frequency", {"prompt": "a", "frequency_penalty": -2.5}, 400, "frequency_penalty"),
    ("repetition", {"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("tiny-repetition", {"prompt": "a", "repetition_penalty": 1e-38}, 400, "repetition_penalty"),
    ("seed-high", {"prompt": "a", "seed": 2**63}, 400, "seed"),
    ("seed-low", {"prompt": "a", "seed": -(2**63) - 1}, 400, "seed"),
    ("bias-outside", {"prompt": "a", "logit_bias": {"303": 1}}, 400, "logit_bias"),
    ("bias-high", {"prompt": "a", "logit_bias": {"3": 101}}, 400, "logit_bias"),
    ("bias-no-number", {"prompt": "a", "logit_bias": {"3": "x"}}, 400, "logit_bias"),
    ("bias-1025", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias"),
    ("allowed-empty", {"prompt": "a", "allowed_token_ids": []}, 400, "allowed_token_ids"),
    ("allowed-outside", {"prompt": "a", "allowed_token_ids": [303]}, 400, "allowed_token_ids"),
    ("stop-token-outside", {"prompt": "a", "stop_token_ids": [-1]}, 400, "stop_token_ids[0]"),
    ("copied-often", {"prompt": "a", "n": 1024, "bad_words": [a * 1000 for a in "vwxyz"]}, 400, "n"),
    ("bad-word-empty", {"prompt": "a", "bad_words": [""]}, 400, "bad_words[0]"),
    ("truncate-0", {"prompt": "a", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
    ("truncate-high", {"prompt": "a", "truncate_prompt_tokens": 257}, 400, "truncate_prompt_tokens"),
    ("truncation-side-alone", {"prompt": "a", "truncation_side": "left"}, 400, "truncation_side"),
    ("options-without-stream", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("best-of", {"prompt": "a", "n": 2, "best_of": 3}, 400, "best_of"),
    ("suffix", {"prompt": "a", "suffix": "z"}, 400, "suffix"),
    ("response-format", {"prompt": "a", "response_format": {"type": "yaml"}}, 400, "response_format.type"),
    ("store", {"prompt": "a", "store": True}, 400, "store"),
    ("salt", {"prompt": "a", "cache_salt": "x" * 129}, 400, "cache_salt"),
    ("request-id", {"prompt": "a", "request_id": "a b"}, 400, "request_id"),
    ("request-id-newline", {"prompt": "a", "request_id": "ab\n"}, 400, "request_id"),
    ("unknown-model", {"prompt": "a", "model": "gpt-5"}, 404, "model"),
    *((f"refused-{one.name}", {"prompt": "a", one.name: 1}, 400, one.name) for one in COMPLETIONS.refused),
]  # fmt: skip

RAW_ROWS: list[tuple[str, bytes, str | None]] = [
    ("broken", b'{"prompt": "a"', None),
    ("empty", b"", None),
    ("blank", b" \r\n", None),
    ("not-an-object", b'["prompt"]', None),
    ("trailing", b'{"prompt": "a"} x', None),
    ("single-quotes", b"{'prompt': 'a'}", None),
    ("nan", b'{"prompt": "a", "temperature": NaN}', "temperature"),
    ("infinity", b'{"prompt": "a", "top_p": Infinity}', "top_p"),
    ("minus-infinity", b'{"prompt": "a", "logit_bias": {"5": -Infinity}}', "logit_bias.5"),
    ("1e999", b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    ("lone-surrogate", b'{"prompt": "a\\ud800b"}', "prompt"),
    ("lone-surrogate-in-list", b'{"prompt": "a", "stop": ["x", "\\udfff"]}', "stop[1]"),
    ("raw-surrogate", b'{"prompt": "a\xed\xa0\x80"}', None),
    ("not-utf-8", b'{"prompt": "\xff"}', None),
    ("deep", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ("deep-in-unknown-field", b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ("deep-in-label", b'{"prompt": "a", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
]


@pytest.fixture(autouse=True)
def _costs_the_engine_nothing(server: FakeServer) -> Any:
    yield
    assert server.engine.requests == []


def check_error(error: dict[str, Any], param: str | None) -> None:
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "?")) and len(error["message"]) < 400
    assert error["param"] == param
    assert param is None or param.partition("[")[0].partition(".")[0] in error["message"]


@pytest.mark.parametrize(("body", "status", "param"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_bad_field_is_named(server: FakeServer, body: Any, status: int, param: str | None) -> None:
    response = server.post(body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and "x-request-id" in response.headers
    check_error(response.json()["error"], param)


@pytest.mark.parametrize(("body", "param"), [row[1:] for row in RAW_ROWS], ids=[row[0] for row in RAW_ROWS])
def test_a_bad_body_is_a_400(server: FakeServer, body: bytes, param: str | None) -> None:
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    check_error(response.json()["error"], param)
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize", "/detokenize"]
)
def test_a_body_of_countless_fields_is_refused_before_they_are_sorted(server: FakeServer, path: str) -> None:
    body = {"model": MODEL} | {f"x{index}": None for index in range(256)}
    response = server.post(body, path)
    assert response.status_code == 400 and "257 fields" in response.json()["error"]["message"]


def test_a_stream_refused_is_a_real_status(server: FakeServer) -> None:
    response = server.post({"prompt": "a", "n": 0, "stream": True})
    assert response.status_code == 400 and response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("value", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_wrong_content_type_is_a_415(server: FakeServer, value: str) -> None:
    response = server.post({"prompt": "a"}, **{"content-type": value})
    assert response.status_code == 415
    check_error(response.json()["error"], None)


def test_a_compressed_body_is_a_415(server: FakeServer) -> None:
    assert server.post({"prompt": "a"}, **{"content-encoding": "gzip"}).status_code == 415


def test_a_long_body_is_a_413(server: FakeServer) -> None:
    body = json.dumps({"prompt": "a" * 2**21}).encode()
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 413
    check_error(response.json()["error"], None)
    chunked = server.http.post(
        "/v1/completions",
        content=(body[start : start + 65536] for start in range(0, len(body), 65536)),
        headers={"content-type": "application/json"},
    )
    assert chunked.status_code == 413


def test_openais_client_raises_its_own_classes(server: FakeServer) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        server.client.completions.create(model=MODEL, prompt="a", temperature=9)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    assert bad.value.request_id is not None
    with pytest.raises(openai.NotFoundError) as missing:
        server.client.completions.create(model="nope", prompt="a")
    assert missing.value.code == "model_not_found"


def test_unknown_fields_can_be_reported(server: FakeServer) -> None:
    with fake_server(limits=ApiLimits(unknown_fields=UnknownFields.REPORT)) as lenient:
        response = lenient.post({"prompt": "a", "zzz": 1, "bad\r\nname": 2, "user": "u", "max_tokens": 1})
        assert response.status_code == 200
        assert response.headers["headwater-ignored"] == "user, zzz, and 1 more"
        assert lenient.post({"prompt": "a", "guided_json": {}}).status_code == 400


def test_the_tokenizer_routes_refuse_the_same_way(server: FakeServer) -> None:
    assert server.post({"prompt": 5}, "/tokenize").json()["error"]["param"] == "prompt"
    assert server.post({"tokens": [303]}, "/detokenize").json()["error"]["param"] == "tokens"
    assert server.post({"prompt": "a", "messages": []}, "/tokenize").status_code == 400
    assert server.post({"prompt": "a", "model": "nope"}, "/tokenize").status_code == 404
    assert server.http.post("/tokenize", content=b"x").status_code == 415
