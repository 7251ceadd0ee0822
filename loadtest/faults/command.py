"""`python -m loadtest faults [ITEM ...] [--minutes N]`: bounded, and additive: each run appends its trials."""

import argparse
import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loadtest.faults.aborts import run_aborts
from loadtest.faults.attacks import run_attacks
from loadtest.faults.canaries import run_canaries
from loadtest.faults.crowd import run_fairness, run_overload, run_slow
from loadtest.faults.determinism import run_determinism
from loadtest.faults.kills import run_kills
from loadtest.faults.ledger import RESULTS, Ledger, read
from loadtest.faults.machine import run_machines
from loadtest.faults.matrix import cells, run_matrix
from loadtest.faults.poison import run_poison
from loadtest.faults.portable import chats, completions, run_portable
from loadtest.faults.price import run_price
from loadtest.faults.report import AIMED_TRIALS, PAGE, render
from loadtest.faults.server import default_flags, default_settings, scripted_flags, scripted_settings
from loadtest.faults.soak import run_soak
from loadtest.faults.streams import scripted_bodies, text_bodies
from loadtest.faulty_engine import Kind, Phase

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

NUM_STREAMS = 64
NUM_PORTABLE = 16
MATRIX_PART = 24
"""Cells between two looks at the clock."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Of the command line."""

    items: list[str]
    minutes: float
    machine: str | None
    results: Path
    page: Path
    seed: int | None


