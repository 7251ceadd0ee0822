"""Times and counts of one sequence, from its request's arrival to its end, put into the metrics once."""

from app.core.types import FinishReason
from app.observability.metrics import Metrics


class SequenceMeter:
    """Follows one admitted sequence. `finish` counts it exactly once, whoever calls it and how often."""

    __slots__ = (
        "_arrived",
        "_key_id",
        "_last",
        "_metrics",
        "admitted",
        "ended",
        "finish_reason",
        "first",
        "num_cached_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "queue_seconds",
    )

    def __init__(
        self,
        metrics: Metrics,
        *,
        arrived: float,
        num_prompt_tokens: int,
        admitted: float | None = None,
        key_id: str | None = None,
    ) -> None:
        """Times are monotonic: of the request's arrival, and of the sequence's admission where that is known."""
        self._metrics = metrics
        self._key_id = key_id
        self._arrived = arrived
        self._last = arrived
        self.admitted = arrived if admitted is None else admitted
        self.first: float | None = None
        """Time of the first output."""
        self.ended: float | None = None
        self.num_prompt_tokens = num_prompt_tokens
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.queue_seconds: float | None = None
        """Set by whoever hears it first: the engine says it once, perhaps before the first token."""
        self.finish_reason: FinishReason | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from the request's arrival to the sequence's first output; None before it."""
        return None if self.first is None else self.first - self._arrived

    def advance(self, num_tokens: int, *, now: float, num_cached_tokens: int) -> None:
        """Count accepted output tokens that came in one step at the monotonic time `now`."""
        metrics = self._metrics
        if self.first is None:
            self._start(now, num_cached_tokens)
        elif num_tokens:
            metrics.inter_token_latency.observe((now - self._last) / num_tokens, num_tokens)
        if num_tokens:
            self._last = now
            self.num_output_tokens += num_tokens
            metrics.generation_tokens.inc(num_tokens)
            if self._key_id is not None:
                metrics.count_key_tokens(self._key_id, generated=num_tokens)

    def finish(self, reason: FinishReason, *, now: float) -> None:
        """Count the end of the sequence; later calls do nothing."""
        if self.finish_reason is not None:
            return
        self.finish_reason, self.ended = reason, now
        metrics = self._metrics
        metrics.count_finish(reason)
        metrics.e2e_latency.observe(now - self._arrived)
        metrics.request_prompt_tokens.observe(self.num_prompt_tokens)
        metrics.request_generation_tokens.observe(self.num_output_tokens)
        if self.first is not None and self.num_output_tokens > 1:
            decode = self._last - self.first
            metrics.decode_time.observe(decode)
            metrics.time_per_output_token.observe(decode / (self.num_output_tokens - 1))

    def _start(self, now: float, num_cached_tokens: int) -> None:
        self.first = self._last = now
        self.num_cached_tokens = num_cached_tokens
        metrics = self._metrics
        metrics.time_to_first_token.observe(now - self._arrived)
        metrics.prompt_tokens.inc(self.num_prompt_tokens)
        if self._key_id is not None:
            metrics.count_key_tokens(self._key_id, prompt=self.num_prompt_tokens)
        metrics.cached_prompt_tokens.inc(num_cached_tokens)
        if self.queue_seconds is not None:
            metrics.queue_time.observe(self.queue_seconds)
            metrics.prefill_time.observe(max(0.0, now - self._arrived - self.queue_seconds))
