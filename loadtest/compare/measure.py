"""One figure of the comparison: a workload on a running server, between two probes of the machine.

A run whose peaks moved by more than `MOVED_LIMIT` is repeated with other prompts, a bounded number of
times; every attempt is kept, and `settle` says which one counts.
"""

import asyncio
import datetime
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import msgspec
import uvloop

from loadtest.compare.probe import MOVED_LIMIT, Peaks, moved
from loadtest.compare.workloads import warmup_config
from loadtest.record import RequestRecord
from loadtest.run import RunConfig, RunResult, run_load
from loadtest.summary import Distribution

MAX_ATTEMPTS = 3
_NO_TARGETS: Mapping[str, float] = MappingProxyType({})


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt. Latencies in milliseconds over completed requests; tokens/s as in loadtest/README.md."""

    peer: str
    version: str
    workload: str
    is_quick: bool
    round_index: int
    attempt: int
    num_requests: int
    num_completed: int
    num_short: int
    """Requests that did not end with exactly the tokens that were asked for, failed ones included."""
    errors: dict[str, int]
    tokens_per_s: float
    tpot_ms: float | None
    """The median request's."""
    ttft_p50_ms: float | None
    ttft_p90_ms: float | None
    itl_p90_ms: float | None
    client_cpu_share: float
    prompt_tokens: float
    """Mean of a request, as the server counted them."""
    cached_share: float | None
    """Of the prompt tokens, as the server tells; None where it tells nothing."""
    duration_s: float
    ready_s: float
    memory_bytes: int
    """Proportional set size of the server's processes after the run."""
    before: Peaks
    after: Peaks
    finished: str
    """UTC, ISO 8601."""

    @property
    def moved(self) -> float:
        return moved(self.before, self.after)

    @property
    def is_steady(self) -> bool:
        return self.moved <= MOVED_LIMIT


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """What a measurement is of."""

    peer: str
    version: str
    workload: str
    is_quick: bool
    round_index: int


def measure(
    label: Label,
    config: Callable[[int], RunConfig],
    *,
    load: Callable[[RunConfig], RunResult],
    probe: Callable[[], Peaks],
    ready_s: float,
    memory_bytes: Callable[[], int],
    keep: Callable[[Measurement], None],
) -> Measurement:
    """Run until an attempt is steady or `MAX_ATTEMPTS` are made; `keep` gets each of them. Returns the one that counts.

    Args:
        config: the run of an attempt, by its number.
        load: puts it on what is measured.
        probe: measures the machine's peaks.
    """
    attempts: list[Measurement] = []
    while needs_another(attempts):
        attempt = len(attempts)
        measured = config(attempt)
        load(warmup_config(measured))
        before = probe()
        result = load(measured)
        measurement = _measurement(
            label, result, attempt=attempt, before=before, after=probe(), ready_s=ready_s, memory=memory_bytes()
        )
        keep(measurement)
        attempts.append(measurement)
    return settle(attempts)


def needs_another(attempts: Sequence[Measurement]) -> bool:
    """Whether the last attempt has to be repeated and may be."""
    return not attempts or (not attempts[-1].is_steady and len(attempts) < MAX_ATTEMPTS)


def settle(attempts: Sequence[Measurement]) -> Measurement:
    """The attempt that counts, of one or more: the one during which the machine moved least."""
    return min(attempts, key=lambda attempt: attempt.moved)


def load(config: RunConfig, targets: Mapping[str, float] = _NO_TARGETS) -> RunResult:
    """Run once on an event loop of its own; `targets` are those of goodput, in milliseconds."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_load(config, targets=targets, api_key=None, progress=_ignore))


def num_short(records: Sequence[RequestRecord], output_len: int) -> int:
    """How many requests did not end with exactly `output_len` tokens by the server's own count."""
    return sum(not record.is_completed or record.output_tokens != output_len for record in records)


def _measurement(
    label: Label, result: RunResult, *, attempt: int, before: Peaks, after: Peaks, ready_s: float, memory: int
) -> Measurement:
    summary, num_done = result.summary, max(result.summary.completed, 1)
    cached = summary.cached_token_share
    return Measurement(
        **msgspec.structs.asdict(label),
        attempt=attempt,
        num_requests=len(result.records),
        num_completed=summary.completed,
        num_short=num_short(result.records, result.config.output_len),
        errors=summary.errors,
        tokens_per_s=summary.output_tokens_per_s,
        tpot_ms=_figure(summary.tpot_ms, "p50"),
        ttft_p50_ms=_figure(summary.ttft_ms, "p50"),
        ttft_p90_ms=_figure(summary.ttft_ms, "p90"),
        itl_p90_ms=_figure(summary.itl_ms, "p90"),
        client_cpu_share=summary.client_cpu_share,
        prompt_tokens=summary.prompt_tokens / num_done,
        cached_share=cached if cached > 0 else None,
        duration_s=summary.duration_s,
        ready_s=ready_s,
        memory_bytes=memory,
        before=before,
        after=after,
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _figure(values: Distribution | None, name: str) -> float | None:
    return None if values is None else float(getattr(values, name))


def _ignore(_: RequestRecord) -> None:
    """Nothing is drawn while a server is measured: it would cost the client time."""
