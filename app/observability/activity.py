"""What the engine did lately, kept in memory for whoever looks: steps, hand-overs, latencies of the last minute.

It is fed where the metrics are, once a step, on the event loop's thread. A step costs one append; once a
second the two latency histograms are copied, and a percentile is read from what they gained since a copy.

Invariants: bounded in size whatever happens; nothing in it names a request or holds a token.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from app.core.types import StepStats
from app.observability.histogram import Histogram

MAX_STEPS = 512
MAX_HAND_OVERS = 32
WINDOW_SECONDS = 60.0
RATE_SECONDS = 2.0
_COPY_SECONDS = 1.0


class Step(NamedTuple):
    """One step, or a message between steps (then 0 seconds and no tokens)."""

    number: int
    """Counts all steps of the server, over all engines."""
    at: float
    """Monotonic time at which its outputs arrived."""
    generation: int
    stats: StepStats
    num_cached_tokens: int
    """Prompt tokens that the prefix cache saved since the step before."""


class HandOver(NamedTuple):
    """An engine was replaced."""

    at: float
    """Monotonic time of the new engine's first step."""
    generation: int
    pause_seconds: float | None
    """From the old engine's last step to the new one's first; None where no sequence waited for it."""


class Percentiles(NamedTuple):
    """Seconds, interpolated inside histogram buckets; None where nothing was observed."""

    p50: float | None
    p90: float | None
    p99: float | None
    num_observed: int


class _Copy(NamedTuple):
    at: float
    ttft: tuple[int, ...]
    itl: tuple[int, ...]


class Activity:
    """The recent past of one server."""

    def __init__(self, *, ttft: Histogram, itl: Histogram) -> None:
        self._ttft = ttft
        self._itl = itl
        self._steps: deque[Step] = deque(maxlen=MAX_STEPS)
        self._hand_overs: deque[HandOver] = deque(maxlen=MAX_HAND_OVERS)
        self._copies: deque[_Copy] = deque()
        self._count = 0

    @property
    def num_steps(self) -> int:
        """Steps so far: the number of the latest one."""
        return self._count

    @property
    def hand_overs(self) -> tuple[HandOver, ...]:
        """The latest ones, oldest first."""
        return tuple(self._hand_overs)

    def observe_step(self, generation: int, stats: StepStats, *, now: float) -> None:
        """Keep one step; each is told once, in order."""
        last = self._steps[-1] if self._steps else None
        is_new_engine = last is not None and last.generation != generation
        if last is not None and is_new_engine:
            waited = last.stats.num_running + last.stats.num_waiting > 0
            self._hand_overs.append(HandOver(now, generation, now - last.at if waited else None))
        before = 0 if last is None or is_new_engine else last.stats.total_prefix_hit_tokens
        cached = max(0, stats.total_prefix_hit_tokens - before)
        self._count += 1
        self._steps.append(Step(self._count, now, generation, stats, cached))
        self._copy(now)

    def steps_after(self, number: int) -> tuple[Step, ...]:
        """Steps with a greater number, as far back as they are kept."""
        first = bisect_right(self._steps, number, key=lambda step: step.number)
        return tuple(self._steps[index] for index in range(first, len(self._steps)))

    def rates(self, now: float) -> tuple[float, float]:
        """Decoded and prefilled tokens a second, over the last two seconds."""
        decoded = prefilled = 0
        for step in reversed(self._steps):
            if step.at < now - RATE_SECONDS:
                break
            decoded += step.stats.num_decode_tokens
            prefilled += step.stats.num_prefill_tokens
        return decoded / RATE_SECONDS, prefilled / RATE_SECONDS

    def time_to_first_token(self, now: float) -> Percentiles:
        """Over the last minute."""
        copy = self._copy_before(now)
        return percentiles(self._ttft.bounds, _gain(self._ttft.counts, None if copy is None else copy.ttft))

    def inter_token_latency(self, now: float) -> Percentiles:
        """Over the last minute."""
        copy = self._copy_before(now)
        return percentiles(self._itl.bounds, _gain(self._itl.counts, None if copy is None else copy.itl))

    def _copy(self, now: float) -> None:
        copies = self._copies
        if copies and now - copies[-1].at < _COPY_SECONDS:
            return
        copies.append(_Copy(now, self._ttft.counts, self._itl.counts))
        # One copy from before the window stays: it is what the window is compared with.
        while len(copies) > 1 and copies[1].at < now - WINDOW_SECONDS:
            copies.popleft()

    def _copy_before(self, now: float) -> _Copy | None:
        """The latest copy from before the window; None while the server is younger than that."""
        before = [copy for copy in self._copies if copy.at < now - WINDOW_SECONDS]
        return before[-1] if before else None


def percentiles(bounds: Sequence[float], counts: Sequence[int]) -> Percentiles:
    """Of counts in buckets with these inclusive upper bounds; the last bucket is open."""
    total = sum(counts)
    if total == 0:
        return Percentiles(None, None, None, 0)
    p50, p90, p99 = (_quantile(bounds, counts, share * total) for share in (0.5, 0.9, 0.99))
    return Percentiles(p50, p90, p99, total)


def _quantile(bounds: Sequence[float], counts: Sequence[int], rank: float) -> float:
    seen = 0
    for index, bound in enumerate(bounds):
        if seen + counts[index] >= rank:
            low = bounds[index - 1] if index else 0.0
            return low + (bound - low) * (rank - seen) / counts[index]
        seen += counts[index]
    return bounds[-1]


def _gain(counts: Sequence[int], before: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(counts) if before is None else tuple(now - then for now, then in zip(counts, before, strict=True))
