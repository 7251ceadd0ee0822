"""Too little memory: preemption, sequences longer than the pool, aborts at any moment."""

import random

import pytest

from app.core.types import FinishReason
from tests.fakes import make_request
from tests.property.driver import Driver, make_config

TIGHT = make_config(num_kv_blocks=8, block_size=4, max_model_len=1000, eos_token_ids=())


def finish_of(driver: Driver, request_id: str) -> FinishReason | None:
    last = driver.answers[request_id].last
    return last.finish_reason if last is not None else None


def test_a_sequence_that_outgrows_the_pool_ends_with_length() -> None:
    driver = Driver(TIGHT)
    driver.add(make_request("a", range(1, 11), max_tokens=500))
    driver.run_until_idle()
    assert finish_of(driver, "a") is FinishReason.LENGTH
    assert len(driver.answers["a"].token_ids) == 8 * 4 - 10


def test_a_prompt_that_the_pool_cannot_hold_is_refused() -> None:
    output = Driver(TIGHT).scheduler.add(make_request("a", [1] * 32, max_tokens=1), 0.0)
    assert output is not None and output.finish_reason is FinishReason.ERROR


def test_two_long_sequences_that_evict_each_other_both_end() -> None:
    driver = Driver(TIGHT)
    driver.add(make_request("a", range(1, 6), max_tokens=20))
    driver.add(make_request("b", range(11, 16), max_tokens=20))
    driver.run_until_idle()
    assert driver.scheduler.counts().total_preemptions > 0
    assert [len(driver.answers[name].token_ids) for name in "ab"] == [20, 20]


def test_n_samples_times_max_tokens_may_exceed_the_pool() -> None:
    driver = Driver(TIGHT)
    for index in range(8):
        driver.add(make_request(f"sample-{index}", range(1, 10), max_tokens=20, seed=index))
    driver.run_until_idle()
    assert all(len(answer.token_ids) == 20 for answer in driver.answers.values())
    assert driver.scheduler.counts().total_preemptions > 0


def test_the_youngest_gives_way_and_comes_back_first_with_its_tokens() -> None:
    driver = Driver(TIGHT)
    driver.add(make_request("old", range(1, 13), max_tokens=16))
    driver.add(make_request("young", range(21, 33), max_tokens=16))
    while driver.scheduler.counts().total_preemptions == 0:
        driver.step()
    assert [sequence.request_id for sequence in driver.scheduler._running] == ["old"]
    num_received = len(driver.answers["young"].token_ids)
    assert num_received > 0
    driver.add(make_request("urgent", [1, 2], max_tokens=1, priority=-9))
    while "old" in driver.live_ids:
        driver.step()
    plan = driver.step()
    assert plan is not None
    starts = [entry.start_row for entry in plan.entries if entry.start_row is not None]
    assert [start.request_id for start in starts] == ["young", "urgent"]
    assert list(starts[0].output_token_ids) == driver.answers["young"].token_ids[:num_received]
    driver.run_until_idle()


def test_prompt_logprobs_are_delivered_once_although_their_sequence_was_preempted() -> None:
    driver = Driver(make_config(num_kv_blocks=10, block_size=2, max_num_batched_tokens=4, eos_token_ids=()))
    driver.add(make_request("old", [1, 2], max_tokens=17))
    driver.add(make_request("scored", range(21, 34), max_tokens=3, num_prompt_logprobs=1))
    while driver.scheduler.counts().total_preemptions == 0:
        driver.step()
    assert driver.answers["scored"].prompt_logprobs
    driver.run_until_idle()
    assert len(driver.answers["scored"].prompt_logprobs) == 12


def test_a_preempted_sequence_reports_the_cache_hits_of_its_first_admission() -> None:
    driver = Driver(TIGHT)
    driver.add(make_request("old", range(1, 13), max_tokens=16))
    driver.add(make_request("young", range(21, 33), max_tokens=16))
    driver.run_until_idle()
    counts = driver.scheduler.counts()
    assert counts.total_preemptions > 0
    assert driver.answers["young"].num_cached_tokens == 0
    assert counts.total_prefix_query_tokens == 22


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_thousand_aborts_at_random_moments_leak_nothing(lag: int) -> None:
    rng = random.Random(lag)
    driver = Driver(make_config(num_kv_blocks=24, max_num_seqs=6, eos_token_ids=()), lag=lag)
    num_aborts = 0
    while num_aborts < 1000:
        for _ in range(rng.randint(1, 4)):
            prompt = [*range(1, rng.randint(1, 30)), rng.randrange(50)]
            driver.add(make_request(f"r{rng.random()}", prompt, max_tokens=rng.randint(0, 20)))
        for _ in range(rng.randint(0, 5)):
            driver.step()
        for request_id in rng.sample(driver.live_ids, k=min(3, len(driver.live_ids))):
            driver.abort(request_id)
            num_aborts += 1
    driver.run_until_idle()
    assert driver.scheduler.counts().num_kv_blocks_used == 0


def test_blocks_of_an_abort_in_flight_are_given_to_nobody_until_the_step_is_back() -> None:
    driver = Driver(make_config(num_kv_blocks=4, eos_token_ids=()))
    scheduler = driver.scheduler
    scheduler.add(make_request("gone", range(1, 12)), 0.0)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert scheduler.abort(["gone"]) == 1
    assert not scheduler.has_work
    scheduler.add(make_request("next", range(21, 32)), 0.0)
    assert scheduler.schedule(0.0) is None, "blocks were handed out while a step may write to them"
    assert scheduler.apply(plan, driver.runner.sample(plan, driver.runner.forward(plan)), 0.0) == ()
    after = scheduler.schedule(0.0)
    assert after is not None and after.released_rows == (0,)
    assert set(after.entries[0].block_table) <= set(range(4))


def test_a_sequence_in_flight_is_no_victim_and_the_one_in_need_waits() -> None:
    driver = Driver(make_config(num_kv_blocks=4, eos_token_ids=()))
    scheduler, runner = driver.scheduler, driver.runner
    scheduler.add(make_request("old", range(1, 5)), 0.0)
    first = scheduler.schedule(0.0)
    scheduler.add(make_request("young", range(21, 33)), 0.0)
    second = scheduler.schedule(0.0)
    assert first is not None and second is not None
    scheduler.apply(first, runner.sample(first, runner.forward(first)), 0.0)
    assert scheduler.schedule(0.0) is None, "the old one needs a second block, and a step writes to all others"
    scheduler.apply(second, runner.sample(second, runner.forward(second)), 0.0)
    third = scheduler.schedule(0.0)
    assert third is not None and [entry.row for entry in third.entries] == [0]
    assert scheduler.counts().total_preemptions == 1


def test_aborting_what_is_unknown_or_over_is_nothing() -> None:
    driver = Driver(TIGHT)
    driver.add(make_request("a", [1], max_tokens=1))
    driver.run_until_idle()
    assert driver.scheduler.abort(["a", "never"]) == 0


def test_an_id_may_be_used_again_once_its_sequence_was_aborted() -> None:
    driver = Driver(TIGHT, lag=1)
    driver.add(make_request("a", [1, 2], max_tokens=4))
    driver.step()
    driver.abort("a")
    driver.add(make_request("a", [3, 4, 5], max_tokens=4))
    driver.run_until_idle()
    assert len(driver.answers["a"].token_ids) == 4
