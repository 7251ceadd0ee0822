"""The state machine over scheduler, pool and journal, with deaths, hand-overs and resumptions as rules, for long."""

import asyncio
import time

from loadtest.faults.ledger import Ledger, Outcome
from tests.property.handover_machine import run_machine

ITEM = "machine"
CELL = "scheduler, pool and journal"
EXAMPLES = 400
"""Machines between two looks at the clock, of 40 rules at most."""


async def run_machines(ledger: Ledger, *, num_rules: int, seconds: float) -> None:
    """At most so many rules, in at most so many seconds; a line for each part."""
    deadline = time.monotonic() + seconds
    done = 0
    while done < num_rules and time.monotonic() < deadline:
        try:
            totals = await asyncio.to_thread(run_machine, num_examples=EXAMPLES)
        except AssertionError as error:
            ledger.add(ITEM, CELL, Outcome.WRONG, detail=str(error))
            return
        done += totals["rules"]
        ledger.add(
            ITEM,
            CELL,
            Outcome.SURVIVED,
            count=totals["rules"],
            deaths=totals["deaths"],
            resumed=totals["resumed"],
            convicted=totals["convicted"],
        )
