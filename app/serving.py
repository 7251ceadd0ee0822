"""One model as it is served: its folder, its engine's client, and the applications that answer for it.

A reload makes a second one beside the first; what both share (metrics, admission, kept streams, stored responses) is
handed on by `main.make_context`.
"""

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp

from app import main
from app.api.app import create_app, create_metrics_app
from app.api.deps import ServerContext
from app.client.local import LocalEngineClient
from app.client.process import EngineLaunch, EngineProcess
from app.core.config import EngineConfig
from app.observability.metrics import Metrics
from app.observability.tracing import RequestTracer
from app.settings import Settings
from app.text.tokenizer import Tokenizer
from app.weights import Model


@dataclass(frozen=True, slots=True)
class Serving:
    """A model, and what answers for it."""

    model: Model
    client: LocalEngineClient
    context: ServerContext
    apps: tuple[ASGIApp, ...]
    """One for each address."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What a server keeps whichever model it serves."""

    settings: Settings
    launch: EngineLaunch
    listeners: Sequence[socket.socket]
    """The server's own address, and that of /metrics where it has one."""
    metrics: Metrics
    tracer: RequestTracer | None
    generations: Iterator[int]
    """The numbers of engines."""

    def make_client(self, config: EngineConfig, *, first: EngineProcess | None = None) -> LocalEngineClient:
        """A client whose engines are of this config."""
        return main.make_engine_client(
            self.settings,
            config,
            launch=self.launch,
            metrics=self.metrics,
            first=first,
            generations=self.generations,
        )

    def make_context(
        self,
        model: Model,
        client: LocalEngineClient,
        *,
        before: ServerContext | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> ServerContext:
        """What its routes read; see `main.make_context`. Takes a while. Raises ConfigurationError."""
        return main.make_context(
            self.settings,
            model.folder,
            metrics=self.metrics,
            engine=client,
            runs_engine=False,
            tracer=self.tracer,
            listens_on=self.settings.host,
            before=before,
            tokenizer=tokenizer,
        )

    def make_apps(self, context: ServerContext) -> tuple[ASGIApp, ...]:
        """One for each address. The gauges are this context's from then on. Takes a while."""
        apps: list[ASGIApp] = [create_app(context, root_path=self.settings.root_path)]
        for listener in self.listeners[1:]:
            hosts = main.allowed_hosts(listener.getsockname()[0], context.keys or context.metrics_keys)
            apps.append(create_metrics_app(context, allowed_hosts=hosts))
        return tuple(apps)
