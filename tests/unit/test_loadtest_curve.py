"""The goodput curve's pure parts: which rates are asked, what counts as good, what the table says."""

from pathlib import Path

import msgspec

from loadtest.compare.curve import MIN_FOR_P99, RATES, curve_table, point_of, remaining
from loadtest.compare.peers import peer_table
from loadtest.compare.results import Point, Results
from loadtest.record import Outcome, RequestRecord
from loadtest.run import RunConfig, RunResult
from loadtest.summary import summarise

SECOND = 10**9


def point(rate: float, share: float, **changes: object) -> Point:
    plain = Point(
        peer="vllm", version="1", rate=rate, num_requests=500, num_completed=500, goodput=rate * share,
        goodput_share=share, strict_share=share / 2, tokens_per_s=64 * rate, ttft_p50_ms=10.0, ttft_p90_ms=20.0,
        ttft_p99_ms=30.0, tpot_p50_ms=4.0, tpot_p99_ms=5.0, itl_p99_ms=6.0, lag_p99_ms=1.0, moved=0.0, finished="now",
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def record(index: int, *, ttft_ms: int, tpot_ms: int) -> RequestRecord:
    first = index * SECOND + ttft_ms * 10**6
    last = first + 63 * tpot_ms * 10**6
    return RequestRecord(
        index=index, scheduled_ns=index * SECOND, sent_ns=index * SECOND, end_ns=last, output_ns=[first, last],
        outcome=Outcome.COMPLETED, output_tokens=64,
    )  # fmt: skip


def test_rates_rise_until_one_collapses() -> None:
    assert remaining([]) == list(RATES)
    assert remaining([point(1, 1.0), point(2, 0.6)]) == [rate for rate in RATES if rate > 2]
    assert remaining([point(1, 1.0), point(2, 0.49)]) == []


def test_good_is_in_time_from_the_schedule_on() -> None:
    records = [
        record(0, ttft_ms=900, tpot_ms=40),
        record(1, ttft_ms=900, tpot_ms=90),
        record(2, ttft_ms=1100, tpot_ms=10),
        record(3, ttft_ms=100, tpot_ms=110),
    ]
    targets = {"ttft": 1000.0, "tpot": 100.0}
    summary = summarise(records, targets=targets, offered_rate=1.0, client_cpu_s=0.1)
    made = point_of("vllm", "1", RunResult(RunConfig(url="http://x", rate=1.0), summary, records), moved=0.0)
    assert (made.goodput_share, made.strict_share) == (0.5, 0.25)
    assert made.ttft_p99_ms is None and len(records) < MIN_FOR_P99


def test_the_table_names_the_last_rate_before_the_first_miss() -> None:
    points = [point(1, 1.0), point(2, 0.95), point(3, 0.7), point(4, 0.92), point(1, 0.1, version="0")]
    table = curve_table([points[4], *points[:4]], peer_table())
    assert "| 2 | 95% |" in table and "| **90 % good up to** | 2/s |" in table
    assert "| **at 50 ms a token** | none |" in table and "| 30 / 5 |" in table


def test_points_are_kept(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.keep_point(point(1, 1.0))
    with (tmp_path / "curve.jsonl").open("ab") as file:
        file.write(b'{"peer": "cut')
    results.keep_point(point(2, 1.0))
    assert [each.rate for each in results.points()] == [1, 2]
