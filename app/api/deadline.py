"""How long a request may take: the operator's limits, and the one that its client sends.

The header `X-Request-Deadline` is a number of seconds from now, 2.5 for example: the clocks of client and server
need not agree. The smaller of it and `--request-timeout` counts, from the request's head to its last token;
`--queue-timeout` counts to the first output of any of its sequences.

Invariant: when a limit is reached the work is cancelled, which aborts its sequences in the engine within a step.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from app.core.errors import DeadlineExceeded, InvalidRequest, QueueTimeout

HEADER = "x-request-deadline"
MAX_SECONDS = 86_400.0
_NUMBER = re.compile(r"^-?[0-9]{1,10}(\.[0-9]{1,9})?$")
_RETRY_AFTER = 5


def read_deadline(value: str | None) -> float | None:
    """Seconds, below 0 where it has passed already; None where the header is not there. Raises InvalidRequest."""
    if value is None:
        return None
    if not _NUMBER.match(value) or float(value) > MAX_SECONDS:
        raise InvalidRequest(
            f"The header X-Request-Deadline is `{value[:32]}`; it takes the seconds from now as a decimal number, "
            f"at most {MAX_SECONDS:.0f}, and no date.",
            param="X-Request-Deadline",
        )
    return float(value)


class Deadline:
    """The limits of one request. Times are seconds from its arrival, None: no limit."""

    def __init__(
        self, *, arrived: float, total: float | None, queue: float | None, on_expiry: Callable[[str], None]
    ) -> None:
        """`arrived` is a monotonic time. `on_expiry` hears of the limit that was reached: `deadline` or `queue`."""
        self._total, self._queue = total, queue
        self._on_expiry = on_expiry
        # Event loops have clocks of their own.
        self._origin = asyncio.get_running_loop().time() - (time.monotonic() - arrived)
        self._is_waiting = True
        self._timeout: asyncio.Timeout | None = None

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Cancel what is inside when a limit is reached. Raises DeadlineExceeded or QueueTimeout."""
        try:
            async with asyncio.timeout_at(self._when()) as self._timeout:
                yield
        except TimeoutError:
            if self._timeout is None or not self._timeout.expired():
                raise
            raise self._error() from None
        finally:
            self._timeout = None

    def note_output(self) -> None:
        """The request waits no longer."""
        if self._is_waiting:
            self._is_waiting = False
            if self._timeout is not None and not self._timeout.expired():
                self._timeout.reschedule(self._when())

    def _when(self) -> float | None:
        seconds = self._least()
        return None if seconds is None else self._origin + seconds

    def _least(self) -> float | None:
        given = [seconds for seconds in (self._total, self._queue if self._is_waiting else None) if seconds is not None]
        return min(given, default=None)

    def _error(self) -> DeadlineExceeded | QueueTimeout:
        is_total = self._total is not None and self._least() == self._total
        self._on_expiry("deadline" if is_total else "queue")
        if is_total:
            return DeadlineExceeded(
                f"The request did not end within {max(0.0, self._total or 0.0):g} s, its deadline. It was ended."
            )
        return QueueTimeout(
            f"The request had no output after {self._queue:g} s, the longest that one waits here. Try again later.",
            retry_after=_RETRY_AFTER,
        )
