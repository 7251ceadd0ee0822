"""Composition root of the API process: settings and a model become an application.

`uvicorn app.main:app` serves with the settings of the environment; the application then starts and stops
its own engine. `headwater serve` (`app.serve`) starts the engine first and imports this module while it
loads.
"""

from collections.abc import Iterator
from pathlib import Path

from fastapi import FastAPI

from app import __version__
from app.access import make_keys, make_metrics_keys
from app.api.admission import Admission, AdmissionLimits
from app.api.app import create_app as create_api
from app.api.deps import ApiLimits, OpenAIDefaults, ServerContext
from app.api.hosts import loopback_hosts
from app.api.kept import KeptStreams
from app.api.key_ring import KeyRing
from app.api.responses_store import ResponseStore
from app.api.schemas.field_rules import UnknownFields
from app.client.engine_client import EngineClient
from app.client.local import LocalEngineClient
from app.client.process import EngineLaunch, EngineProcess
from app.core.config import EngineConfig
from app.observability.logging import configure_logging
from app.observability.metrics import Metrics
from app.observability.tracing import RequestTracer, make_tracer
from app.settings import Settings, load_settings
from app.store import ModelFolder
from app.text.chat_template import ChatTemplate
from app.text.reasoning import FORMS, ReasoningForm
from app.text.tokenizer import Tokenizer
from app.weights import find_model


def create_app(settings: Settings | None = None, engine_client: EngineClient | None = None) -> FastAPI:
    """An application that starts its engine with its lifespan and ends it with that.

    Raises ConfigurationError where settings or model do not fit.
    """
    settings = load_settings() if settings is None else settings
    configure_logging(level=settings.log_level, form=settings.log_format)
    folder = find_model(settings)
    metrics = make_metrics(settings, folder)
    if engine_client is None:
        config = settings.to_engine_config(str(folder.path), folder.eos_token_ids)
        launch = EngineLaunch(log_level=settings.log_level, log_format=settings.log_format)
        engine_client = make_engine_client(settings, config, launch=launch, metrics=metrics)
    tracer = make_tracer(settings.otlp_traces_endpoint, version=__version__)
    context = make_context(settings, folder, metrics=metrics, engine=engine_client, runs_engine=True, tracer=tracer)
    return create_api(context, root_path=settings.root_path)


def make_metrics(settings: Settings, folder: ModelFolder) -> Metrics:
    """The metrics of one server."""
    return Metrics(model_name=model_names(settings, folder)[0], prefix=settings.metrics_prefix)


def make_engine_client(
    settings: Settings,
    config: EngineConfig,
    *,
    launch: EngineLaunch,
    metrics: Metrics,
    first: EngineProcess | None = None,
    generations: Iterator[int] | None = None,
) -> LocalEngineClient:
    """One local engine, supervised; `first` is one that has been spawned already."""
    return LocalEngineClient(
        config,
        first=first,
        launch=launch,
        load_timeout=settings.load_timeout,
        on_step=metrics.observe_step,
        generations=generations,
    )


def make_context(
    settings: Settings,
    folder: ModelFolder,
    *,
    metrics: Metrics,
    engine: EngineClient,
    runs_engine: bool,
    tracer: RequestTracer | None = None,
    listens_on: str | None = None,
    before: ServerContext | None = None,
    tokenizer: Tokenizer | None = None,
) -> ServerContext:
    """Everything that the routes read. `listens_on`: the address, None where another's server listens.

    `before`, where a reload makes another one: what is in flight, kept or stored goes on under the new one.
    `tokenizer`: the model's own, where it is loaded already.
    Raises ConfigurationError.
    """
    keys = make_keys(settings)
    unknown = None if settings.unknown_fields is None else UnknownFields(settings.unknown_fields)
    override = None if settings.chat_template is None else Path(settings.chat_template)
    chat_template = ChatTemplate.load(folder.path, override=override)
    return ServerContext(
        engine=engine,
        tokenizer=Tokenizer.load(folder.path) if tokenizer is None else tokenizer,
        chat_template=chat_template,
        reasoning=choose_reasoning(settings.reasoning_parser, chat_template),
        model_names=model_names(settings, folder),
        metrics=metrics,
        admission=make_admission(settings, metrics) if before is None else before.admission,
        sampling_defaults=folder.generation_defaults if settings.generation_config == "model" else OpenAIDefaults(),
        responses=ResponseStore(max_responses=settings.max_stored_responses) if before is None else before.responses,
        limits=ApiLimits(
            max_body_size=settings.max_body_size,
            request_timeout=settings.request_timeout,
            queue_timeout=settings.queue_timeout,
            unknown_fields=unknown,
        ),
        kept=KeptStreams(window=settings.resume_window) if before is None else before.kept,
        version=__version__,
        keys=keys,
        metrics_keys=make_metrics_keys(settings),
        tracer=tracer,
        metrics_apart=settings.metrics_listen is not None and not runs_engine,
        allowed_origins=settings.allowed_origins,
        allowed_hosts=allowed_hosts(listens_on, keys),
        docs=settings.docs,
        page=settings.page,
        runs_engine=runs_engine,
        drain_timeout=settings.drain_timeout,
    )


def make_admission(settings: Settings, metrics: Metrics) -> Admission:
    """The counts of what is in flight, and their limits."""
    limits = AdmissionLimits(
        max_live_sequences=settings.max_live_sequences,
        max_waiting_tokens=settings.max_waiting_tokens,
        max_live_per_key=settings.max_live_per_key,
        max_expected_wait=None if settings.queue_timeout is None else settings.queue_timeout / 2,
    )
    return Admission(limits, metrics=metrics)


def choose_reasoning(parser: str, template: ChatTemplate | None) -> ReasoningForm | None:
    """How the model's reasoning is told from its answers; None where nothing is."""
    if parser == "auto":
        return FORMS["qwen3"] if template is not None and template.shows_reasoning else None
    return FORMS.get(parser)


def allowed_hosts(listens_on: str | None, keys: KeyRing | None) -> tuple[str, ...] | None:
    """Names that requests may use: loopback's where the server listens there without keys, else any (None)."""
    return None if listens_on is None or keys is not None else loopback_hosts(listens_on)


def model_names(settings: Settings, folder: ModelFolder) -> tuple[str, ...]:
    """Names that requests may use; answers carry the first."""
    return settings.served_model_name or (folder.name,)


def __getattr__(name: str) -> FastAPI:
    """`app`, made when a server such as uvicorn asks for it, not when this module is imported."""
    if name == "app":
        return create_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
