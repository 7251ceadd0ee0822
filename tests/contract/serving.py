"""A real server on a loopback port, in a thread of the test, around any engine client."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import uvicorn

from app.api.admission import Admission, AdmissionLimits
from app.api.app import create_app
from app.api.connections import ConnectionRoom
from app.api.deps import ApiLimits, OpenAIDefaults, SamplingDefaults, ServerContext
from app.api.kept import KeptStreams
from app.api.key_ring import KeyRing
from app.api.protocol import BoundedHttpProtocol
from app.api.responses_store import ResponseStore
from app.client.engine_client import EngineClient
from app.observability.metrics import Metrics
from app.observability.tracing import RequestTracer
from app.text import ChatTemplate, Tokenizer
from app.text.reasoning import ReasoningForm
from tests.contract.fake_engine import FakeEngine, fake_limits
from tests.text_tokenizers import byte_level

MODEL = "test-model"
TEXT = "Hello 你好, 世界! 🌍🚀 naïve café.\n\n1. 今天天气很好 👩‍👩‍👧‍👦 the end of it"
"""What the fake engine says: in its tokenizer most Chinese characters and emoji are several tokens."""
PATIENCE = 10.0


@dataclass
class Running:
    """A server that answers at `url`."""

    port: int
    context: ServerContext
    http: httpx.Client = field(init=False)
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, body: object, path: str = "/v1/completions", **headers: str) -> httpx.Response:
        """Post a JSON value."""
        content = json.dumps(body, ensure_ascii=False).encode()
        return self.http.post(path, content=content, headers={"content-type": "application/json"} | headers)

    def complete(self, **fields: Any) -> dict[str, Any]:
        """Post a completion that must succeed; the decoded answer."""
        response = self.post({"model": MODEL, "prompt": "Hi"} | fields)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, **fields: Any) -> list[dict[str, Any]]:
        """Post a streamed completion that must succeed; its decoded chunks, without [DONE]."""
        response = self.post({"model": MODEL, "prompt": "Hi", "stream": True} | fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return chunks_of(response.text)

    def sample(self, stem: str, **labels: str) -> float:
        """One value of /metrics, 0 where it is not there."""
        metrics = self.context.metrics
        base = {"model_name": MODEL, "engine": "0"} if "handler" not in labels and "reason" not in labels else {}
        value = metrics.registry.get_sample_value(metrics.name(stem), base | labels)
        return 0.0 if value is None else value


@dataclass
class FakeServer(Running):
    """A server around a `FakeEngine`."""

    engine: FakeEngine

    def is_idle(self) -> bool:
        """Nothing is in flight: not in the engine, not in admission."""
        admission = self.context.admission
        counts = (admission.num_live_sequences, admission.num_waiting_tokens, admission.num_parsing_bytes)
        return not self.engine.live and counts == (0, 0, 0)


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The JSON events of a stream, which must end with [DONE]."""
    events = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def message_events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream of `/v1/messages`, each named by its type."""
    events = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    found: list[dict[str, Any]] = []
    for event in events:
        name, _, data = event.removeprefix("event: ").partition("\ndata: ")
        found.append(json.loads(data))
        assert found[-1]["type"] == name
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for another thread to bring something about."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def make_context(
    engine: EngineClient,
    *,
    tokenizer: Tokenizer,
    limits: ApiLimits | None = None,
    admission: AdmissionLimits | None = None,
    defaults: SamplingDefaults | None = None,
    chat_template: ChatTemplate | None = None,
    keys: KeyRing | None = None,
    metrics_keys: KeyRing | None = None,
    allowed_origins: tuple[str, ...] = (),
    allowed_hosts: tuple[str, ...] | None = None,
    docs: bool = True,
    prefix: str = "headwater_",
    runs_engine: bool = False,
    tracer: RequestTracer | None = None,
    page: bool = True,
    responses: ResponseStore | None = None,
    kept: KeptStreams | None = None,
    reasoning: ReasoningForm | None = None,
) -> ServerContext:
    """A context with what a test does not care about filled in."""
    metrics = Metrics(model_name=MODEL, prefix=prefix)
    return ServerContext(
        engine=engine,
        tokenizer=tokenizer,
        model_names=(MODEL, "alias/of-it"),
        metrics=metrics,
        admission=Admission(AdmissionLimits() if admission is None else admission, metrics=metrics),
        sampling_defaults=OpenAIDefaults() if defaults is None else defaults,
        chat_template=chat_template,
        reasoning=reasoning,
        keys=keys,
        metrics_keys=metrics_keys,
        allowed_origins=allowed_origins,
        allowed_hosts=allowed_hosts,
        responses=ResponseStore() if responses is None else responses,
        docs=docs,
        limits=ApiLimits() if limits is None else limits,
        kept=KeptStreams() if kept is None else kept,
        version="0.0-test",
        runs_engine=runs_engine,
        tracer=tracer,
        page=page,
    )


@contextmanager
def running(
    context: ServerContext, *, protocol: type[BoundedHttpProtocol] = BoundedHttpProtocol, most: int = 1000
) -> Iterator[int]:
    """Serve `context` with uvicorn in a thread; the port. The thread ends with the block."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    class Protocol(protocol):  # type: ignore[misc,valid-type]  # a base that mypy cannot follow
        room = ConnectionRoom(most, metrics=context.metrics)

    config = uvicorn.Config(
        create_app(context),
        http=Protocol,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive()


@contextmanager
def fake_server(
    *,
    text: str = TEXT,
    max_model_len: int = 256,
    protocol: type[BoundedHttpProtocol] = BoundedHttpProtocol,
    most: int = 1000,
    **options: Any,
) -> Iterator[FakeServer]:
    """A server around a `FakeEngine` that says `text`, for `most` connections; `options` go to `make_context`."""
    tokenizer = byte_level()
    script = tuple(tokenizer.encode_now(text, False))
    limits = fake_limits(vocab_size=tokenizer.vocab_size, max_model_len=max_model_len)
    engine = FakeEngine(script, limits)
    context = make_context(engine, tokenizer=tokenizer, **options)
    with running(context, protocol=protocol, most=most) as port:
        server = FakeServer(port, context, engine=engine)
        try:
            yield server
        finally:
            server.http.close()
            server.client.close()
