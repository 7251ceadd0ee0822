"""Turns records into the figures of a report. Pure; README.md holds the formulas."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from loadtest.record import RequestRecord

PERCENTILES = (50.0, 90.0, 99.0)


class Distribution(msgspec.Struct, frozen=True):
    """Milliseconds, or whatever was put in."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run. Latencies in milliseconds, over completed requests."""

    duration_s: float
    offered_rate: float | None
    """Requests per second that were asked for; None in a closed loop."""
    sent_rate: float
    completed: int
    outcomes: dict[str, int]
    """How many requests ended in each way."""
    errors: dict[str, int]
    """The ten most frequent words for what went wrong."""
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    client_lag_ms: Distribution | None
    request_rate: float
    """Completed requests per second."""
    output_tokens: int
    output_tokens_per_s: float
    prompt_tokens: int
    cached_token_share: float
    goodput: float | None
    """Completed requests per second that met every target; None without targets."""
    goodput_share: float | None
    """Of all requests sent."""
    client_cpu_share: float
    """CPU time of this client over the duration: near 1.0 it, not the server, is what was measured."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks of an ascending sequence that is not empty."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def distribution(values: Iterable[float]) -> Distribution | None:
    """None where there is nothing to describe."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p90, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
    return Distribution(len(ordered), sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def parse_targets(texts: Iterable[str]) -> dict[str, float]:
    """`["ttft:1000", "tpot:100"]` → milliseconds by name; raises ValueError."""
    targets = {}
    for text in texts:
        name, _, value = text.partition(":")
        if name not in ("ttft", "tpot", "e2e"):
            raise ValueError(f"the target {text!r} is none of ttft:MS, tpot:MS, e2e:MS")
        try:
            targets[name] = float(value)
        except ValueError:
            raise ValueError(f"the target {text!r} has no number of milliseconds; write {name}:100") from None
    return targets


def meets(record: RequestRecord, targets: Mapping[str, float]) -> bool:
    """Whether a completed request met all targets; one without a TPOT (a single token) has none to miss."""
    if not record.is_completed:
        return False
    seen = {"ttft": record.ttft, "tpot": record.tpot, "e2e": record.e2e}
    return all(value is None or value * 1e3 <= targets[name] for name, value in seen.items() if name in targets)


def summarise(
    records: Sequence[RequestRecord],
    *,
    targets: Mapping[str, float],
    offered_rate: float | None,
    client_cpu_s: float,
) -> Summary:
    """The figures of the records of one run, warm-up left out by the caller; at least one record."""
    done = [record for record in records if record.is_completed]
    start = min(record.scheduled_ns for record in records)
    duration = max((max(record.end_ns for record in records) - start) / 1e9, 1e-9)
    last_sent = max(record.sent_ns for record in records)
    prompt_tokens = sum(record.prompt_tokens for record in done)
    output_tokens = sum(record.output_tokens for record in records)
    num_good = sum(meets(record, targets) for record in records)
    return Summary(
        duration_s=duration,
        offered_rate=offered_rate,
        sent_rate=(len(records) - 1) / max((last_sent - start) / 1e9, 1e-9),
        completed=len(done),
        outcomes=dict(Counter(record.outcome.value for record in records)),
        errors=dict(Counter(record.detail for record in records if record.detail).most_common(10)),
        ttft_ms=distribution(record.ttft * 1e3 for record in done if record.ttft is not None),
        itl_ms=distribution(gap * 1e3 for record in done for gap in record.itl),
        tpot_ms=distribution(record.tpot * 1e3 for record in done if record.tpot is not None),
        e2e_ms=distribution(record.e2e * 1e3 for record in done),
        client_lag_ms=distribution(record.lag * 1e3 for record in records if record.sent_ns),
        request_rate=len(done) / duration,
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / duration,
        prompt_tokens=prompt_tokens,
        cached_token_share=sum(record.cached_tokens for record in done) / max(prompt_tokens, 1),
        goodput=num_good / duration if targets else None,
        goodput_share=num_good / len(records) if targets else None,
        client_cpu_share=client_cpu_s / duration,
    )
