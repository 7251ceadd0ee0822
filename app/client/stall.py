"""Tells a hanging engine from a busy one, by the progress page. Pure: times are passed in."""

from collections import deque
from statistics import median

from app.client.settings import Supervision
from app.ipc.progress import EnginePhase, Progress

NUM_RECENT_STEPS = 64


class StallWatch:
    """Accuses an engine whose page has not changed for too long while it should have.

    It should while it loads or steps, and while it says that it is idle although sequences wait. Time
    counts as far as the watcher itself was awake: a server that was stopped as a whole and goes on does
    not take its own sleep for the engine's.
    """

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._steps: deque[float] = deque(maxlen=NUM_RECENT_STEPS)
        self._last_look: float | None = None
        self._last_page: tuple[EnginePhase, int, int] | None = None
        self._stalled = 0.0

    def note_step(self, seconds: float) -> None:
        """A step was reported; 0 seconds are no step."""
        if seconds > 0:
            self._steps.append(seconds)

    def step_limit(self) -> float:
        """Seconds that a step may take."""
        supervision = self._supervision
        usual = median(self._steps) if self._steps else 0.0
        return max(supervision.hang_seconds, supervision.hang_factor * usual)

    def look(self, progress: Progress | None, now: float, *, is_ready: bool, has_live: bool) -> str | None:
        """Compare the page (None: unreadable) with the last look; returns an accusation, or None."""
        page = None if progress is None else (progress.phase, progress.step_id, progress.written_ns)
        elapsed = 0.0 if self._last_look is None else now - self._last_look
        self._last_look = now
        if page != self._last_page or not _should_change(progress, has_live=has_live):
            self._last_page = page
            self._stalled = 0.0
            return None
        self._stalled += min(elapsed, 2 * self._supervision.tick_seconds)
        limit = self.step_limit() if is_ready else self._supervision.load_seconds
        if self._stalled <= limit:
            return None
        doing = "be at work" if progress is None else _DOING[progress.phase]
        return f"the engine was seen to {doing} for more than {limit:.1f} s without progress"


_DOING = {
    EnginePhase.UNBORN: "start",
    EnginePhase.LOADING: "load",
    EnginePhase.IDLE: "ignore its requests",
    EnginePhase.STEPPING: "compute one step",
    EnginePhase.BLOCKED: "wait for us",
}


def _should_change(progress: Progress | None, *, has_live: bool) -> bool:
    if progress is None or progress.phase is not EnginePhase.IDLE:
        return progress is None or progress.phase is not EnginePhase.BLOCKED
    return has_live
