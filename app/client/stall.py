"""Tells a hanging engine from a busy one, by the progress page. Pure: times are passed in.

A wrong accusation costs every stream a pause, a late one costs the hanging streams a longer pause: where the
two conflict, the engine is given time. Only time counts in which the page did not change although it should,
the watcher was awake, and no thread of the engine stood in line for a core.
"""

from collections import deque

from app.client.settings import Supervision
from app.ipc.progress import EnginePhase, Progress

NUM_RECENT_STEPS = 32


class StepTimes:
    """What a step of so many tokens takes, fitted from the steps of one engine.

    Steps are put into classes of size (1, 2-3, 4-7, ... tokens); of each class the slowest of the last 32 counts. A
    class without a step is estimated from the next smaller one that has some, in proportion to the tokens, and
    from the next larger one as it is, whichever is more. An engine without a step gets the settings' guess.
    """

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._classes: dict[int, deque[float]] = {}

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step was reported; one without tokens or time is none."""
        if num_tokens > 0 and seconds > 0:
            recent = self._classes.setdefault(num_tokens.bit_length(), deque(maxlen=NUM_RECENT_STEPS))
            recent.append(seconds)

    def expected(self, num_tokens: int) -> float:
        """Seconds."""
        size = max(1, num_tokens).bit_length()
        if size in self._classes:
            return max(self._classes[size])
        smaller = max((other for other in self._classes if other < size), default=None)
        larger = min((other for other in self._classes if other > size), default=None)
        estimates = [max(self._classes[other]) for other in (larger,) if other is not None]
        if smaller is not None:
            estimates.append(max(self._classes[smaller]) * 2.0 ** (size - smaller))
        guess = self._supervision.unknown_step_seconds + num_tokens * self._supervision.unknown_token_seconds
        return max(estimates, default=guess)


class StallWatch:
    """Accuses an engine whose page has not changed for too long while it should have.

    It should while it loads or steps, while it says that it is idle although sequences wait or its Ready has not
    come, and always where it was stopped.
    """

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._last_look: float | None = None
        self._last_page: tuple[EnginePhase, int, int] | None = None
        self._limit = supervision.hang_seconds
        self.times = StepTimes(supervision)
        self.stalled_seconds = 0.0
        """How long it has made no progress, as far as that counts."""

    @property
    def is_suspicious(self) -> bool:
        """Half of the time that leads to an accusation is over."""
        return self.stalled_seconds > self._limit / 2

    def limit(self, progress: Progress | None) -> float:
        """Seconds that the running step may take."""
        supervision = self._supervision
        num_tokens = 1 if progress is None else progress.num_tokens
        return max(supervision.hang_seconds, supervision.hang_factor * self.times.expected(num_tokens))

    def look(
        self,
        progress: Progress | None,
        now: float,
        *,
        is_ready: bool,
        has_live: bool,
        is_stopped: bool = False,
        starved_seconds: float = 0.0,
    ) -> str | None:
        """Compare the page (None: unreadable) with the last look; returns an accusation, or None.

        `starved_seconds` is how long the engine waited for a core since the last look.
        """
        page = None if progress is None else (progress.phase, progress.step_id, progress.written_ns)
        elapsed = 0.0 if self._last_look is None else now - self._last_look
        self._last_look = now
        has_work = has_live or not is_ready
        if page != self._last_page or not (is_stopped or _should_change(progress, has_work=has_work)):
            self._last_page = page
            self.stalled_seconds = 0.0
            return None
        # Its own sleep, where a server was stopped as a whole and goes on, the watcher does not hold against others.
        awake = min(elapsed, 2 * self._supervision.tick_seconds)
        self.stalled_seconds += max(0.0, awake - starved_seconds)
        is_loading = not is_ready and (progress is None or progress.phase is not EnginePhase.IDLE)
        self._limit = self._supervision.load_seconds if is_loading else self.limit(progress)
        if progress is not None and progress.phase is EnginePhase.PREPARING and not is_stopped:
            self._limit = max(self._limit, self._supervision.preparation_seconds)
        if self.stalled_seconds <= self._limit:
            return None
        doing = "be at work" if progress is None else _DOING[progress.phase]
        return f"the engine was seen to {doing} for more than {self._limit:.1f} s without progress"


_DOING = {
    EnginePhase.UNBORN: "start",
    EnginePhase.LOADING: "load",
    EnginePhase.IDLE: "be idle although there is work",
    EnginePhase.STEPPING: "compute one step",
    EnginePhase.BLOCKED: "wait for us",
    EnginePhase.PREPARING: "prepare a grammar",
}


def _should_change(progress: Progress | None, *, has_work: bool) -> bool:
    if progress is None or progress.phase is not EnginePhase.IDLE:
        return progress is None or progress.phase is not EnginePhase.BLOCKED
    return has_work
