"""Traces: what a receiver of OTLP gets of a request, and that nothing of OpenTelemetry is loaded without one."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from app.client.local import LocalEngineClient
from app.core.config import EngineConfig
from app.observability.tracing import RequestTracer
from tests.contract.serving import MODEL, FakeServer, Running, fake_server, make_context, running, wait_until
from tests.contract.test_chat import TEMPLATE
from tests.fuzz.run import scripted_server
from tests.text_tokenizers import byte_level

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Receiver:
    """Takes spans on a loopback port."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                receiver.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            self.resource = attributes(resource.resource)
            for scope in resource.scope_spans:
                self.spans += scope.spans


def attributes(owner: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {one.key: plain(one.value) for one in owner.attributes}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, daemon=True)
    thread.start()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()
    thread.join()


@contextmanager
def traced_server(receiver: Receiver, **options: Any) -> Iterator[FakeServer]:
    """A server that sends its spans when it ends, if not before."""
    tracer = RequestTracer(receiver.endpoint, version="0.0-test")
    with fake_server(tracer=tracer, runs_engine=True, **options) as server:
        yield server


def by_name(spans: list[Span]) -> dict[str, Span]:
    named = {span.name: span for span in spans}
    assert len(named) == len(spans)
    return named


def test_a_request_is_a_span_with_queue_prefill_and_decode(receiver: Receiver) -> None:
    with traced_server(receiver, chat_template=TEMPLATE) as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0.5, "stream": True}
        answer = server.post(body, "/v1/chat/completions", traceparent=PARENT, **{"x-request-id": "id-1"})
        assert answer.status_code == 200
        server.http.get("/health")
        server.http.get("/metrics")
    spans = by_name(receiver.spans)
    assert set(spans) == {f"chat {MODEL}", "queue", "prefill", "decode"}
    assert receiver.resource["service.name"] == "headwater" and receiver.resource["service.version"] == "0.0-test"
    root = spans.pop(f"chat {MODEL}")
    assert root.trace_id.hex() == PARENT.split("-")[1] and root.parent_span_id.hex() == PARENT.split("-")[2]
    assert root.kind == Span.SPAN_KIND_SERVER
    said = attributes(root)
    assert (
        said.items()
        >= {
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "http.response.status_code": 200,
            "headwater.request.id": "id-1",
            "headwater.engine.generation": 1,
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": MODEL,
            "gen_ai.request.max_tokens": 6,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.usage.output_tokens": 6,
        }.items()
    )
    assert said["gen_ai.response.finish_reasons"] == ["length"] and said["gen_ai.usage.input_tokens"] > 0
    times = [root.start_time_unix_nano]
    for name in ("queue", "prefill", "decode"):
        child = spans[name]
        assert (child.trace_id, child.parent_span_id) == (root.trace_id, root.span_id)
        times += [child.start_time_unix_nano, child.end_time_unix_nano]
    times.append(root.end_time_unix_nano)
    assert times == sorted(times)
    assert spans["decode"].start_time_unix_nano == spans["prefill"].end_time_unix_nano
    assert "Hi" not in {str(value) for span in receiver.spans for value in attributes(span).values()}


def test_each_sample_has_its_own_children(receiver: Receiver) -> None:
    with traced_server(receiver) as server:
        server.complete(n=3, max_tokens=2)
    decodes = [span for span in receiver.spans if span.name == "decode"]
    assert sorted(attributes(span)["headwater.sequence.index"] for span in decodes) == [0, 1, 2]
    (root,) = [span for span in receiver.spans if not span.parent_span_id]
    assert root.name == f"text_completion {MODEL}" and attributes(root)["gen_ai.request.choice.count"] == 3


def test_refusals_and_failures(receiver: Receiver) -> None:
    with traced_server(receiver) as server:
        assert server.post({"prompt": "a", "temperature": 9}).status_code == 400
        server.engine.fail_at = 2
        assert server.post({"prompt": "a"}).status_code == 500
        assert server.post({"prompt": "a", "stream": True}).status_code == 200
    roots = [span for span in receiver.spans if not span.parent_span_id]
    refused, failed, late = roots
    assert refused.name == "POST /v1/completions" and refused.status.code == 0
    assert attributes(failed)["error.type"] == attributes(late)["error.type"] == "engine_failed"
    assert (failed.status.code, late.status.code) == (2, 2)


def test_a_parent_that_is_not_sampled_is_left_alone(receiver: Receiver) -> None:
    with traced_server(receiver) as server:
        assert server.post({"prompt": "a"}, traceparent=PARENT[:-2] + "00").status_code == 200
    assert receiver.spans == []


def test_a_hand_over_is_an_event(receiver: Receiver) -> None:
    tokenizer = byte_level()
    script: dict[str, float | int | str] = {
        "tokens": "40,41",
        "vocab_size": tokenizer.vocab_size,
        "max_model_len": 512,
        "step_seconds": 0.02,
    }
    config = EngineConfig(model_dir="none", tier="scripted", num_kv_blocks=64, eos_token_ids=(1,), scripted=script)
    engine = LocalEngineClient(config)
    tracer = RequestTracer(receiver.endpoint, version="0.0-test")
    context = make_context(engine, tokenizer=tokenizer, runs_engine=True, tracer=tracer)
    with running(context) as port:
        server = Running(port, context)
        wait_until(lambda: server.http.get("/ready").status_code == 200)
        body = {"model": MODEL, "prompt": "Hi", "stream": True, "max_tokens": 60}
        with server.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            assert engine.engine_pid is not None
            os.kill(engine.engine_pid, signal.SIGKILL)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        server.http.close()
        server.client.close()
    root = by_name(receiver.spans)[f"text_completion {MODEL}"]
    (event,) = root.events
    assert event.name == "headwater.hand_over"
    assert attributes(event) == {"generation": 2, "exact": True}
    assert attributes(root)["headwater.engine.generation"] == 1
    assert root.start_time_unix_nano < event.time_unix_nano < root.end_time_unix_nano


def test_a_receiver_that_is_away_costs_nothing_but_spans() -> None:
    tracer = RequestTracer("http://127.0.0.1:9/v1/traces", version="0.0-test")
    with fake_server(tracer=tracer, runs_engine=True) as server:
        assert server.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_nothing_is_imported_when_it_is_off() -> None:
    done = run(
        "import sys, app.serve, app.main, app.api.app\n"
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter', 'opentelemetry.proto', 'google.protobuf')\n"
        "assert app.main.make_tracer(None, version='0') is None\n"
        "sys.exit(', '.join(name for name in sys.modules if name.startswith(heavy)) or 0)"
    )
    assert done.returncode == 0, done.stderr


def test_without_the_extra_the_start_ends_with_what_to_install() -> None:
    done = run(
        "import sys\n"
        "sys.modules['opentelemetry.sdk'] = None\n"
        "from app.observability.tracing import make_tracer\n"
        "make_tracer('http://127.0.0.1:4318/v1/traces', version='0')"
    )
    assert "ConfigurationError" in done.stderr and "pip install 'headwater[otel]'" in done.stderr


def test_the_flag_makes_a_server_send(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    with scripted_server(tmp_path / "log", "--otlp-traces-endpoint", receiver.endpoint) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        wait_until(lambda: len(receiver.spans) == 4)