def add_parser(commands: "Commands") -> None:
    """The subcommand's flags."""
    parser = commands.add_parser(
        "faults",
        help="inject faults into a server of our own and count what clients saw",
        description="Starts its own servers on loopback, appends to the results and renews the page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("items", nargs="*", metavar="ITEM", help=f"of {', '.join(ITEMS)}; none: all")
    parser.add_argument("--minutes", type=float, default=15.0, help="for all items together")
    parser.add_argument("--machine", help="how the results name this machine; default: cores and processor")
    parser.add_argument("--results", type=Path, default=RESULTS, help="trials are appended here")
    parser.add_argument("--page", type=Path, default=PAGE, help="written from all results")
    parser.add_argument("--seed", type=int, help="of random moments; default: another one each time")


def run(options: Options, say: Callable[[str], None]) -> int:
    """0: nothing was wrong in this run; 1: something was; 2: an item that does not exist."""
    logging.disable(logging.CRITICAL)  # thousands of deaths on purpose
    ledger = Ledger(options.results, machine=options.machine)
    items = options.items or list(ITEMS)
    if unknown := [item for item in items if item not in ITEMS]:
        say(f"there is no item {unknown[0]!r}; there are: {', '.join(ITEMS)}")
        return 2
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    share = options.minutes * 60 / sum(ITEMS[item][1] for item in items)
    for item in items:
        work, weight = ITEMS[item]
        began, before = time.monotonic(), len(ledger.added)
        asyncio.run(work(ledger, share * weight, seed))
        outcomes: Counter[str] = Counter()
        for trial in ledger.added[before:]:
            outcomes[trial.outcome.value] += trial.count
        say(f"{item}: {dict(outcomes)} in {time.monotonic() - began:.0f} s")
    options.page.write_text(render(read(options.results)))
    say(f"Appended to {options.results}, written {options.page}")
    return 1 if ledger.num_wrong else 0


async def _matrix(ledger: Ledger, seconds: float, seed: int) -> None:
    """The cells with the fewest trials so far come first, until the time or the plan is done."""
    deadline = time.monotonic() + seconds
    done = Counter(trial.cell for trial in read() if trial.item == "matrix")
    rng = random.Random(seed)
    while time.monotonic() < deadline:
        chosen = sorted(cells(), key=lambda cell: (done[" x ".join(cell)], rng.random()))[:MATRIX_PART]
        if done[" x ".join(chosen[0])] >= AIMED_TRIALS:
            return
        await run_matrix(ledger, chosen)
        done.update(" x ".join(cell) for cell in chosen)


async def _kills(ledger: Ledger, seconds: float, seed: int) -> None:
    await run_kills(
        scripted_settings(step_seconds=0.02),
        scripted_bodies(NUM_STREAMS + 8, max_tokens=150),
        ledger,
        cell="scripted tier",
        num_streams=NUM_STREAMS,
        num_kills=500,
        seconds=seconds,
        seed=seed,
    )


async def _model_kills(ledger: Ledger, seconds: float, seed: int) -> None:
    await run_kills(
        default_settings(),
        text_bodies(NUM_STREAMS // 2 + 4, max_tokens=96),
        ledger,
        cell="default model, native tier",
        num_streams=NUM_STREAMS,
        num_kills=100,
        seconds=seconds,
        seed=seed,
    )


async def _portable(ledger: Ledger, seconds: float, seed: int) -> None:
    await asyncio.to_thread(
        run_portable,
        scripted_flags(step_seconds=0.02),
        completions(scripted_bodies(36, max_tokens=100)),
        ledger,
        cell="scripted tier",
        num_streams=NUM_PORTABLE,
        num_kills=100,
        seconds=seconds,
        seed=seed,
    )


async def _model_portable(ledger: Ledger, seconds: float, seed: int) -> None:
    await asyncio.to_thread(
        run_portable,
        default_flags(),
        completions(text_bodies(18, max_tokens=80)) + chats(4, max_tokens=80),
        ledger,
        cell="default model, native tier",
        num_streams=NUM_PORTABLE,
        num_kills=100,
        seconds=seconds,
        seed=seed,
    )


async def _poison(ledger: Ledger, seconds: float, seed: int) -> None:
    deadline = time.monotonic() + seconds
    plan: list[tuple[Kind, Phase]] = [
        ("sigsegv", "decode"),
        ("memory", "decode"),
        ("sigsegv", "prefill"),
        ("exit", "decode"),
        ("hang", "decode"),
    ]
    for index in range(20 * len(plan)):
        if time.monotonic() > deadline:
            return
        kind, phase = plan[index % len(plan)]
        await run_poison(ledger, kind=kind, phase=phase, num_others=NUM_STREAMS - 1)


async def _aborts(ledger: Ledger, seconds: float, seed: int) -> None:
    await run_aborts(ledger, num_aborts=10_000, seconds=seconds, seed=seed)


async def _canaries(ledger: Ledger, seconds: float, seed: int) -> None:
    await run_canaries(ledger, num_requests=100_000, seconds=seconds, seed=seed)


async def _determinism(ledger: Ledger, seconds: float, seed: int) -> None:
    await run_determinism(ledger, num_prompts=200, seconds=seconds, seed=seed)


async def _machine(ledger: Ledger, seconds: float, seed: int) -> None:
    done = sum(trial.count for trial in read() if trial.item == "machine")
    await run_machines(ledger, num_rules=1_000_000 - done, seconds=seconds)


SCRIPTED_CELL, MODEL_CELL = "scripted tier", "default model, native tier"


async def _overload(ledger: Ledger, seconds: float, seed: int) -> None:
    flags = scripted_flags(step_seconds=0.02)
    await run_overload(ledger, flags=flags, cell=SCRIPTED_CELL, num_output=32, seconds=seconds / 2)
    await run_overload(ledger, flags=default_flags(), cell=MODEL_CELL, num_output=32, seconds=seconds / 2)


async def _fairness(ledger: Ledger, seconds: float, seed: int) -> None:
    await run_fairness(ledger, flags=scripted_flags(step_seconds=0.02), cell=SCRIPTED_CELL, seconds=seconds / 2)
    await run_fairness(ledger, flags=default_flags(), cell=MODEL_CELL, seconds=seconds / 2)


async def _slow(ledger: Ledger, seconds: float, seed: int) -> None:
    await run_slow(ledger, flags=scripted_flags(step_seconds=0.02), cell=SCRIPTED_CELL, seconds=seconds)


async def _attacks(ledger: Ledger, seconds: float, seed: int) -> None:
    """As long as they take: a minute or two."""
    flags = scripted_flags(max_model_len=1_000_000, num_kv_blocks=70_000, step_seconds=0.001)
    await run_attacks(ledger, flags=flags)


async def _price(ledger: Ledger, seconds: float, seed: int) -> None:
    await run_price(ledger, seconds=seconds)


async def _soak(ledger: Ledger, seconds: float, seed: int) -> None:
    bodies = text_bodies(18, max_tokens=64)
    await run_soak(ledger, flags=default_flags(), bodies=bodies, cell=MODEL_CELL, seconds=seconds, seed=seed)


ITEMS: dict[str, tuple[Callable[[Ledger, float, int], Coroutine[None, None, None]], float]] = {
    "kills": (_kills, 3.0),
    "model-kills": (_model_kills, 5.0),
    "portable": (_portable, 3.0),
    "model-portable": (_model_portable, 3.0),
    "matrix": (_matrix, 5.0),
    "poison": (_poison, 1.0),
    "aborts": (_aborts, 1.0),
    "canaries": (_canaries, 1.0),
    "determinism": (_determinism, 2.0),
    "machine": (_machine, 2.0),
    "overload": (_overload, 1.0),
    "fairness": (_fairness, 1.0),
    "slow": (_slow, 1.0),
    "attacks": (_attacks, 1.0),
    "price": (_price, 0.5),
    "soak": (_soak, 2.0),
}
"""What there is to run, and its share of the time."""
