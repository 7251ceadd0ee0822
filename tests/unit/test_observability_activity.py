"""`Activity`: the recent past of a server, bounded, and percentiles of the last minute."""

from app.core.types import StepStats
from app.observability.activity import MAX_STEPS, WINDOW_SECONDS, Activity, percentiles
from app.observability.histogram import Histogram

BOUNDS = (0.1, 0.2, 0.4)


def stats(step_id: int, *, running: int = 1, decode: int = 1, hits: int = 0) -> StepStats:
    return StepStats(step_id, 0.01, 0, decode, running, 0, 1, 8, 0, hits, hits)


def make() -> tuple[Activity, Histogram]:
    ttft, itl = (Histogram(name, "test", bounds=BOUNDS, labels={"m": "x"}) for name in ("ttft", "itl"))
    return Activity(ttft=ttft, itl=itl), ttft


def test_steps_are_numbered_and_bounded() -> None:
    activity, _ = make()
    for index in range(MAX_STEPS + 10):
        activity.observe_step(1, stats(index), now=index / 100)
    assert activity.num_steps == MAX_STEPS + 10
    assert [step.number for step in activity.steps_after(0)] == list(range(11, MAX_STEPS + 11))
    assert [step.number for step in activity.steps_after(MAX_STEPS + 8)] == [MAX_STEPS + 9, MAX_STEPS + 10]
    assert activity.steps_after(MAX_STEPS + 10) == ()


def test_cached_tokens_are_those_of_the_step_over_engines() -> None:
    activity, _ = make()
    for generation, hits in ((1, 5), (1, 9), (2, 4)):
        activity.observe_step(generation, stats(0, hits=hits), now=1.0)
    assert [step.num_cached_tokens for step in activity.steps_after(0)] == [5, 4, 4]


def test_a_hand_over_has_a_pause_where_a_sequence_waited_for_it() -> None:
    activity, _ = make()
    activity.observe_step(1, stats(0), now=10.0)
    activity.observe_step(2, stats(0, running=0), now=12.5)
    activity.observe_step(3, stats(0), now=99.0)
    assert [tuple(event) for event in activity.hand_overs] == [(12.5, 2, 2.5), (99.0, 3, None)]


def test_rates_are_of_the_last_two_seconds() -> None:
    activity, _ = make()
    for at in (1.0, 3.5, 4.0):
        activity.observe_step(1, stats(0, decode=6), now=at)
    assert activity.rates(5.0) == (6.0, 0.0)
    assert activity.rates(50.0) == (0.0, 0.0)


def test_percentiles_are_of_the_last_minute() -> None:
    activity, ttft = make()
    assert activity.time_to_first_token(0.0).p50 is None
    ttft.observe(0.3, 100)
    activity.observe_step(1, stats(0), now=1.0)
    assert activity.time_to_first_token(2.0).num_observed == 100
    ttft.observe(0.05, 10)
    later = 2.0 + WINDOW_SECONDS
    activity.observe_step(1, stats(1), now=later)
    now = activity.time_to_first_token(later)
    assert now.num_observed == 10 and now.p50 is not None and 0 < now.p50 <= 0.1
    assert activity.time_to_first_token(later + 2 * WINDOW_SECONDS).num_observed == 0


def test_a_quantile_is_interpolated_inside_its_bucket() -> None:
    values = percentiles(BOUNDS, (0, 10, 0, 0))
    assert values.p50 is not None and abs(values.p50 - 0.15) < 1e-9
    assert percentiles(BOUNDS, (0, 0, 0, 4)).p99 == BOUNDS[-1]
