"""OpenTelemetry traces over OTLP: one span for each request, with its sequences' queue, prefill and decode below it.

Spans are made when a request has ended, from the times that were taken anyway: nothing of tracing runs beside an
answer. OpenTelemetry's SDK is an extra (`headwater[otel]`) and is imported where an endpoint is set, not before. Its
own OTEL_* variables hold: headers and timeouts of the exporter, the sampler, attributes of the resource.

Invariant: a receiver that is slow, away or wrong costs spans, never a request.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from app.core.errors import ConfigurationError
from app.observability.logging import ROOT_LOGGER

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]

_SERVICE = "headwater"
_CLOSE_SECONDS = 3.0
_NANOSECONDS = 1_000_000_000


class TracedPart(NamedTuple):
    """A child span. Times are monotonic seconds."""

    name: str
    started: float
    ended: float
    attributes: Attributes


class TracedEvent(NamedTuple):
    """Something that happened at one moment of a request."""

    at: float
    name: str
    attributes: Attributes


class TracedRequest(NamedTuple):
    """A request that has ended."""

    name: str
    started: float
    ended: float
    headers: Mapping[str, str]
    """Of the request: a `traceparent` makes the span a child of its client's."""
    attributes: Attributes
    error: str | None
    """What failed; None where nothing did."""
    events: Sequence[TracedEvent]
    parts: Sequence[TracedPart]


def make_tracer(endpoint: str | None, *, version: str) -> "RequestTracer | None":
    """What sends traces to `endpoint`, where there is one. Raises ConfigurationError without the extra."""
    return None if endpoint is None else RequestTracer(endpoint, version=version)


class RequestTracer:
    """Sends the spans of requests to one OTLP endpoint, in batches, from a thread of its own."""

    def __init__(self, endpoint: str, *, version: str) -> None:
        """`endpoint` is the whole URL. Raises ConfigurationError where the extra is not installed."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigurationError(
                f"--otlp-traces-endpoint needs OpenTelemetry's SDK ({error}): pip install 'headwater[otel]'"
            ) from None
        service = os.environ.get("OTEL_SERVICE_NAME", _SERVICE)
        resource = Resource.create({"service.name": service, "service.version": version})
        # What the exporter has to say belongs into our log; it would say it of its own requests for ever.
        logger = logging.getLogger("opentelemetry")
        logger.handlers, logger.propagate = logging.getLogger(ROOT_LOGGER).handlers, False
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(_SERVICE, version)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def record(self, request: TracedRequest) -> None:
        """Make the spans of a request, and leave them to be sent: some 0.1 ms with three children."""
        trace, offset = self._trace, time.time_ns() - int(time.monotonic() * _NANOSECONDS)

        def at(seconds: float) -> int:
            return offset + int(seconds * _NANOSECONDS)

        span = self._tracer.start_span(
            request.name,
            context=self._propagator.extract(request.headers),
            kind=trace.SpanKind.SERVER,
            attributes=dict(request.attributes),
            start_time=at(request.started),
        )
        if span.is_recording():
            for event in request.events:
                span.add_event(event.name, dict(event.attributes), timestamp=at(event.at))
            within = trace.set_span_in_context(span)
            for part in request.parts:
                child = self._tracer.start_span(
                    part.name, context=within, attributes=dict(part.attributes), start_time=at(part.started)
                )
                child.end(at(part.ended))
        if request.error is not None:
            span.set_attribute("error.type", request.error)
            span.set_status(trace.Status(trace.StatusCode.ERROR, request.error))
        span.end(at(request.ended))

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        # The exporter tries again for as long as its own timeout says, unless it is told to stop.
        giving_up = threading.Timer(_CLOSE_SECONDS, self._exporter.shutdown)
        giving_up.start()
        self._provider.shutdown()
        giving_up.cancel()
