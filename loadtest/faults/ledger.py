"""What was tried and what came of it: one JSON line a trial, only ever appended."""

import os
import subprocess
import time
from enum import StrEnum
from pathlib import Path

import msgspec

RESULTS = Path("loadtest/results/faults.jsonl")


class Outcome(StrEnum):
    """What the clients saw."""

    SURVIVED = "survived"
    """Every stream said what its uninterrupted run says, byte by byte."""
    FAILED_CLEANLY = "failed cleanly"
    """The request that the fault was aimed at ended with an error that says so, the others as above."""
    WRONG = "wrong"
    """Anything else."""


class Trial(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line."""

    at: str
    commit: str
    machine: str
    item: str
    cell: str
    outcome: Outcome
    count: int = 1
    """Equal trials that this line stands for."""
    detail: str = ""
    figures: dict[str, float] = {}
    """Seconds, or counts by name."""


class Ledger:
    """Appends to a file, and keeps what this run has added."""

    def __init__(self, path: Path = RESULTS, *, machine: str | None = None) -> None:
        self._path = path
        self._machine = machine_name() if machine is None else machine
        self._commit = _commit()
        self.added: list[Trial] = []

    def add(
        self, item: str, cell: str, outcome: Outcome, *, count: int = 1, detail: str = "", **figures: float
    ) -> None:
        """Append one line."""
        trial = Trial(
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            commit=self._commit,
            machine=self._machine,
            item=item,
            cell=cell,
            outcome=outcome,
            count=count,
            detail=detail[:300],
            figures={name: round(value, 4) for name, value in figures.items()},
        )
        self.added.append(trial)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(trial) + b"\n")

    @property
    def num_wrong(self) -> int:
        """Of this run."""
        return sum(trial.count for trial in self.added if trial.outcome is Outcome.WRONG)


def read(path: Path = RESULTS) -> list[Trial]:
    """All trials ever appended."""
    if not path.exists():
        return []
    decode = msgspec.json.Decoder(Trial).decode
    return [decode(line) for line in path.read_bytes().splitlines() if line.strip()]


def machine_name() -> str:
    """Cores and processor."""
    name = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} cores {name}"


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
