"""Shares of tenants: whoever waits all the while is served as much as the others, over its weight."""

import random
from collections import Counter
from zlib import crc32

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.plan import RowResult, StepResult
from app.core.types import EngineOutput, EngineRequest
from app.scheduler import Scheduler
from app.scheduler.shares import AHEAD_TOKENS, MAX_TENANTS, Shares
from tests.fakes import make_request
from tests.property.driver import Driver, make_config

MAX_PROMPT, MAX_OUTPUT, ROWS = 12, 8, 3
MOST = MAX_PROMPT + 2 * MAX_OUTPUT
"""Most that one sequence is charged."""


def request(name: str, tenant: str, *, weight: float = 1.0, num_prompt: int = 8, max_tokens: int = 4) -> EngineRequest:
    made = make_request(
        name, [(hash_of(name) + index) % 40 + 5 for index in range(num_prompt)], max_tokens=max_tokens, ignore_eos=True
    )
    return msgspec.structs.replace(made, tenant=tenant, weight=weight)


def hash_of(name: str) -> int:
    return crc32(name.encode()) % 997


def small_engine() -> Driver:
    return Driver(make_config(num_kv_blocks=64, max_num_seqs=ROWS, enable_prefix_caching=False))


def finished(driver: Driver) -> list[str]:
    """Tenants of what has ended, in the order of the ends."""
    return [answer.request.tenant for answer in driver.answers.values() if answer.last is not None]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.sampled_from([1.0, 1.0, 2.0, 5.0]), min_size=2, max_size=4),
    num_steps=st.integers(20, 200),
)
def test_tenants_that_always_wait_are_served_by_their_weights(seed: int, weights: list[float], num_steps: int) -> None:
    rng = random.Random(seed)
    driver = small_engine()
    for index in range(60 * len(weights)):  # more than the steps can serve, in an order that favours the first
        number = min(index // 60, len(weights) - 1)
        driver.add(
            request(
                f"{number}-{index}",
                f"tenant-{number}",
                weight=weights[number],
                num_prompt=rng.randint(1, MAX_PROMPT),
                max_tokens=rng.randint(1, MAX_OUTPUT),
            )
        )
    served: Counter[str] = Counter()
    for _ in range(num_steps):
        plan = driver.step()
        assert plan is not None
        waiting = Counter(sequence.request.tenant for sequence in driver.scheduler._queue)
        if len(waiting) < len(weights):
            break
        shares = driver.scheduler._shares
        served = Counter({f"tenant-{n}": shares.of(f"tenant-{n}") for n in range(len(weights))})
    if served:
        assert max(served.values()) - min(served.values()) <= (ROWS + 1) * MOST / min(weights)


def test_a_flood_of_one_tenant_does_not_keep_another_waiting() -> None:
    driver = small_engine()
    for index in range(50):
        driver.add(request(f"heavy-{index}", "heavy"))
    for _ in range(10):
        driver.step()
    driver.add(request("light", "light"))
    while driver.answers["light"].last is None:
        driver.step()
    # Those that ran already, and what shares the steps with it.
    before = finished(driver)
    assert before.count("heavy") < 20
    driver.run_until_idle()


def test_a_priority_orders_a_tenants_own_work_alone() -> None:
    driver = small_engine()
    for index in range(ROWS):
        driver.add(request(f"running-{index}", "pushy"))
    driver.step()
    for index in range(12):
        pushy = request(f"pushy-{index}", "pushy", max_tokens=1)
        driver.add(msgspec.structs.replace(pushy, priority=-1000 - index))
    driver.add(request("modest", "modest", max_tokens=1))
    while driver.answers["modest"].last is None:
        driver.step()
    ended = [name for name, answer in driver.answers.items() if name.startswith("pushy") and answer.last is not None]
    assert len(ended) < 6 and set(ended) <= {f"pushy-{index}" for index in range(6, 12)}
    driver.run_until_idle()


def test_whoever_comes_finds_a_row() -> None:
    driver = Driver(make_config(num_kv_blocks=200, max_num_seqs=10, enable_prefix_caching=False))
    for index in range(40):
        driver.add(request(f"heavy-{index}", "heavy", max_tokens=20))
    for _ in range(10):
        driver.step()
    assert len(driver.scheduler._running) == 8
    driver.add(request("light", "light"))
    driver.step()
    assert "light" in [sequence.request_id for sequence in driver.scheduler._running]
    driver.run_until_idle()


@pytest.mark.parametrize(("num_rows", "num_left"), [(1, 0), (2, 0), (4, 0), (5, 1), (6, 1), (9, 1), (11, 2)])
def test_a_lone_tenant_leaves_no_more_than_a_fifth(num_rows: int, num_left: int) -> None:
    driver = Driver(make_config(num_kv_blocks=200, max_num_seqs=num_rows, enable_prefix_caching=False))
    for index in range(20):
        driver.add(request(f"heavy-{index}", "heavy", max_tokens=20))
    for _ in range(10):
        driver.step()
    assert num_rows - len(driver.scheduler._running) == num_left
    driver.run_until_idle()


def test_not_having_asked_earns_nothing() -> None:
    shares = Shares(64)
    shares.lift("busy", [])
    shares.charge("busy", 1000, weight=2.0)
    shares.lift("new", ["busy"])
    assert shares.of("new") == shares.of("busy") == 500.0
    # Nor does it where nobody waits at the moment.
    shares.note_entry("busy")
    shares.lift("late", [])
    assert shares.of("late") == 500.0
    # What was served beyond the others is not forgotten by going away.
    shares.charge("new", 7, weight=1.0)
    shares.lift("new", ["busy", "late"])
    assert shares.of("new") == 507.0


def test_counters_are_bounded_in_number_and_those_of_live_tenants_stay() -> None:
    driver = Driver(make_config(num_kv_blocks=200, max_num_seqs=2, enable_prefix_caching=False))
    shares = driver.scheduler._shares
    for tenant in ("runs", "runs", "waits"):
        driver.add(request(f"{tenant}-{len(driver.answers)}", tenant, max_tokens=30))
    driver.step()
    driver.step()
    level, counter = shares.of("waits"), shares.of("runs")
    for index in range(3 * MAX_TENANTS):
        shares.charge(f"idle-{index}", 1000 + index, weight=1.0)  # each of them more than the live ones
        if index % MAX_TENANTS == 0:
            driver.add(request(f"new-{index}", "new"))
    driver.add(request("newcomer", "newcomer"))
    assert len(shares._counters) < MAX_TENANTS
    assert (shares.of("waits"), shares.of("runs")) == (level, counter) and counter > 0
    assert shares.of("newcomer") >= level
    assert f"idle-{3 * MAX_TENANTS - 1}" in shares._counters
    driver.run_until_idle()


# Who is ahead, by steps that cost what they hold

SMALL_BUDGET = 64


class TimedEngine:
    """A scheduler whose steps take a fixed time and more for each token, by a clock of its own."""

    def __init__(
        self, *, budget: int = SMALL_BUDGET, step_seconds: float = 0.008, token_seconds: float = 0.00025
    ) -> None:
        self.scheduler = Scheduler(
            make_config(
                num_kv_blocks=2000,
                max_model_len=1024,
                max_num_seqs=16,
                max_num_batched_tokens=budget,
                enable_prefix_caching=False,
                eos_token_ids=(),
            )
        )
        self.now = 0.0
        self._step_seconds = step_seconds
        self._token_seconds = token_seconds

    def step(self) -> tuple[Counter[str], tuple[EngineOutput, ...]]:
        """Prompt tokens that each tenant had in the step, and what it brought."""
        plan = self.scheduler.schedule(self.now)
        if plan is None:
            return Counter(), ()
        in_step = self.scheduler._in_flight[plan.step_id]
        prompts: Counter[str] = Counter()
        for sequence, entry in zip(in_step, plan.entries, strict=True):
            if len(entry.token_ids) > 1:
                prompts[sequence.request.tenant] += len(entry.token_ids)
        self.now += self._step_seconds + self._token_seconds * plan.num_tokens
        rows = tuple(RowResult(entry.row, (7,) if entry.sample else ()) for entry in plan.entries)
        return prompts, self.scheduler.apply(plan, StepResult(plan.step_id, rows), self.now)


def get_ahead(engine: TimedEngine) -> None:
    """`heavy` is served alone for a while, and has much more to do."""
    for index in range(20):
        engine.scheduler.add(request(f"heavy-{index}", "heavy", num_prompt=200, max_tokens=64), engine.now)
    for _ in range(40):
        engine.step()


def test_prompts_of_who_is_ahead_yield() -> None:
    engine = TimedEngine()
    get_ahead(engine)
    for name in ("first", "second"):
        engine.scheduler.add(request(name, name, num_prompt=20, max_tokens=1), engine.now)
        prompts, outputs = engine.step()
        assert prompts == {name: 20}
        assert name in [output.request_id for output in outputs]
    # Nobody else has a prompt: a few tokens at a time, for somebody may come.
    for _ in range(20):
        prompts, _ = engine.step()
        assert 0 < prompts["heavy"] <= AHEAD_TOKENS


def test_who_yields_is_served_all_the_same() -> None:
    engine = TimedEngine()
    get_ahead(engine)
    served: Counter[str] = Counter()
    for index in range(400):  # another's prompt in each step
        engine.scheduler.add(request(f"light-{index}", "light", num_prompt=40, max_tokens=1), engine.now)
        prompts, _ = engine.step()
        served += prompts
    assert served["heavy"] >= served["light"] / 8


def test_nobody_yields_who_is_alone_or_has_no_name() -> None:
    for tenants in (("heavy",), ("", "")):
        engine = TimedEngine()
        for number, tenant in enumerate(tenants):
            for index in range(6):
                engine.scheduler.add(request(f"{number}-{index}", tenant, num_prompt=500), engine.now)
        assert all(sum(engine.step()[0].values()) == SMALL_BUDGET for _ in range(7))


def median_wait(*, beside_heavy: bool) -> float:
    """Seconds to the first token of nine keys that ask for little, now and then; the clock is the engine's."""
    engine = TimedEngine(budget=1000)
    num_asked = 0
    due = {f"light-{number}": 0.3 + 0.05 * number for number in range(9)}
    due |= {"heavy": 0.0} if beside_heavy else {}
    since: dict[str, float] = {}
    waits: list[float] = []
    while engine.now < 8.0:
        for tenant, at in list(due.items()):
            if at <= engine.now:
                del due[tenant]
                for _ in range(64 if tenant == "heavy" else 1):
                    num_asked += 1
                    name = f"{tenant}/{num_asked}"
                    since[name] = at
                    size = (200, 64) if tenant == "heavy" else (20, 8)
                    asked = request(name, tenant, num_prompt=size[0], max_tokens=size[1])
                    engine.scheduler.add(asked, engine.now)
        _, outputs = engine.step()
        for output in outputs:
            tenant = output.request_id.partition("/")[0]
            if output.request_id in since and tenant != "heavy" and engine.now > 2.0:
                waits.append(engine.now - since[output.request_id])
            since.pop(output.request_id, None)
            if output.finish_reason is not None and tenant == "heavy":
                num_asked += 1
                engine.scheduler.add(request(f"heavy/{num_asked}", "heavy", num_prompt=200, max_tokens=64), engine.now)
            elif output.finish_reason is not None:
                due[tenant] = engine.now + 0.3 + 0.05 * int(tenant.removeprefix("light-"))
        if not outputs and not engine.scheduler.has_work:
            engine.now = min(due.values())
    return sorted(waits)[len(waits) // 2]


def test_light_keys_hardly_notice_a_heavy_one() -> None:
    assert median_wait(beside_heavy=True) <= 1.5 * median_wait(beside_heavy=False)
