"""A prefix that is being computed is waited for, and never for longer than somebody computes it."""

import pytest

from app.core.plan import StepPlan
from tests.fakes import make_request
from tests.property.driver import Driver, make_config

ROOMY = make_config(num_kv_blocks=64, max_model_len=64, max_num_seqs=8, eos_token_ids=())
PREFIX = range(1, 33)  # eight blocks


def start(driver: Driver, *, num_waiting: int = 3) -> StepPlan:
    """A producer computes PREFIX in two steps, of which this is the first, and others wait for it."""
    driver.add(make_request("producer", [*PREFIX, 40], max_tokens=30))
    for index in range(num_waiting):
        driver.add(make_request(f"waiting-{index}", [*PREFIX, 41 + index], max_tokens=4))
    plan = driver.step()
    assert plan is not None
    return plan


def started(plan: StepPlan | None) -> list[str]:
    assert plan is not None
    return [entry.start_row.request_id for entry in plan.entries if entry.start_row is not None]


@pytest.mark.parametrize("budget", [8, 16, 20, 64])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_shared_prefix_is_computed_once(budget: int, lag: int) -> None:
    config = make_config(
        num_kv_blocks=64, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=budget, eos_token_ids=()
    )
    driver = Driver(config, lag=lag)
    for index in range(5):
        driver.add(make_request(f"sample-{index}", [*PREFIX, 40], max_tokens=1, seed=index))
    driver.run_until_idle()
    assert driver.runner.num_computed_tokens == 33 + 4 * 1
    assert sorted(answer.num_cached_tokens or 0 for answer in driver.answers.values()) == [0, 32, 32, 32, 32]


def test_the_gate_holds_while_others_pass() -> None:
    driver = Driver(make_config(num_kv_blocks=64, max_num_batched_tokens=40, eos_token_ids=()), lag=1)
    driver.add(make_request("stranger", [9, 8, 7], max_tokens=9, priority=9))
    plan = start(driver)
    assert started(plan) == ["producer", "stranger"]
    assert (len(driver.scheduler._gate), driver.scheduler.counts().num_waiting) == (3, 3)
    driver.run_until_idle()


def test_another_salt_does_not_wait() -> None:
    driver = Driver(make_config(num_kv_blocks=64, max_num_batched_tokens=80, eos_token_ids=()))
    driver.add(make_request("producer", [*PREFIX, 40]))
    driver.add(make_request("other", [*PREFIX, 40], cache_salt="tenant"))
    assert started(driver.step()) == ["producer", "other"]
    driver.run_until_idle()


def held_driver() -> Driver:
    """A producer in its first chunk, in flight, with three sequences held for it."""
    driver = Driver(make_config(num_kv_blocks=64, max_num_batched_tokens=20, eos_token_ids=()), lag=1)
    driver.add(make_request("first", [9] * 3, max_tokens=30))  # the oldest, so that the producer can be a victim
    start(driver)
    driver.step()  # the rest of the budget looks at the queue while the first chunk is in flight
    assert len(driver.scheduler._gate) == 3
    return driver


def test_held_sequences_go_on_when_their_producer_is_aborted() -> None:
    driver = held_driver()
    driver.abort("producer")
    assert len(driver.scheduler._gate) == 0
    assert "waiting-0" in started(driver.step())
    driver.run_until_idle()


def test_held_sequences_go_on_when_their_producer_fails() -> None:
    driver = held_driver()
    driver.fail("producer")
    driver.run_until_idle()
    assert all(len(driver.answers[f"waiting-{index}"].token_ids) == 4 for index in range(3))
    # Nobody was left to compute the prefix but one of those who waited for it.
    assert sorted(driver.answers[f"waiting-{index}"].num_cached_tokens or 0 for index in range(3))[1:] == [32, 32]


def test_held_sequences_go_on_when_their_producer_is_preempted() -> None:
    driver = held_driver()
    scheduler = driver.scheduler
    while any(sequence.is_in_flight for sequence in scheduler._running):
        driver._finish_step()
    producer = next(sequence for sequence in scheduler._running if sequence.request_id == "producer")
    held_before = len(scheduler._gate)
    scheduler._preempt(producer)
    driver.check()
    assert len(scheduler._gate) == 0
    assert scheduler._queue.front is producer, "the victim goes before those who waited for it"
    assert held_before == 3
    driver.run_until_idle()


def test_a_held_sequence_can_be_aborted() -> None:
    driver = held_driver()
    driver.abort("waiting-1")
    assert len(driver.scheduler._gate) == 2
    driver.run_until_idle()


def test_a_sequence_waits_for_the_common_blocks_only() -> None:
    driver = Driver(make_config(num_kv_blocks=64, max_num_batched_tokens=20, eos_token_ids=()))
    driver.add(make_request("first", [9] * 3, max_tokens=30))
    driver.add(make_request("producer", [*PREFIX, 40], max_tokens=30))
    driver.add(make_request("fork", [*range(1, 9), 49, 49], max_tokens=4))
    driver.step()  # the producer's first 17 tokens, of which the fork has 8
    assert len(driver.scheduler._gate) == 0
    driver.step()
    driver.step()
    assert driver.answers["fork"].num_cached_tokens == 8
    driver.run_until_idle()


def test_a_sequence_is_let_go_as_soon_as_it_has_what_it_can_use() -> None:
    driver = Driver(make_config(num_kv_blocks=64, max_num_batched_tokens=7, eos_token_ids=()), lag=1)
    driver.add(make_request("first", [9] * 3, max_tokens=30))
    driver.add(make_request("producer", PREFIX, max_tokens=30))
    driver.add(make_request("short", range(1, 9), max_tokens=4))  # of its two blocks the second is computed anyway
    plan = driver.scheduler.schedule(0.0)
    assert plan is not None and [len(entry.token_ids) for entry in plan.entries] == [3, 4]
    assert driver.scheduler.schedule(0.0) is None
    assert len(driver.scheduler._gate) == 1
    driver.scheduler.apply(plan, driver.runner.sample(plan, driver.runner.forward(plan)), 0.0)
    assert len(driver.scheduler._gate) == 0
