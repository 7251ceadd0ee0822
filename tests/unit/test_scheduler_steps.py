"""What a step contains: budget, chunks, order, rows, logits; and what its result changes."""

import msgspec
import pytest

from app.core.errors import ConfigurationError
from app.core.plan import LogitsNeed, RowResult, StepPlan, StepResult
from app.core.types import EngineRequest, FinishReason
from app.scheduler import SchedulerConfig
from tests.fakes import continuation, make_request
from tests.property.driver import Driver, make_config

ROOMY = make_config(num_kv_blocks=64, max_model_len=64, eos_token_ids=())


def planned(driver: Driver) -> StepPlan:
    """Step once; there must be work."""
    plan = driver.step()
    assert plan is not None
    return plan


def lengths(plan: StepPlan) -> list[int]:
    return [len(entry.token_ids) for entry in plan.entries]


def outputs_of(request: EngineRequest, *, config: SchedulerConfig = ROOMY) -> tuple[int, ...]:
    return continuation(
        request,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        max_sequence_len=config.max_sequence_len,
    ).token_ids


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    driver = Driver(ROOMY)
    driver.add(make_request("a", range(1, 41), max_tokens=3))
    plans = [planned(driver) for _ in range(5)]
    assert [lengths(plan) for plan in plans] == [[16], [16], [8], [1], [1]]
    assert [plan.entries[0].start for plan in plans] == [0, 16, 32, 40, 41]
    assert [plan.entries[0].logits for plan in plans] == [*[LogitsNeed.NONE] * 2, *[LogitsNeed.LAST] * 3]
    assert [plan.entries[0].sample for plan in plans] == [False, False, True, True, True]
    assert [plan.entries[0].start_row is not None for plan in plans] == [True, False, False, False, False]
    assert not driver.live_ids


def test_running_sequences_come_first_and_prefill_takes_what_they_leave() -> None:
    driver = Driver(ROOMY)
    driver.add(make_request("decoding", [1, 2], max_tokens=9))
    planned(driver)
    driver.add(make_request("long", range(1, 41), max_tokens=2))
    assert [lengths(planned(driver)) for _ in range(4)] == [[1, 15], [1, 15], [1, 10], [1, 1]]


def test_many_decoding_rows_all_move_in_each_step_and_leave_room_for_prefill() -> None:
    config = make_config(
        num_kv_blocks=64, max_num_seqs=9, max_num_batched_tokens=4, min_prefill_tokens=2, eos_token_ids=()
    )
    driver = Driver(config)
    for index in range(8):
        driver.add(make_request(f"r{index}", [index + 1], max_tokens=30))
    while len(driver.scheduler._running) < 8:
        planned(driver)
    driver.add(make_request("new", range(10, 15), max_tokens=2))
    assert [lengths(planned(driver)) for _ in range(3)] == [[1] * 8 + [2], [1] * 8 + [3], [1] * 9]


def test_no_more_sequences_run_than_there_are_rows() -> None:
    driver = Driver(ROOMY)
    for index in range(6):
        driver.add(make_request(f"r{index}", [index + 1], max_tokens=1 + index))
    plan = planned(driver)
    assert [entry.row for entry in plan.entries] == [0, 1, 2, 3]
    plan = planned(driver)  # r0 has ended: its row goes to r4
    assert plan.released_rows == (0,)
    assert [entry.row for entry in plan.entries] == [1, 2, 3, 0]
    assert plan.entries[-1].start_row is not None and plan.entries[-1].start_row.request_id == "r4"


def test_rows_released_with_no_work_left_are_named_by_the_next_plan() -> None:
    driver = Driver(ROOMY)
    driver.add(make_request("a", [1], max_tokens=1))
    planned(driver)
    assert driver.step() is None
    driver.add(make_request("b", [1], max_tokens=2))
    assert planned(driver).released_rows == (0,)
    assert planned(driver).released_rows == ()


def test_priority_orders_the_waiting_and_ties_go_as_they_came() -> None:
    driver = Driver(make_config(max_num_seqs=1, eos_token_ids=()))
    for request_id, priority in [("first", 0), ("late", 5), ("second", 0), ("urgent", -1)]:
        driver.add(make_request(request_id, [1, 2], max_tokens=1, priority=priority))
    order = []
    while driver.live_ids:
        start_row = planned(driver).entries[0].start_row
        assert start_row is not None
        order.append(start_row.request_id)
    assert order == ["urgent", "first", "second", "late"]


