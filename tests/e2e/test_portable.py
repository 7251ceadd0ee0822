"""Whole servers that are killed under streams, which go on on another one; in short what `loadtest faults` measures."""

from pathlib import Path

import pytest

from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.matrix import PHASES, run_matrix
from loadtest.faults.portable import API_KILL, ITEM, Oracle, chats, completions, run_portable
from loadtest.faults.replicas import Client, Spoken, replicas
from loadtest.faults.report import render
from loadtest.faults.server import default_flags, scripted_flags
from loadtest.faults.streams import scripted_bodies, text_bodies
from tests.store_models import default_model_folder


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    default_model_folder()
    return Ledger(tmp_path / "faults.jsonl", machine="this one")


def test_a_whole_server_is_killed_and_its_streams_go_on_on_another(ledger: Ledger) -> None:
    run_portable(
        scripted_flags(step_seconds=0.01),
        completions(scripted_bodies(9, max_tokens=50)),
        ledger,
        cell="scripted tier",
        num_streams=8,
        num_kills=1,
        seconds=60,
        seed=1,
    )
    [trial] = ledger.added
    assert trial.outcome is Outcome.SURVIVED, trial.detail
    assert trial.figures["cut"] > 0 and trial.figures["by_tokens"] + trial.figures["by_decode"] == trial.figures["cut"]
    assert "| scripted tier | 1 | 0 of 1 |" in render(ledger.added)


@pytest.mark.slow
def test_on_the_default_model_with_chats_tools_and_schemas(ledger: Ledger) -> None:
    run_portable(
        default_flags(),
        completions(text_bodies(9, max_tokens=40)) + chats(2, max_tokens=40),
        ledger,
        cell="default model",
        num_streams=9,
        num_kills=1,
        seconds=60,
        seed=4,
    )
    [trial] = ledger.added
    assert trial.outcome is Outcome.SURVIVED, trial.detail
    assert trial.figures["cut"] > 0


@pytest.mark.slow
async def test_the_row_of_the_matrix(ledger: Ledger) -> None:
    await run_matrix(ledger, [(API_KILL, phase) for phase in PHASES])
    assert [trial.outcome for trial in ledger.added] == [Outcome.SURVIVED] * len(PHASES), ledger.added


def test_a_stream_that_differs_or_is_lost_is_told(ledger: Ledger) -> None:
    """The item can fail."""
    [(kind, body), *_] = scripted_bodies(1, max_tokens=8)
    with replicas(1, *scripted_flags()) as (server,):
        oracle = Oracle(server)
        client = Client(kind, "/v1/completions", body)
        client.start([server.url])
        client.join()
        assert oracle.difference(client) == ""
        client.spoken.choices[0]["text"] += "x"
        assert oracle.difference(client) == f"{kind}: differs"
        client.spoken = Spoken()
        assert oracle.difference(client) == f"{kind}: differs"
        lost = Client(kind, "/v1/nowhere", body)
        lost.start([server.url])
        lost.join()
        assert "404" in oracle.difference(lost)
    assert ITEM not in {trial.item for trial in ledger.added}
