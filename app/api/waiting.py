"""How long a request would wait for its first output, by what the server did lately while somebody waited.

By Little's law: those that wait, over the first outputs a second. Only the time in which somebody waited counts, so
that an idle hour says nothing. One event loop's thread; no locks.
"""

import math
from collections import Counter
from collections.abc import Callable

_MEMORY_SECONDS = 10.0
"""After so long of somebody's waiting, what was before counts e times less."""


class Waiting:
    """The sequences without a first output, by tenant, and how fast they get one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_of: Counter[str] = Counter()
        self._num = 0
        self._since = 0.0
        """Up to when `_seconds` counts, while somebody waits."""
        self._seconds = 0.0
        self._num_outputs = 0.0

    def begin(self, num_sequences: int, *, tenant: str) -> None:
        """So many begin to wait."""
        if not num_sequences:
            return
        self._advance()
        self._num += num_sequences
        self._num_of[tenant] += num_sequences

    def end(self, *, tenant: str, has_output: bool) -> None:
        """One waits no longer: it has an output, or is gone without."""
        self._advance()
        self._num_outputs += has_output
        self._num -= 1
        self._num_of[tenant] -= 1
        if not self._num_of[tenant]:
            del self._num_of[tenant]

    def seconds_for(self, tenant: str) -> float:
        """What the tenant's next sequence would wait for; 0 where nobody waits, or nothing is known yet.

        Tenants with names take turns, so that one which asks for little does not wait for all that another asks for.
        """
        num_before = self._num
        if tenant:
            own = self._num_of[tenant]
            num_before = min(num_before, own + (1 + own) * len(self._num_of.keys() - {tenant}))
        if not num_before:
            return 0.0
        self._advance()
        return num_before * self._seconds / self._num_outputs if self._num_outputs else 0.0

    def _advance(self) -> None:
        now = self._clock()
        if self._num:
            left = math.exp((self._since - now) / _MEMORY_SECONDS)
            self._seconds = self._seconds * left + _MEMORY_SECONDS * (1.0 - left)
            self._num_outputs *= left
        self._since = now