def test_a_scored_prompt_ends_with_length_once_it_is_computed() -> None:
    driver = Driver(ROOMY)
    driver.add(make_request("a", range(1, 21), max_tokens=0))
    driver.add(make_request("b", range(1, 21), max_tokens=0, num_prompt_logprobs=1))
    plans = [planned(driver) for _ in range(3)]
    assert [[entry.logits for entry in plan.entries] for plan in plans] == [
        [LogitsNeed.NONE],
        [LogitsNeed.NONE, LogitsNeed.ALL],
        [LogitsNeed.ALL],
    ]
    assert not any(entry.sample for plan in plans for entry in plan.entries)
    assert not driver.live_ids


def test_prompt_logprobs_read_no_cache_and_fill_it() -> None:
    driver = Driver(ROOMY)
    for request_id, num_prompt_logprobs in [("plain", None), ("scored", 1), ("reader", None)]:
        driver.add(make_request(request_id, range(1, 14), max_tokens=2, num_prompt_logprobs=num_prompt_logprobs))
        driver.run_until_idle()
    assert [driver.answers[name].num_cached_tokens for name in ("plain", "scored", "reader")] == [0, 0, 12]
    fresh = Driver(ROOMY)
    fresh.add(make_request("scored", range(1, 14), max_tokens=2, num_prompt_logprobs=1))
    fresh.run_until_idle()
    fresh.add(make_request("reader", range(1, 14), max_tokens=2))
    fresh.run_until_idle()
    assert fresh.answers["reader"].num_cached_tokens == 12


def test_the_last_token_is_computed_even_if_all_blocks_are_cached() -> None:
    driver = Driver(ROOMY)
    for request_id in ("a", "b"):
        driver.add(make_request(request_id, range(1, 9), max_tokens=2))
        driver.run_until_idle()
    assert driver.answers["b"].num_cached_tokens == 4
    counts = driver.scheduler.counts()
    assert (counts.total_prefix_query_tokens, counts.total_prefix_hit_tokens) == (14, 4)


def test_another_salt_finds_nothing() -> None:
    driver = Driver(ROOMY)
    for salt in ("", "tenant", "tenant"):
        driver.add(make_request(f"r{len(driver.answers)}", range(1, 10), max_tokens=1, cache_salt=salt))
        driver.run_until_idle()
    assert [answer.num_cached_tokens for answer in driver.answers.values()] == [0, 0, 8]


def test_the_first_output_says_how_long_the_sequence_waited() -> None:
    driver = Driver(ROOMY)
    driver.scheduler.add(make_request("a", range(1, 21), max_tokens=2), 10.0)
    told = []
    for now in (12.5, 13.0, 14.0):
        plan = driver.scheduler.schedule(now)
        assert plan is not None
        result = driver.runner.sample(plan, driver.runner.forward(plan))
        told += [output.queue_seconds for output in driver.scheduler.apply(plan, result, now)]
    assert told == [2.5, None]


def test_a_handed_over_sequence_goes_on_where_it_was() -> None:
    driver = Driver(ROOMY)
    whole = make_request("a", range(1, 8), max_tokens=6)
    received = outputs_of(whole)[:4]
    driver.add(msgspec.structs.replace(whole, output_token_ids=received))
    start_row = planned(driver).entries[0].start_row
    assert start_row is not None
    assert (start_row.prompt_token_ids, start_row.output_token_ids) == (whole.prompt_token_ids, received)
    driver.run_until_idle()
    assert (*received, *driver.answers["a"].token_ids) == outputs_of(whole)


def test_cached_tokens_are_prompt_tokens_even_where_more_was_cached() -> None:
    driver = Driver(ROOMY)
    whole = make_request("a", range(1, 7), max_tokens=12)
    driver.add(whole)
    driver.run_until_idle()
    received = outputs_of(whole)[:8]
    driver.add(msgspec.structs.replace(whole, request_id="b", output_token_ids=received))
    driver.run_until_idle()
    assert driver.scheduler.counts().total_prefix_hit_tokens == 12
    assert driver.answers["b"].num_cached_tokens == 6


