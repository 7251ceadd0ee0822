"""The faults suite in short: one cell of each phase, a few kills under mixed streams, poison, aborts."""

from collections import Counter
from pathlib import Path

import pytest

from app.client.settings import Supervision
from loadtest.faults.aborts import run_aborts
from loadtest.faults.attacks import run_attacks
from loadtest.faults.canaries import run_canaries
from loadtest.faults.crowd import run_fairness, run_overload
from loadtest.faults.kills import run_kills
from loadtest.faults.ledger import Ledger, Outcome, Trial, read
from loadtest.faults.matrix import PHASES, cells, run_matrix
from loadtest.faults.poison import run_poison
from loadtest.faults.report import bound, render
from loadtest.faults.server import scripted_flags, scripted_settings
from loadtest.faults.soak import run_soak
from loadtest.faults.streams import scripted_bodies
from loadtest.faulty_engine import Kind, Phase
from tests.store_models import default_model_folder

SHORT = {
    "start": "frame_lost",
    "idle": "sigkill",
    "prefill": "grammar_crash",
    "chunked_prefill": "exception",
    "decode": "row_error",
    "last_token": "frame_doubled",
    "abort": "exit",
    "drain": "sigstop",
}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    default_model_folder()  # its tokenizer
    return Ledger(tmp_path / "faults.jsonl", machine="this one")


def outcomes(ledger: Ledger) -> "Counter[Outcome]":
    counts: Counter[Outcome] = Counter()
    for trial in ledger.added:
        assert trial.outcome is not Outcome.WRONG, f"{trial.cell}: {trial.detail}"
        counts[trial.outcome] += trial.count
    return counts


async def test_a_fault_in_each_phase(ledger: Ledger) -> None:
    chosen = [(kind, phase) for kind, phase in cells() if SHORT[phase] == kind]
    await run_matrix(ledger, [*chosen, ("no_descriptors", "decode")])
    assert outcomes(ledger) == {Outcome.SURVIVED: len(PHASES), Outcome.FAILED_CLEANLY: 1}


async def test_kills_under_streams_of_all_kinds(ledger: Ledger) -> None:
    await run_kills(
        scripted_settings(step_seconds=0.01),
        scripted_bodies(18, max_tokens=60),
        ledger,
        cell="scripted",
        num_streams=18,
        num_kills=5,
        seconds=30,
        seed=1,
    )
    assert outcomes(ledger)[Outcome.SURVIVED] >= 5 + 18


@pytest.mark.parametrize(("kind", "phase"), [("memory", "decode"), ("sigsegv", "prepare")])
async def test_one_poison(ledger: Ledger, kind: Kind, phase: Phase) -> None:
    await run_poison(ledger, kind=kind, phase=phase, num_others=16)
    assert outcomes(ledger) == {Outcome.FAILED_CLEANLY: 1}
    assert ledger.added[0].figures["deaths"] == 2


async def test_clients_that_leave(ledger: Ledger) -> None:
    await run_aborts(ledger, num_aborts=200, seconds=30, seed=1)
    assert outcomes(ledger) == {Outcome.SURVIVED: 200}


async def test_canaries_under_kills(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "faults.jsonl", machine="this one")
    await run_canaries(ledger, num_requests=400, seconds=20, seed=1, requests_per_kill=150)
    assert outcomes(ledger)[Outcome.SURVIVED] >= 400
    assert ledger.added[0].figures["kills"] >= 1


@pytest.mark.slow
async def test_soak_in_short(ledger: Ledger) -> None:
    bodies = scripted_bodies(9, max_tokens=40)
    flags = scripted_flags(step_seconds=0.005)
    await run_soak(
        ledger, flags=flags, bodies=bodies, cell="scripted", seconds=12.0, seed=1, kill_seconds=2.0, think_seconds=0.1
    )
    assert outcomes(ledger)[Outcome.SURVIVED] == 2
    under_kills, undisturbed = ledger.added
    assert under_kills.figures["kills"] and undisturbed.figures["equal"] and undisturbed.figures["engine_mib"]


async def test_crowds_in_short(ledger: Ledger) -> None:
    """Each kind is run and told; what a machine of tests is worth says nothing of the figures."""
    flags = scripted_flags(step_seconds=0.05)  # about 20 requests a second: a busy machine sends ten times that too
    await run_overload(ledger, flags=flags, cell="scripted", num_output=16, seconds=0.0, share_seconds=0.5)
    flags = scripted_flags(step_seconds=0.01)
    await run_fairness(ledger, flags=flags, cell="scripted", seconds=0.4, warm_seconds=0.1)
    trials = {(trial.item, trial.cell): trial for trial in ledger.added}
    assert {"2x", "5x", "10x"} == {cell.rpartition(" ")[2] for item, cell in trials if item == "overload"}
    assert all("broken" not in trial.detail and "failed" not in trial.detail for trial in ledger.added)
    assert all(trial.figures["goodput_per_second"] > 0 for trial in ledger.added if trial.item == "overload")
    assert trials["fairness", "scripted"].figures["requests"] >= 9


async def test_attacks_in_short(ledger: Ledger) -> None:
    names = ("n of 16,384", "an expression of counted repeats", "a header of 4 MiB")
    await run_attacks(ledger, flags=scripted_flags(), names=names)
    assert outcomes(ledger) == {Outcome.SURVIVED: len(names)}
    assert all(trial.figures["peak_mib"] > 0 and trial.figures["longest_probe_ms"] > 0 for trial in ledger.added)


async def test_a_stream_that_differs_is_told(ledger: Ledger) -> None:
    """The suite can fail: where no engine is started again, streams are lost and said to be."""
    await run_kills(
        scripted_settings(step_seconds=0.01),
        scripted_bodies(4, max_tokens=60),
        ledger,
        cell="scripted",
        num_streams=4,
        num_kills=1,
        seconds=30,
        seed=1,
        supervision=Supervision(max_deaths=1),
    )
    assert {trial.outcome for trial in ledger.added} == {Outcome.WRONG}


def test_the_page_counts_what_was_appended(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add("matrix", "exit x decode", Outcome.SURVIVED)
    ledger.add("matrix", "exit x decode", Outcome.WRONG, detail="a bystander differs")
    ledger.add("kills", "scripted tier", Outcome.SURVIVED, first=0.2, last=0.3)
    ledger.add("streams", "scripted tier: greedy", Outcome.SURVIVED, count=300)
    trials = read(tmp_path / "faults.jsonl")
    assert [type(trial) for trial in trials] == [Trial] * 4
    page = render(trials)
    assert "1 + 0 of 2, **1 wrong**" in page and "a bystander differs" in page
    assert "| scripted tier: greedy | 300 | 0 of 300; < 1 % |" in page
    assert bound(1000, 0) == "0 of 1,000; < 0.3 %"
