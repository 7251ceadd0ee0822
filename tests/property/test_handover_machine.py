"""The machine of journal, scheduler and pool, in short and for long."""

import pytest

from tests.property.handover_machine import run_machine


def test_nobody_notices() -> None:
    totals = run_machine(num_examples=70)
    print(f"\n{dict(totals)}")  # noqa: T201
    for event in ("deaths", "resumed", "aborted", "tokens lost on the wire", "convicted"):
        assert totals[event] > 10, f"{event} hardly happens: the machine tests nothing"


@pytest.mark.slow
def test_nobody_notices_for_long() -> None:
    assert run_machine(num_examples=2_000)["rules"] > 10_000
