"""What the log line of one request says, gathered while it is served. Never its text."""

import time
from collections import Counter
from collections.abc import Mapping

from starlette.types import Scope

from app.api.share import Share
from app.core.types import SamplingParams
from app.observability.sequence_meter import SequenceMeter
from app.observability.tracing import TracedEvent

MAX_EVENTS = 128
_SCOPE_KEY = "headwater.record"


class RequestRecord:
    """Facts of one HTTP request; the middleware makes it, the route fills it, the middleware logs it."""

    def __init__(self, request_id: str, *, arrived: float | None = None) -> None:
        """`arrived`: of the monotonic clock; None is now."""
        self.request_id = request_id
        self.arrived = time.monotonic() if arrived is None else arrived
        self.status: int | None = None
        self.error_code: str | None = None
        self.key_id: str | None = None
        """Of the API key that the request came with: a short hash."""
        self.key_name: str | None = None
        """What the operator calls that key."""
        self.share = Share()
        self.generation: int | None = None
        self.is_stream = False
        self.resumed: str | None = None
        """Of a stream that goes on: where the tokens came from that its client had."""
        self.model: str | None = None
        """Of a generation request, as its answer names it."""
        self.params: SamplingParams | None = None
        """Of its first sequence."""
        self.has_failed_late = False
        """Whether it failed once its status was sent."""
        self.events: list[TracedEvent] = []
        self.meters: tuple[SequenceMeter, ...] = ()
        """One for each sequence of a generation request."""

    def note(self, name: str, **attributes: str | int | float | bool) -> None:
        """Something happened to the request now. Kept for its trace, so far as there are not too many."""
        if len(self.events) < MAX_EVENTS:
            self.events.append(TracedEvent(time.monotonic(), name, attributes))

    def attach(self, scope: Scope) -> None:
        """Make the record findable from this request's scope."""
        scope[_SCOPE_KEY] = self

    @staticmethod
    def of(scope: Scope) -> "RequestRecord":
        """The record of the request with this scope."""
        record = scope[_SCOPE_KEY]
        assert isinstance(record, RequestRecord)
        return record

    @staticmethod
    def find(scope: Mapping[str, object]) -> "RequestRecord | None":
        """The same, or None where the request has not got as far."""
        record = scope.get(_SCOPE_KEY)
        return record if isinstance(record, RequestRecord) else None

    @property
    def tenant(self) -> str:
        """Whose prefixes the request may share: those of its own key, or of all where there are no keys."""
        return "" if self.key_id is None else f"{self.key_id}/"

    def facts(self) -> dict[str, object]:
        """The log line's fields beside method, route and status; times in seconds."""
        facts: dict[str, object] = {
            "request_id": self.request_id,
            "key_id": self.key_id,
            "total_s": round(time.monotonic() - self.arrived, 6),
        }
        if self.key_name is not None:
            facts["key_name"] = self.key_name
        if self.resumed is not None:
            facts["resumed"] = self.resumed
        if self.error_code is not None:
            facts["error"] = self.error_code
        if self.meters:
            facts |= self._generation_facts()
        return facts

    def _generation_facts(self) -> dict[str, object]:
        ttfts = [meter.ttft for meter in self.meters if meter.ttft is not None]
        queued = [meter.queue_seconds for meter in self.meters if meter.queue_seconds is not None]
        finishes = Counter(meter.finish_reason.value for meter in self.meters if meter.finish_reason is not None)
        return {
            "stream": self.is_stream,
            "sequences": len(self.meters),
            "prompt_tokens": sum(meter.num_prompt_tokens for meter in self.meters),
            "cached_tokens": sum(meter.num_cached_tokens for meter in self.meters),
            "output_tokens": sum(meter.num_output_tokens for meter in self.meters),
            "queue_s": round(max(queued), 6) if queued else None,
            "ttft_s": round(min(ttfts), 6) if ttfts else None,
            "finish": dict(finishes),
            "generation": self.generation,
        }
