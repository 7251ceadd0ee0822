"""What was seen of one request: moments on the monotonic clock in nanoseconds, counts, how it ended."""

from enum import StrEnum

import msgspec


class Outcome(StrEnum):
    """How a request ended, seen by the client."""

    COMPLETED = "completed"
    REFUSED = "refused"
    """429 or 503: the server chose not to take it."""
    HTTP_ERROR = "http_error"
    """Any other status than 200."""
    STREAM_ERROR = "stream_error"
    """An error event after the stream had begun, or an event that is no JSON."""
    TRUNCATED = "truncated"
    """The stream ended without a finish reason."""
    CONNECTION = "connection"
    """Could not connect, or the connection broke."""
    TIMEOUT = "timeout"


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request. Every latency is derived from these moments, see README.md for the formulas."""

    index: int
    scheduled_ns: int
    """When it should have been sent; a closed loop's requests are due when they are sent."""
    sent_ns: int = 0
    end_ns: int = 0
    output_ns: list[int] = []
    """The moment of each event that carried text."""
    status: int = 0
    outcome: Outcome = Outcome.CONNECTION
    detail: str = ""
    """The server's or the system's words for what went wrong."""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    """As the server counted; without usage in the stream, the number of events with text."""
    cached_tokens: int = 0

    @property
    def is_completed(self) -> bool:
        return self.outcome is Outcome.COMPLETED

    @property
    def ttft(self) -> float | None:
        """Seconds from the scheduled time to the first text."""
        return (self.output_ns[0] - self.scheduled_ns) / 1e9 if self.output_ns else None

    @property
    def e2e(self) -> float:
        """Seconds from the scheduled time to the end of the stream."""
        return (self.end_ns - self.scheduled_ns) / 1e9

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Seconds between one event with text and the next."""
        return [(after - before) / 1e9 for before, after in zip(self.output_ns, self.output_ns[1:], strict=False)]

    @property
    def lag(self) -> float:
        """Seconds that this client was late."""
        return (self.sent_ns - self.scheduled_ns) / 1e9
