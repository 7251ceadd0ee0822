"""What a server makes good of what arrives: Poisson arrivals of 128 / 64 tokens at rising rates, until it collapses.

A request is good whose first token comes within a second of its scheduled time and whose further tokens take 100 ms
or less in the mean; the share at 50 ms is kept beside it. Every server gets the same prompts at the same times.
"""

import datetime
import zlib
from collections.abc import Callable, Sequence

import msgspec

from loadtest.compare.measure import load
from loadtest.compare.peers import Peer, Places
from loadtest.compare.probe import moved, probe
from loadtest.compare.results import Point, Results
from loadtest.compare.server import ServerFailed
from loadtest.compare.session import session, with_peer
from loadtest.run import RunConfig, RunResult
from loadtest.summary import Distribution, meets

RATES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0, 28.0, 32.0)
"""Requests a second."""
COLLAPSED = 0.5
"""A server that makes less than this share good is asked no higher rate."""
MIN_FOR_P99 = 500
"""A p99 of fewer requests is that of a handful."""
SECONDS, QUICK_SECONDS = 60.0, 20.0
INPUT_LEN, OUTPUT_LEN = 128, 64
TARGETS = {"ttft": 1000.0, "tpot": 100.0}
STRICT = {"ttft": 1000.0, "tpot": 50.0}
"""Milliseconds."""


def run_curves(
    results: Results, places: Places, peers: Sequence[Peer], *, is_quick: bool, say: Callable[[str], None]
) -> bool:
    """One curve a server; what the folder holds is not measured again. False where a server failed."""
    is_whole = True
    for peer in peers:
        if peer.is_in_process:
            say(f"{peer.name}: skipped, nothing arrives at what has no address")
            continue
        version = places.version(peer)
        known = [p for p in results.points() if (p.peer, p.version) == (peer.name, version)]
        if not remaining(known):
            continue
        try:
            with session(peer, places) as running:
                plain = with_peer(_config(running.url, RATES[0], is_quick=is_quick), peer, places)
                load(msgspec.structs.replace(plain, rate=None, num_requests=16, seed=plain.seed ^ 0x5A5A5A5A))
                while rates := remaining(known):
                    config = with_peer(_config(running.url, rates[0], is_quick=is_quick), peer, places)
                    before = probe()
                    result = load(config, TARGETS)
                    point = point_of(peer.name, version, result, moved=moved(before, probe()))
                    results.keep_point(point)
                    known.append(point)
                    say(line(point))
        except ServerFailed as error:
            say(f"{peer.name} failed and is left out: {error}")
            is_whole = False
    return is_whole


def remaining(known: Sequence[Point]) -> list[float]:
    """The rates that are still to be asked of a server, by what is known of it."""
    asked = {point.rate for point in known}
    if any(point.goodput_share < COLLAPSED for point in known):
        return []
    return [rate for rate in RATES if rate not in asked]


def point_of(peer: str, version: str, result: RunResult, *, moved: float) -> Point:
    """The figures of one run. Its p99s are left out where it has fewer than 500 requests."""
    summary, num = result.summary, len(result.records)

    def p99(values: Distribution | None) -> float | None:
        return None if values is None or num < MIN_FOR_P99 else values.p99

    ttft, tpot = summary.ttft_ms, summary.tpot_ms
    return Point(
        peer=peer,
        version=version,
        rate=result.config.rate or 0.0,
        num_requests=num,
        num_completed=summary.completed,
        goodput=summary.goodput or 0.0,
        goodput_share=summary.goodput_share or 0.0,
        strict_share=sum(meets(record, STRICT) for record in result.records) / num,
        tokens_per_s=summary.output_tokens_per_s,
        ttft_p50_ms=None if ttft is None else ttft.p50,
        ttft_p90_ms=None if ttft is None else ttft.p90,
        ttft_p99_ms=p99(ttft),
        tpot_p50_ms=None if tpot is None else tpot.p50,
        tpot_p99_ms=p99(tpot),
        itl_p99_ms=p99(summary.itl_ms),
        lag_p99_ms=None if summary.client_lag_ms is None else summary.client_lag_ms.p99,
        moved=moved,
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def line(point: Point) -> str:
    """One point for the terminal."""
    ttft = "-" if point.ttft_p90_ms is None else f"{point.ttft_p90_ms:.0f} ms"
    return (
        f"  {point.peer:16} {point.rate:4g}/s: {point.goodput_share:4.0%} good ({point.strict_share:.0%} at 50 ms), "
        f"{point.tokens_per_s:.0f} tok/s, TTFT p90 {ttft}"
    )


def curve_table(points: Sequence[Point], peers: Sequence[Peer]) -> str:
    """Share made good by rate and server, and the highest rate of which each makes 90 % good. Pure Markdown."""
    latest = {point.peer: point.version for point in points}
    kept = {(p.peer, p.rate): p for p in points if p.version == latest[p.peer]}
    shown = [peer for peer in peers if peer.name in latest]
    rates = sorted({rate for _, rate in kept})
    lines = [
        f"| requests/s | {' | '.join(f'{peer.title} {peer.precision}' for peer in shown)} |",
        f"| --- |{' --- |' * len(shown)}",
    ]
    for rate in rates:
        row = [_share(kept.get((peer.name, rate))) for peer in shown]
        lines.append(f"| {rate:g} | {' | '.join(row)} |")
    for name, share in (("90 % good up to", "goodput_share"), ("at 50 ms a token", "strict_share")):
        row = [_highest([p for (peer_name, _), p in kept.items() if peer_name == peer.name], share) for peer in shown]
        lines.append(f"| **{name}** | {' | '.join(row)} |")
    lines.append(f"| **p99 there: TTFT / TPOT, ms** | {' | '.join(_p99(kept, peer) for peer in shown)} |")
    return "\n".join(lines)


def _share(point: Point | None) -> str:
    return "-" if point is None else f"{point.goodput_share:.0%}"


def _highest(points: Sequence[Point], share: str) -> str:
    point = _last_good(points, share)
    return "none" if point is None else f"{point.rate:g}/s"


def _last_good(points: Sequence[Point], share: str) -> Point | None:
    """The highest rate before the first that is not made good."""
    good = None
    for point in sorted(points, key=lambda point: point.rate):
        if getattr(point, share) < 0.9:
            break
        good = point
    return good


def _p99(kept: dict[tuple[str, float], Point], peer: Peer) -> str:
    point = _last_good([p for (name, _), p in kept.items() if name == peer.name], "goodput_share")
    if point is None or point.ttft_p99_ms is None or point.tpot_p99_ms is None:
        return "-"
    return f"{point.ttft_p99_ms:.0f} / {point.tpot_p99_ms:.0f}"


def _config(url: str, rate: float, *, is_quick: bool) -> RunConfig:
    num_requests = round(rate * QUICK_SECONDS) if is_quick else max(MIN_FOR_P99, round(rate * SECONDS))
    return RunConfig(
        url=url,
        num_requests=max(20, num_requests),
        rate=rate,
        input_len=INPUT_LEN,
        output_len=OUTPUT_LEN,
        timeout_s=60.0,
        seed=zlib.crc32(f"curve {rate}".encode()),
    )