@pytest.mark.parametrize(
    ("output", "reason", "stop_token_id"),
    [([5, 5, 7], FinishReason.STOP, 7), ([5, 5, 0], FinishReason.STOP, None), ([5] * 4, FinishReason.LENGTH, None)],
    ids=["stop-id", "end-of-text", "length"],
)
def test_a_sequence_that_was_over_when_handed_over_is_answered_at_once(
    output: list[int], reason: FinishReason, stop_token_id: int | None
) -> None:
    driver = Driver(make_config())
    request = make_request("a", [1, 2], max_tokens=4, stop_token_ids=(7,), output_token_ids=output)
    answer = driver.add(request)
    assert answer is not None
    assert (answer.finish_reason, answer.stop_token_id, answer.token_ids) == (reason, stop_token_id, ())
    assert not driver.scheduler.has_work


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request("live", [1]), "'live' is in use"),
        (make_request("a", []), "no tokens"),
        (make_request("a", [1, 50]), "token id 50 is outside the vocabulary: use 0 to 49"),
        (make_request("a", [1], output_token_ids=[-1]), "token id -1 is outside"),
        (make_request("a", [1] * 48), "the prompt has 48 tokens and the context holds 48"),
        (make_request("a", [1] * 49, max_tokens=0), "the prompt has 49 tokens"),
    ],
    ids=["id-in-use", "empty", "vocabulary", "negative", "no-room-to-generate", "too-long-to-score"],
)
def test_what_cannot_run_is_refused_and_harms_nobody(request_: EngineRequest, message: str) -> None:
    driver = Driver(make_config())
    driver.add(make_request("live", [1, 2, 3], max_tokens=5, ignore_eos=True))
    driver.step()
    output = driver.scheduler.add(request_, 0.0)
    assert output is not None and output.finish_reason is FinishReason.ERROR
    assert output.error is not None and message in output.error
    driver.run_until_idle()
    assert len(driver.answers["live"].token_ids) == 5


def test_a_failing_row_ends_its_sequence_alone() -> None:
    driver = Driver(ROOMY)
    for request_id in ("good", "bad", "fine"):
        driver.add(make_request(request_id, [1, 2, 3], max_tokens=4))
    driver.step()
    driver.fail("bad")
    driver.run_until_idle()
    reasons = {name: answer.last.finish_reason for name, answer in driver.answers.items() if answer.last}
    assert reasons == {"good": FinishReason.LENGTH, "bad": FinishReason.ERROR, "fine": FinishReason.LENGTH}


def test_a_row_without_the_token_that_it_owes_ends_with_an_error() -> None:
    driver = Driver(ROOMY)
    driver.add(make_request("a", [1, 2, 3]))
    plan = driver.scheduler.schedule(0.0)
    assert plan is not None
    (output,) = driver.scheduler.apply(plan, StepResult(plan.step_id, (RowResult(0),)), 0.0)
    assert output.finish_reason is FinishReason.ERROR and output.error is not None
    assert not driver.scheduler.has_work


def test_a_result_that_is_not_the_plans_is_refused() -> None:
    driver = Driver(ROOMY)
    driver.add(make_request("a", [1, 2, 3]))
    plan = driver.scheduler.schedule(0.0)
    assert plan is not None
    with pytest.raises(ValueError, match="not in flight"):
        driver.scheduler.apply(plan, StepResult(plan.step_id + 1, (RowResult(0, (1,)),)), 0.0)
    with pytest.raises(ValueError, match="rows of its plan"):
        driver.scheduler.apply(plan, StepResult(plan.step_id, (RowResult(3, (1,)),)), 0.0)
    result = StepResult(plan.step_id, (RowResult(0, (1,)),))
    driver.scheduler.apply(plan, result, 0.0)
    with pytest.raises(ValueError, match="not in flight"):
        driver.scheduler.apply(plan, result, 0.0)


def test_accepted_drafts_count_as_computed_and_the_others_are_computed_anew() -> None:
    driver = Driver(ROOMY, draft=True)
    request = make_request("a", range(1, 10), max_tokens=30)
    driver.add(request)
    plans = []
    while driver.live_ids:
        plans.append(planned(driver))
    assert tuple(driver.answers["a"].token_ids) == outputs_of(request)
    assert len(plans) < 30, "no draft was accepted"


def test_tokens_beyond_the_end_are_dropped() -> None:
    driver = Driver(ROOMY)
    driver.add(make_request("a", [1, 2], max_tokens=2))
    plan = driver.scheduler.schedule(0.0)
    assert plan is not None
    entry = msgspec.structs.replace(plan.entries[0], token_ids=(1, 2, 3, 4), num_draft_tokens=2)
    drafted = msgspec.structs.replace(plan, entries=(entry,))
    result = StepResult(plan.step_id, (RowResult(0, (3, 4, 5), num_accepted=2),))
    (output,) = driver.scheduler.apply(drafted, result, 0.0)
    assert (output.token_ids, output.finish_reason) == ((3, 4), FinishReason.LENGTH)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="block_size is 0; it must be at least 1"):
        make_config(block_size=0)
