"""What every route needs, as one frozen value made by the composition root."""

import time
from dataclasses import dataclass, field
from typing import Protocol

from app.api.admission import Admission
from app.api.kept import KeptStreams
from app.api.key_ring import KeyRing
from app.api.responses_store import ResponseStore
from app.api.schemas.field_rules import UnknownFields
from app.client.engine_client import EngineClient
from app.core.errors import EngineUnavailable, NotFound
from app.core.types import EngineLimits
from app.grammar.check import GrammarChecker
from app.observability.engine_gauges import EngineSnapshot
from app.observability.metrics import Metrics
from app.observability.tracing import RequestTracer
from app.text.chat_template import ChatTemplate
from app.text.reasoning import ReasoningForm
from app.text.tokenizer import Tokenizer


class SamplingDefaults(Protocol):
    """Defaults of a model's generation_config.json; None where it says nothing."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class OpenAIDefaults:
    """OpenAI's defaults: the model's own recommendations are left aside."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Bounds and habits of the HTTP side that an operator may set."""

    max_body_size: int = 2 * 1024 * 1024
    """Bytes."""
    body_timeout: float = 60.0
    """Seconds from a request's headers to the end of its body."""
    keep_alive_interval: float = 10.0
    """Seconds without a byte after which a stream sends its headers or a comment."""
    request_timeout: float | None = None
    """Seconds from a generating request's head to its last token."""
    queue_timeout: float | None = None
    """Seconds to its first output."""
    unknown_fields: UnknownFields | None = None
    """None: each endpoint's own default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContext:
    """The parts of a server. Routes read it, none changes it."""

    engine: EngineClient
    tokenizer: Tokenizer
    model_names: tuple[str, ...]
    """Names that requests may use; the first is the default."""
    metrics: Metrics
    admission: Admission
    sampling_defaults: SamplingDefaults
    chat_template: ChatTemplate | None = None
    """None: the model has none, and no messages are taken."""
    reasoning: ReasoningForm | None = None
    """How the model writes its reasoning; None: whatever it writes is its answer."""
    grammars: GrammarChecker = field(default_factory=GrammarChecker)
    responses: ResponseStore = field(default_factory=ResponseStore)
    """Answers of /v1/responses that are kept."""
    limits: ApiLimits = field(default_factory=ApiLimits)
    kept: KeptStreams = field(default_factory=KeptStreams)
    """Streams that clients may go on with."""
    version: str
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time for /v1/models."""
    keys: KeyRing | None = None
    """None: no request needs a key."""
    metrics_keys: KeyRing | None = None
    """Keys that open /metrics and nothing else."""
    metrics_apart: bool = False
    """Whether /metrics has an address of its own (`create_metrics_app`) and is not served here."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names that requests may have as Host, ports aside; None: any."""
    tracer: RequestTracer | None = None
    """None: no traces."""
    docs: bool = True
    """Whether /docs and /openapi.json are served."""
    page: bool = True
    """Whether `/` answers with the page for a browser."""
    runs_engine: bool = False
    """Whether the application's lifespan starts and stops the engine client."""
    drain_timeout: float = 0.0
    """Seconds that live sequences get to finish at shutdown, with `runs_engine`."""

    def ready_limits(self) -> EngineLimits:
        """Limits of the engine. Raises EngineUnavailable while no new sequence is admitted."""
        status, limits = self.engine.status, self.engine.limits
        if not status.takes_requests or limits is None:
            raise EngineUnavailable(f"The engine is {status.state.value}. Try again shortly.")
        return limits

    def known_limits(self) -> EngineLimits:
        """Limits of the last engine, even while it is replaced. Raises EngineUnavailable before the first."""
        limits = self.engine.limits
        if limits is None:
            raise EngineUnavailable(f"The engine is {self.engine.status.state.value}. Try again shortly.")
        return limits

    def check_model(self, name: str | None) -> str:
        """The name to answer with: the first, whichever was asked for. Raises NotFound for one that is not served."""
        if name is not None and name not in self.model_names:
            short = name if len(name) <= 128 else name[:128] + "…"
            raise NotFound(
                f"The model `{short}` does not exist here; GET /v1/models lists what does.",
                param="model",
                code="model_not_found",
            )
        return self.model_names[0]

    def engine_snapshot(self) -> EngineSnapshot:
        """The engine as the gauges see it."""
        status = self.engine.status
        return EngineSnapshot(
            state=status.state.value,
            generation=status.generation,
            num_live_sequences=status.num_live_requests,
            last_step=status.last_step,
            limits=self.engine.limits,
        )
