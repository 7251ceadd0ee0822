"""Admission: what is in flight is counted exactly, and refusals say when to come back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.admission import Admission, AdmissionLimits, Place
from app.api.share import Share
from app.core.errors import InvalidRequest, TooManyRequests
from app.observability.metrics import Metrics


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock | None = None, **limits: int) -> Admission:
    metrics = Metrics(model_name="m")
    return Admission(AdmissionLimits(**limits), metrics=metrics, clock=Clock() if clock is None else clock)


def test_places_are_given_back_once() -> None:
    admission = make(max_live_sequences=2)
    first, second = admission.admit([5, 7], max_model_len=100)
    assert (admission.num_live_sequences, admission.num_waiting_tokens) == (2, 12)
    first.stop_waiting()
    first.stop_waiting()
    assert admission.num_waiting_tokens == 7
    for _ in range(2):
        first.leave()
        second.leave()
    assert (admission.num_live_sequences, admission.num_waiting_tokens) == (0, 0)


def test_the_door_is_shut_before_the_body_is_read_while_the_server_is_full() -> None:
    admission = make(max_live_sequences=1)
    (place,) = admission.admit([1], max_model_len=100)
    with pytest.raises(TooManyRequests), admission.enter():
        pass
    place.leave()
    with admission.enter() as room:
        room.take(4)
        room.take(6)
        assert admission.num_parsing_bytes == 10
    assert admission.num_parsing_bytes == 0


def test_bodies_together_are_bounded_but_one_is_always_read() -> None:
    admission = make(max_parsing_bytes=10)
    with admission.enter() as first, admission.enter() as second:
        first.take(50)
        with pytest.raises(TooManyRequests):
            second.take(1)
        first.take(1)
    assert admission.num_parsing_bytes == 0


def test_a_body_that_does_not_come_takes_no_room() -> None:
    admission = make(max_parsing_bytes=10)
    with admission.enter(), admission.enter(), admission.enter() as third:
        third.take(10)


def test_waiting_tokens_are_bounded_by_the_context_where_nothing_else_is_said() -> None:
    admission = make()
    admission.admit([1], max_model_len=10)
    admission.admit([319], max_model_len=10)
    with pytest.raises(TooManyRequests):
        admission.admit([1], max_model_len=10)


def test_more_than_could_ever_be_live_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequest) as refused:
        make(max_live_sequences=2).admit([1, 1, 1], max_model_len=10)
    assert refused.value.param == "n"


def test_a_request_that_would_be_copied_beyond_measure_is_refused_though_nothing_waits() -> None:
    admission = make(max_request_ids=1000)
    with pytest.raises(InvalidRequest, match="1010") as refused:
        admission.admit([1] * 10, num_param_ids=100, max_model_len=10)
    assert refused.value.param == "n"
    assert (admission.num_live_sequences, admission.num_waiting_tokens) == (0, 0)
    assert len(admission.admit([1] * 9, num_param_ids=100, max_model_len=10)) == 9


def test_retry_after_comes_from_the_drain_rate() -> None:
    clock = Clock()
    admission = make(clock, max_live_sequences=100)
    with pytest.raises(TooManyRequests) as unknown:
        admission.admit([1] * 100, max_model_len=10)
        admission.admit([1], max_model_len=10)
    assert unknown.value.retry_after == 5

    admission = make(clock, max_live_sequences=100)
    places = admission.admit([1] * 100, max_model_len=10)
    for place in places[:50]:  # 50 over ten seconds: about 5 a second
        clock.now += 0.2
        place.leave()
    places += admission.admit([1] * 50, max_model_len=10)
    with pytest.raises(TooManyRequests) as soon:
        admission.admit([1], max_model_len=10)
    with pytest.raises(TooManyRequests) as later:
        admission.admit([1] * 40, max_model_len=10)
    assert soon.value.retry_after == 1 and 8 <= later.value.retry_after <= 20
    clock.now += 1000
    with pytest.raises(TooManyRequests) as stalled:
        admission.admit([1] * 40, max_model_len=10)
    assert stalled.value.retry_after == 30


ALICE, BOB, CAROL = (Share(tenant=name) for name in ("alice", "bob", "carol"))


def test_no_key_fills_the_house() -> None:
    admission = make(max_live_sequences=100)
    held = [admission.admit([1], max_model_len=1000, share=ALICE) for _ in range(80)]
    with pytest.raises(TooManyRequests), admission.enter(ALICE):
        pass
    with pytest.raises(TooManyRequests):
        admission.admit([1], max_model_len=1000, share=ALICE)
    # Whoever comes next finds room, and so does a third.
    for share, num_places in ((BOB, 16), (CAROL, 3)):
        for _ in range(num_places):
            with admission.enter(share):
                held.append(admission.admit([1], max_model_len=1000, share=share))
        with pytest.raises(TooManyRequests):
            admission.admit([1], max_model_len=1000, share=share)
    for places in held:
        places[0].leave()
    assert admission.num_live_sequences == 0 and not admission._live_of and not admission._waiting_of
    assert (
        admission._metrics.registry.get_sample_value(
            "headwater_key_rejections_total", {"model_name": "m", "key_id": "alice"}
        )
        == 2
    )
    assert (
        admission._metrics.registry.get_sample_value(
            "headwater_key_live_sequences", {"model_name": "m", "key_id": "alice"}
        )
        == 0
    )
    # What a key can never have is the client's mistake.
    with pytest.raises(InvalidRequest):
        admission.admit([1] * 81, max_model_len=1000, share=ALICE)


def test_a_key_has_the_sequences_that_the_operator_gave_it() -> None:
    admission = make(max_live_sequences=100, max_live_per_key=2)
    own = Share(tenant="own", max_live=5)
    for share, most in ((ALICE, 2), (own, 5)):
        places = admission.admit([1] * most, max_model_len=1000, share=share)
        with pytest.raises(TooManyRequests), admission.enter(share):
            pass
        places[0].leave()
        with admission.enter(share):
            pass
        with pytest.raises(InvalidRequest):
            admission.admit([1] * (most + 1), max_model_len=1000, share=share)


def test_no_key_fills_the_queue_with_its_prompts() -> None:
    admission = make(max_waiting_tokens=1000)
    admission.admit([600], max_model_len=1000, share=ALICE)
    admission.admit([200], max_model_len=1000, share=ALICE)
    with pytest.raises(TooManyRequests):
        admission.admit([1], max_model_len=1000, share=ALICE)
    admission.admit([150], max_model_len=1000, share=BOB)


@settings(max_examples=60)
@given(st.data())
def test_counts_follow_what_is_in_flight_whatever_happens(data: st.DataObject) -> None:
    admission = make(max_live_sequences=20, max_waiting_tokens=60)
    live: list[tuple[Share, int, Place]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        leaves: bool = data.draw(st.booleans())
        if live and leaves:
            live.pop(data.draw(st.integers(0, len(live) - 1)))[2].leave()
        share = data.draw(st.sampled_from([Share(), ALICE, BOB]))
        counts = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
        try:
            places = admission.admit(counts, max_model_len=100, share=share)
        except TooManyRequests:
            continue
        live += [(share, count, place) for count, place in zip(counts, places, strict=True)]
        assert admission.num_live_sequences == len(live) <= 20
        assert admission.num_waiting_tokens == sum(count for _, count, _ in live)
        for one in (ALICE, BOB):
            assert admission._live_of[one.tenant] == sum(share is one for share, _, _ in live)
            assert admission._waiting_of[one.tenant] == sum(count for share, count, _ in live if share is one)


def serve_slowly(admission: Admission, clock: Clock, *, tenant: str = "") -> list[Place]:
    """One first output a second, of a queue that stays at four; the four."""
    share = Share(tenant)
    waiting = admission.admit([1] * 4, max_model_len=100, share=share)
    for _ in range(6):
        clock.now += 1.0
        done = waiting.pop(0)
        done.stop_waiting()
        done.leave()
        waiting += admission.admit([1], max_model_len=100, share=share)
    return waiting


def test_who_would_wait_too_long_is_refused_before_the_body_is_read() -> None:
    clock = Clock()
    admission = make(clock, max_expected_wait=5)
    waiting = serve_slowly(admission, clock)
    admission.check_wait()
    waiting += admission.admit([1, 1], max_model_len=100)
    with pytest.raises(TooManyRequests) as refused:
        admission.check_wait()
    assert refused.value.retry_after == 1
    with pytest.raises(TooManyRequests):
        admission.admit([1], max_model_len=100)
    waiting.pop().leave()  # it waits no longer, if without an output
    admission.check_wait()


def test_nobody_is_refused_for_a_wait_where_nobody_waits_or_nothing_is_known() -> None:
    clock = Clock()
    admission = make(clock, max_expected_wait=1)
    places = admission.admit([1] * 50, max_model_len=100)
    admission.check_wait()  # no output yet: the first ones are computed
    for place in places:
        clock.now += 100.0
        place.leave()
    clock.now += 1000.0
    admission.check_wait()
    admission = make(clock, max_expected_wait=1)
    (place,) = admission.admit([1], max_model_len=100)
    clock.now += 0.1
    place.stop_waiting()
    clock.now += 1000.0  # in which it runs and nobody waits
    admission.admit([1] * 5, max_model_len=100)
    admission.check_wait()


def test_a_key_does_not_wait_for_all_that_another_asks_for() -> None:
    clock = Clock()
    admission = make(clock, max_expected_wait=3)
    serve_slowly(admission, clock, tenant="heavy")
    with pytest.raises(TooManyRequests):
        admission.check_wait(Share("heavy"))
    admission.check_wait(Share("light"))
