"""The routes around generation: models, probes, metrics, tokenizer, documentation, and what is not there."""

import io
import json
import logging
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.client.engine_client import EngineState
from app.observability.logging import configure_logging
from tests.contract.serving import MODEL, FakeServer, fake_server, wait_until
from tests.text_tokenizers import byte_level


def test_models(server: FakeServer) -> None:
    listed = server.client.models.list().data
    assert [model.id for model in listed] == [MODEL, "alias/of-it"]
    for name in (MODEL, "alias/of-it"):
        entry = server.http.get(f"/v1/models/{name}").json()
        assert entry["id"] == name and entry["object"] == "model" and entry["root"] == MODEL
        assert (entry["max_model_len"], entry["fingerprint"], entry["tier"]) == (256, "fp-test", "scripted")
        assert entry["row_independent"] is True
        answer = server.complete(model=name, max_tokens=1)
        assert answer["model"] == MODEL, "the first name, as vLLM has it"
    assert server.http.get("/v1/models/nope").json()["error"]["code"] == "model_not_found"


def test_probes(server: FakeServer) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    ready = server.http.get("/ready")
    assert ready.status_code == 200
    assert (ready.json()["state"], ready.json()["generation"], ready.json()["row_independent"]) == ("ready", 1, True)
    assert server.http.get("/version").json() == {"version": "0.0-test"}


def test_a_failed_engine_makes_the_process_unhealthy() -> None:
    with fake_server() as server:
        server.engine.state = EngineState.FAILED
        assert server.http.get("/health").status_code == 503
        assert server.http.get("/ready").json()["state"] == "failed"


def test_tokenize_and_back(server: FakeServer) -> None:
    text = "Hi 你好 🌍\n\n1. <|end|>"
    ids = byte_level().encode_now(text)
    answer = server.post({"prompt": text, "return_token_strs": True, "model": MODEL}, "/tokenize").json()
    assert answer["tokens"] == ids and answer["count"] == len(ids) and answer["max_model_len"] == 256
    assert answer["token_strs"] == [byte_level().token_text(token_id) for token_id in ids]
    assert server.post({"prompt": text}, "/tokenize").json()["token_strs"] is None
    assert server.post({"tokens": ids}, "/detokenize").json() == {"prompt": text}
    info = server.http.get("/tokenizer_info").json()
    assert info == {"vocab_size": 303, "bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": None}


@pytest.mark.parametrize(("method", "path"), [("GET", "/nope"), ("POST", "/v1"), ("GET", "/v1/completions/")])
def test_unknown_routes_are_404(server: FakeServer, method: str, path: str) -> None:
    response = server.http.request(method, path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error" and "x-request-id" in response.headers


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_with_head(server: FakeServer, path: str) -> None:
    for _ in range(2):  # nothing stays behind on the connection
        head, whole = server.http.head(path), server.http.get(path)
        assert head.status_code == whole.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == whole.headers["content-length"]


def test_wrong_methods_are_405(server: FakeServer) -> None:
    response = server.http.get("/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert server.http.put("/v1/responses/x").headers["allow"] == "DELETE, GET"


def test_the_documentation_knows_every_field(server: FakeServer) -> None:
    document = server.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    operation = document["paths"]["/v1/completions"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    properties = schemas[reference.rpartition("/")[2]]["properties"]
    assert {"prompt", "max_tokens", "stop", "logprobs"} <= set(properties)
    text = json.dumps(document)
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(schemas)
    assert server.http.get("/docs").status_code == 200


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_metrics_parse(server: FakeServer, accept: str) -> None:
    server.complete(max_tokens=3)
    response = server.http.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith(accept.partition(";")[0])
    names = {family.name for family in text_string_to_metric_families(response.text)}
    assert all(name.startswith("headwater_") for name in names)
    assert {"headwater_num_requests_running", "headwater_time_to_first_token_seconds"} <= names


def test_promtool_accepts_the_metrics(server: FakeServer) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    text = server.http.get("/metrics").content
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    # Exit status 3 is style: vLLM's names are not all in Prometheus's.
    assert done.returncode in (0, 3), done.stderr


def test_the_prefix_makes_vllms_names() -> None:
    with fake_server(prefix="vllm:") as server:
        server.complete(max_tokens=3)
        text = server.http.get("/metrics").text
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prompt_tokens_total",
            "generation_tokens_total",
            "request_success_total",
            "time_to_first_token_seconds_bucket",
            "inter_token_latency_seconds_bucket",
            "request_time_per_output_token_seconds_bucket",
            "e2e_request_latency_seconds_bucket",
            "request_queue_time_seconds_sum",
            "request_prefill_time_seconds_sum",
            "request_decode_time_seconds_sum",
            "iteration_tokens_total_count",
            "num_preemptions_total",
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
            "cache_config_info",
        ):
            assert f"\nvllm:{name}{{" in text, name
        assert 'model_name="test-model"' in text and "headwater" not in text


def test_one_log_line_a_request_without_its_text() -> None:
    stream = io.StringIO()
    kept = {name: logging.getLogger(name).handlers for name in ("headwater", "uvicorn")}
    configure_logging(form="json", stream=stream)
    try:
        with fake_server() as server:
            server.post(
                {"prompt": "a secret prompt", "max_tokens": 5, "n": 2, "user": "me"}, **{"x-request-id": "id-1"}
            )
            server.post({"prompt": "a secret prompt", "temperature": 9}, **{"x-request-id": "id-2"})
            server.http.get("/nope/secret", headers={"x-forwarded-for": "192.0.2.7"})
            server.http.get("/health")
            wait_until(lambda: "unmatched" in stream.getvalue())
    finally:
        for name, handlers in kept.items():
            logging.getLogger(name).handlers = handlers
            logging.getLogger(name).propagate = True
    text = stream.getvalue()
    assert "secret" not in text and "Hello" not in text
    first, second, third = (json.loads(line) for line in text.splitlines() if '"headwater.request"' in line)
    assert (first["request_id"], first["route"], first["method"], first["status"]) == (
        "id-1",
        "/v1/completions",
        "POST",
        200,
    )
    num_prompt = len(byte_level().encode_now("a secret prompt"))
    assert (first["sequences"], first["prompt_tokens"], first["output_tokens"]) == (2, 2 * num_prompt, 10)
    assert first["finish"] == {"length": 2} and first["generation"] == 1 and first["cached_tokens"] == 0
    assert 0 < first["ttft_s"] <= first["total_s"] and first["queue_s"] == 0.001 and first["key_id"] is None
    assert (second["status"], second["error"]) == (400, "invalid_request_error")
    assert (third["route"], third["status"]) == ("unmatched", 404)
    # A proxy on loopback is believed; whoever asks from there without one is loopback itself.
    assert (first["client"], third["client"]) == ("127.0.0.1", "192.0.2.7")
