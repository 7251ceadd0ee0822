"""When an engine that died is replaced, and when no more. Pure: times are passed in."""

from app.client.settings import Supervision


class RestartBudget:
    """Counts deaths in a row that no token came between.

    Its clock counts the seconds in which engines were ready: a crash loop spends the budget however
    long each load takes, and one idle crash a day never does.
    """

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._clock = 0.0
        self._deaths: list[float] = []
        self._num_in_row = 0
        """Deaths since the last token, none of them long after the one before."""
        self.num_of_own_making = 0
        """Those of them that came from inside the engine."""

    def forgive(self) -> None:
        """A token was received: engines work."""
        self._deaths.clear()
        self._num_in_row = self.num_of_own_making = 0

    def next_delay(self, *, ready_seconds: float, counts: bool, is_self_inflicted: bool = True) -> float | None:
        """An engine died that had been ready so long; returns seconds to wait, None where the budget is spent.

        A death that `counts` not is one with a known cause outside the engine.
        """
        self._clock += ready_seconds
        if ready_seconds >= self._supervision.window_seconds:
            self._num_in_row = self.num_of_own_making = 0
        self.num_of_own_making += is_self_inflicted
        if counts:
            oldest = self._clock - self._supervision.window_seconds
            self._deaths = [time for time in self._deaths if time >= oldest]
            self._deaths.append(self._clock)
            if len(self._deaths) >= self._supervision.max_deaths:
                return None
        self._num_in_row += 1
        if self._num_in_row == 1:
            return 0.0
        delay = self._supervision.backoff_seconds * 2.0 ** min(self._num_in_row - 2, 16)
        return min(delay, self._supervision.max_backoff_seconds)
