"""Volume: random engines under random traffic, every invariant checked after every step (tests/property/driver.py)."""

import random
from collections import Counter

import msgspec
import pytest

from tests.property.driver import Driver
from tests.property.traffic import random_config, random_request

NUM_STEPS = 21_000


@pytest.mark.parametrize(
    ("seed", "lag", "draft"),
    [(1, 0, False), (2, 0, False), (3, 1, False), (4, 2, False), (5, 0, True)],
    ids=["plain-1", "plain-2", "one-step-ahead", "two-steps-ahead", "drafts"],
)
def test_random_traffic(seed: int, lag: int, draft: bool) -> None:
    rng = random.Random(seed)
    totals: Counter[str] = Counter()
    while totals["steps"] < NUM_STEPS:
        totals += _episode(rng, lag=lag, draft=draft)
    print(f"\n{dict(totals)}")  # noqa: T201
    assert totals["steps"] >= NUM_STEPS
    for event in ("finished", "aborted", "failed", "preemptions", "hit tokens", "held", "prepared", "adopted"):
        assert totals[event] > 50, f"{event} hardly happens: the traffic tests nothing"


def _episode(rng: random.Random, *, lag: int, draft: bool) -> "Counter[str]":
    """One engine from start to idle; returns what happened."""
    driver = Driver(random_config(rng), lag=lag, draft=draft)
    totals: Counter[str] = Counter()
    num_requests = rng.randint(1, 40)
    pressure = rng.choice([0.2, 0.6, 0.95])
    for index in range(num_requests):
        request = random_request(rng, f"request-{index}", config=driver.config)
        for sample in range(rng.choice([1, 1, 1, 4])):
            driver.add(msgspec.structs.replace(request, request_id=f"request-{index}-{sample}"))
        while rng.random() > pressure:
            driver.step()
            totals += _mishap(rng, driver)
    driver.run_until_idle()
    counts = driver.scheduler.counts()
    totals["steps"] = driver.num_steps
    totals["held"] = driver.num_held
    totals["prepared"] = driver.num_prepared
    totals["finished"] = len(driver.answers)
    totals["preemptions"] = counts.total_preemptions
    totals["hit tokens"] = counts.total_prefix_hit_tokens
    return totals


def _mishap(rng: random.Random, driver: Driver) -> "Counter[str]":
    live_ids = driver.live_ids
    if live_ids and rng.random() < 0.05:
        driver.abort(rng.choice(live_ids))
        return Counter(aborted=1)
    if live_ids and rng.random() < 0.03:
        driver.fail(rng.choice(live_ids))
        return Counter(failed=1)
    if rng.random() < 0.02:
        driver.crash()
        return Counter(crashed=1, adopted=driver.scheduler.num_adopted_blocks)
    return Counter()
