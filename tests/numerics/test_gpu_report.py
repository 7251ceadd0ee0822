"""`make gpu-report` without a card: what it says, its targets, and the form of what it writes."""

from pathlib import Path

import msgspec
import pytest
import torch

from tests.gpu.report import BIG, SMALL, main, targets
from tests.gpu.report_format import Report, Restart, Step, Throughput


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: there is a card here")
def test_without_a_card_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "report.json")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "nothing measured, no report" in said
    assert not list(tmp_path.iterdir())


def step(model: str, ms: float, *, batch: int = 1, is_deterministic: bool = False, share: float = 0.5) -> Step:
    return Step(model, is_deterministic, batch, 256, ms, ms, 1.0, share)


def test_targets_are_met_or_not_or_unknown() -> None:
    steps = [
        step(SMALL, 1.1), step(SMALL, 1.2, is_deterministic=True), step(BIG, 6.0, share=0.8),
        step(BIG, 9.0, batch=32), step(BIG, 10.0, batch=32, is_deterministic=True),
    ]  # fmt: skip
    found = targets(steps, [Throughput(1, 30.0, 25.0), Throughput(32, 9.0, None)], [Restart(BIG, 7.0, True)])
    assert [(one.measured, one.is_met) for one in found] == [
        (0.8, True), (1.1, True), (1.2, False), (None, None), (7.0, False), (9.091, True), (11.111, False),
    ]  # fmt: skip
    assert all(one.is_met is None for one in targets([], [], []))


@pytest.mark.slow
def test_a_dry_run_has_every_section(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert main(["--dry-run", "--out", str(path)]) == 0
    report = msgspec.json.decode(path.read_bytes(), type=Report)
    assert report.is_dry_run
    assert report.failures == {}
    assert report.tests.skipped > 20
    assert {(one.is_deterministic, one.batch) for one in report.steps} == {(False, 1), (False, 3), (True, 1), (True, 3)}
    assert [one.is_deterministic for one in report.prefills] == [False, True]
    assert [one.streams for one in report.throughputs] == [1]
    assert all(one.has_same_text and one.seconds > 0 for one in report.restarts)
    assert len(report.restarts) == 1
    assert {one.name for one in report.targets if one.measured is None} == {
        "ms a step, 135M, batch of 1",
        "times transformers' continuous batching, 1 streams",
    }
