"""From the record of an ended request to what its spans say: HTTP's and GenAI's attributes, never a text.

Names are those of OpenTelemetry's semantic conventions; what they have no name for begins with `headwater.`.
"""

import time
from collections.abc import Iterator

from starlette.datastructures import Headers
from starlette.types import Scope

from app.api.errors import kind_of
from app.api.record import RequestRecord
from app.core.errors import ServerError
from app.observability.sequence_meter import SequenceMeter
from app.observability.tracing import TracedPart, TracedRequest

Value = str | int | float | bool | list[str]

_COMPLETIONS = "/v1/completions"
_FAILURES = kind_of(ServerError).status
"""From this status on it is the server that failed; a 4xx is no error of a server's span."""


def traced(scope: Scope, record: RequestRecord, *, method: str, route: str) -> TracedRequest:
    """What the tracer is told of a request that has just ended."""
    attributes: dict[str, Value] = {
        "http.request.method": method,
        "http.route": route,
        "headwater.request.id": record.request_id,
    }
    if record.status is not None:
        attributes["http.response.status_code"] = record.status
    if record.key_id is not None:
        attributes["headwater.key.id"] = record.key_id
    name = f"{method} {route}"
    if record.model is not None:
        operation = "text_completion" if route == _COMPLETIONS else "chat"
        name = f"{operation} {record.model}"
        attributes |= {"gen_ai.operation.name": operation, **_generation(record)}
    is_failed = record.status is None or record.status >= _FAILURES or record.has_failed_late
    return TracedRequest(
        name,
        started=record.arrived,
        ended=time.monotonic(),
        headers=Headers(scope=scope),
        attributes=attributes,
        error=(record.error_code or "aborted") if is_failed else None,
        events=record.events,
        parts=[part for index, meter in enumerate(record.meters) for part in _parts(meter, index)],
    )


def _generation(record: RequestRecord) -> dict[str, Value]:
    assert record.model is not None
    attributes: dict[str, Value] = {
        "gen_ai.provider.name": "headwater",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.output.type": "text",
        "gen_ai.request.choice.count": len(record.meters),
        "gen_ai.usage.input_tokens": sum(meter.num_prompt_tokens for meter in record.meters),
        "gen_ai.usage.output_tokens": sum(meter.num_output_tokens for meter in record.meters),
        "gen_ai.usage.cache_read.input_tokens": sum(meter.num_cached_tokens for meter in record.meters),
        "gen_ai.response.finish_reasons": [
            meter.finish_reason.value for meter in record.meters if meter.finish_reason is not None
        ],
        "headwater.stream": record.is_stream,
    }
    if record.generation is not None:
        attributes["headwater.engine.generation"] = record.generation
    params = record.params
    if params is not None:
        attributes |= {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
        }
    ttfts = [meter.ttft for meter in record.meters if meter.ttft is not None]
    if ttfts:
        attributes["gen_ai.response.time_to_first_chunk"] = min(ttfts)
    return attributes


def _parts(meter: SequenceMeter, index: int) -> Iterator[TracedPart]:
    """Queue, prefill and decode of one sequence, as far as it came."""
    ended = time.monotonic() if meter.ended is None else meter.ended
    first = ended if meter.first is None else meter.first
    computed = first if meter.queue_seconds is None else min(first, meter.admitted + meter.queue_seconds)
    about = {"headwater.sequence.index": index}
    yield TracedPart("queue", meter.admitted, computed, about)
    if meter.queue_seconds is None:
        return
    prefill = {"gen_ai.usage.input_tokens": meter.num_prompt_tokens}
    yield TracedPart("prefill", computed, first, about | prefill)
    if meter.first is not None:
        yield TracedPart("decode", first, ended, about | {"gen_ai.usage.output_tokens": meter.num_output_tokens})
