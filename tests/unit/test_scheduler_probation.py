"""A sequence on probation computes alone until it has brought a token; the others go on between its steps."""

import msgspec

from app.core.plan import StepPlan
from app.core.types import EngineRequest
from tests.fakes import make_request
from tests.property.driver import Driver, make_config

ROOMY = make_config(num_kv_blocks=64, max_model_len=64, max_num_seqs=8, eos_token_ids=())


def on_probation(request: EngineRequest) -> EngineRequest:
    return msgspec.structs.replace(request, is_on_probation=True)


def received(request_id: str, num_prompt: int, num_output: int, *, start: int) -> EngineRequest:
    """Handed over after some tokens, which are what the fake model says."""
    driver = Driver(ROOMY)
    request = make_request(request_id, range(start, start + num_prompt), max_tokens=num_output + 4)
    driver.add(request)
    while len(driver.answers[request_id].token_ids) < num_output:
        driver.step()
    return on_probation(
        msgspec.structs.replace(request, output_token_ids=tuple(driver.answers[request_id].token_ids[:num_output]))
    )


def names(driver: Driver, plan: StepPlan | None) -> list[str]:
    assert plan is not None
    of_row = {sequence.row: sequence.request_id for sequence in driver.scheduler._running}
    return [of_row.get(entry.row, "ended") for entry in plan.entries]


def test_trials_are_alone_one_at_a_time_and_the_others_take_turns_with_them() -> None:
    driver = Driver(ROOMY)
    driver.add(make_request("free", [1, 2], max_tokens=30))
    driver.add(on_probation(make_request("tried-1", range(10, 30), max_tokens=30)))
    driver.add(on_probation(make_request("tried-2", [3, 4], max_tokens=30)))
    suspected = driver.scheduler.has_suspects
    steps = [names(driver, driver.step()) for _ in range(7)]
    assert suspected and not driver.scheduler.has_suspects
    assert steps[:5] == [["tried-1"], ["free"], ["tried-1"], ["tried-1", "free"], ["tried-2"]]
    assert sorted(steps[5]) == ["free", "tried-1", "tried-2"] == sorted(steps[6])
    driver.run_until_idle()


def test_the_last_token_received_is_decoded_in_a_step_of_its_own() -> None:
    driver = Driver(ROOMY)
    driver.add(received("tried", 20, 3, start=1))
    plans = [driver.step() for _ in range(4)]
    lengths = [[(entry.start, len(entry.token_ids)) for entry in plan.entries] for plan in plans if plan is not None]
    assert lengths == [[(0, 16)], [(16, 6)], [(22, 1)], [(23, 1)]]
    driver.run_until_idle()


def test_a_trial_that_lacks_room_is_not_overtaken_for_ever() -> None:
    config = make_config(num_kv_blocks=8, block_size=4, max_model_len=32, eos_token_ids=(), max_num_batched_tokens=64)
    driver = Driver(config)
    driver.add(make_request("big", range(1, 13), max_tokens=8))
    driver.step()
    driver.add(on_probation(make_request("tried", range(20, 44), max_tokens=2)))
    for index in range(4):
        driver.add(make_request(f"small-{index}", [30 + index] * 4, max_tokens=12))
    order: list[str] = []
    while driver.live_ids:
        plan = driver.step()
        order += [] if plan is None else [e.start_row.request_id for e in plan.entries if e.start_row is not None]
    assert order[0] == "tried"


def test_an_aborted_trial_makes_room_for_the_next() -> None:
    driver = Driver(ROOMY)
    driver.add(on_probation(make_request("tried-1", range(1, 40), max_tokens=2)))
    driver.add(on_probation(make_request("tried-2", [3, 4], max_tokens=2)))
    driver.step()
    driver.abort("tried-1")
    assert names(driver, driver.step()) == ["tried-2"]
    driver.run_until_idle()
