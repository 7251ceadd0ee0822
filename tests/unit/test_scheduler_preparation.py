"""Sequences with a grammar wait until it is ready, hold nobody else up, and end where it ends."""

import msgspec
import pytest

from app.core.plan import RowResult, StepPlan, StepResult
from app.core.types import EngineRequest, FinishReason, Grammar, GrammarKind, SamplingParams
from app.scheduler import Scheduler
from tests.fakes import make_request
from tests.property.driver import make_config

GRAMMAR = Grammar(GrammarKind.REGEX, "[0-9]+")


def constrained(request_id: str, *, max_tokens: int = 8, **params: object) -> EngineRequest:
    request = make_request(request_id, [1, 2, 3], max_tokens=max_tokens)
    changed: SamplingParams = msgspec.structs.replace(request.params, grammar=GRAMMAR, **params)
    return msgspec.structs.replace(request, params=changed)


def scheduler() -> Scheduler:
    return Scheduler(make_config(num_kv_blocks=32, eos_token_ids=(0,)))


def planned(plan: StepPlan | None) -> list[str]:
    return [] if plan is None else [e.start_row.request_id for e in plan.entries if e.start_row is not None]


def running(scheduler: Scheduler, request: EngineRequest) -> StepPlan:
    """The first step of a request whose grammar is ready."""
    assert scheduler.add(request, 0.0) is None
    scheduler.admit_prepared(request.request_id)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def test_it_waits_and_others_pass() -> None:
    one = scheduler()
    one.add(constrained("waits"), 0.0)
    one.add(make_request("plain", [4, 5]), 1.0)
    assert one.counts().num_waiting == 2
    assert planned(one.schedule(2.0)) == ["plain"]
    one.admit_prepared("waits")
    plan = one.schedule(3.0)
    assert planned(plan) == ["waits"] and plan is not None
    (output,) = one.apply(plan, StepResult(plan.step_id, (RowResult(plan.entries[0].row, (7,)),)), 3.0)
    assert output.queue_seconds == 3.0


def test_it_keeps_its_place_in_the_queue() -> None:
    one = scheduler()
    one.add(constrained("first"), 0.0)
    one.add(make_request("second", [4, 5]), 1.0)
    one.admit_prepared("first")
    assert planned(one.schedule(2.0)) == ["first", "second"]


def test_a_failed_preparation_ends_it_alone() -> None:
    one = scheduler()
    one.add(constrained("bad"), 0.0)
    output = one.refuse_prepared("bad", "the grammar is wrong")
    assert output is not None
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "the grammar is wrong")
    assert not one.has_work and one.refuse_prepared("bad", "again") is None


def test_an_abort_while_it_waits_leaves_nothing() -> None:
    one = scheduler()
    one.add(constrained("gone"), 0.0)
    assert one.abort(["gone"]) == 1
    one.admit_prepared("gone")
    assert one.refuse_prepared("gone", "late") is None
    assert not one.has_work and one.schedule(0.0) is None and one.counts().num_waiting == 0


@pytest.mark.parametrize(
    ("params", "row", "expected"),
    [
        ({}, RowResult(0, (7,)), None),
        ({}, RowResult(0, (7,), is_end=True), (FinishReason.STOP, None)),
        ({"max_tokens": 1}, RowResult(0, (7,)), (FinishReason.LENGTH, None)),
        ({"max_tokens": 1}, RowResult(0, (7,), is_end=True), (FinishReason.STOP, None)),
        ({}, RowResult(0, (), is_end=True), (FinishReason.STOP, None)),
        ({"min_tokens": 5}, RowResult(0, (), is_end=True), (FinishReason.STOP, None)),
        ({"stop_token_ids": (7,)}, RowResult(0, (7,), is_end=True), (FinishReason.STOP, 7)),
        ({}, RowResult(0, (), error="too complex"), (FinishReason.ERROR, None)),
        ({}, RowResult(0, ()), (FinishReason.ERROR, None)),
    ],
)
def test_where_the_grammar_ends_the_sequence_ends(
    params: dict[str, object], row: RowResult, expected: tuple[FinishReason, int | None] | None
) -> None:
    one = scheduler()
    plan = running(one, constrained("a", **params))  # type: ignore[arg-type]
    (output,) = one.apply(plan, StepResult(plan.step_id, (row,)), 0.0)
    assert output.token_ids == row.token_ids
    assert output.finish_reason is (None if expected is None else expected[0])
    assert output.stop_token_id == (None if expected is None else expected[1])
    assert one.has_work is (expected is None)
