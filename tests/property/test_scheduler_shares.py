"""Shares of tenants: whoever waits all the while is served as much as the others, over its weight."""

import random
from collections import Counter
from zlib import crc32

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.types import EngineRequest
from app.scheduler.shares import MAX_TENANTS, Shares
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
    shares = Shares()
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
