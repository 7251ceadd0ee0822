"""The judge of a soak: what grows is seen, what only moves is not called growth."""

import random

import pytest

from loadtest.faults.soak import trend


def test_growth_is_seen() -> None:
    rng = random.Random(1)
    times = [15.0 * index for index in range(240)]
    grows = trend(times, [100 + 12 * at / 3600 + rng.gauss(0, 0.5) for at in times])
    assert abs(grows.mib_per_hour - 12) < grows.margin + 0.5 and grows.margin < 2


def test_what_moves_up_and_down_does_not_grow() -> None:
    rng = random.Random(2)
    times = [15.0 * index for index in range(240)]
    flat = trend(times, [100 + rng.gauss(0, 3) for _ in times])
    assert abs(flat.mib_per_hour) <= flat.margin


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="let it run longer"):
        trend([0.0, 1.0], [5.0, 5.0])
