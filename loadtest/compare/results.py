"""The folder of a comparison: measurements.jsonl (every attempt, one line each), curve.jsonl and machine.json.

Lines are appended and never rewritten. An interrupted comparison goes on where it stopped: what the file
holds is not measured again. A line that a crash cut short is dropped when it is read.
"""

import os
import platform
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from loadtest.compare.measure import Label, Measurement, needs_another, settle

Line = TypeVar("Line", bound=msgspec.Struct)
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "bf16", "i8mm")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What the figures were measured on."""

    cpu: str
    num_cores: int
    """That this process may use."""
    memory_gib: float
    flags: tuple[str, ...]
    kernel: str
    python: str

    @property
    def slug(self) -> str:
        """A folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.cpu} {self.num_cores} cores".lower()).strip("-")

    @property
    def title(self) -> str:
        return f"{self.cpu}, {self.num_cores} cores, {self.memory_gib:.0f} GiB"


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One run of our client and one of another, one after the other, on the same server."""

    workload: str
    our_tokens_per_s: float
    their_tokens_per_s: float
    our_tpot_ms: float
    their_tpot_ms: float


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One server under Poisson arrivals of one rate. Latencies in milliseconds, from the scheduled time."""

    peer: str
    version: str
    rate: float
    """Requests a second that were offered."""
    num_requests: int
    num_completed: int
    goodput: float
    """Requests a second with a first token within a second and at most 100 ms a token after it."""
    goodput_share: float
    """Of the requests offered."""
    strict_share: float
    """The same with 50 ms a token."""
    tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p90_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    itl_p99_ms: float | None
    lag_p99_ms: float | None
    """Of our client behind its own schedule."""
    moved: float
    """By which part the machine's peaks differ before and after."""
    finished: str
    """UTC, ISO 8601."""


class Results:
    """One folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._measurements = folder / "measurements.jsonl"
        self._points = folder / "curve.jsonl"

    def measurements(self) -> list[Measurement]:
        """All attempts, in the order in which they were made."""
        return _read_lines(self._measurements, Measurement)

    def keep(self, measurement: Measurement) -> None:
        """Append one attempt, on the disk when this returns."""
        _append_line(self._measurements, measurement)

    def points(self) -> list[Point]:
        """Of all curves, in the order in which they were measured."""
        return _read_lines(self._points, Point)

    def keep_point(self, point: Point) -> None:
        """Append one, on the disk when this returns."""
        _append_line(self._points, point)

    def keep_machine(self, machine: Machine) -> None:
        """Write machine.json. Raises ValueError where the folder holds another machine's figures."""
        path = self.folder / "machine.json"
        known = self.machine()
        if known is not None and (known.cpu, known.num_cores) != (machine.cpu, machine.num_cores):
            raise ValueError(f"{self.folder} holds figures of {known.title}; give another folder by --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(machine), indent=2) + b"\n")

    def keep_turns(self, turns: Sequence[Turn]) -> None:
        """Write client-check.json."""
        text = msgspec.json.format(msgspec.json.encode(turns), indent=2)
        (self.folder / "client-check.json").write_bytes(text + b"\n")

    def turns(self) -> list[Turn]:
        """What client-check.json says, if there is one."""
        path = self.folder / "client-check.json"
        return msgspec.json.decode(path.read_bytes(), type=list[Turn]) if path.exists() else []

    def machine(self) -> Machine | None:
        """What machine.json says."""
        path = self.folder / "machine.json"
        return msgspec.json.decode(path.read_bytes(), type=Machine) if path.exists() else None


def _read_lines(path: Path, kind: type[Line]) -> list[Line]:
    """What each line holds; one that was cut short holds nothing."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(line, type=kind))
    return found


def _append_line(path: Path, value: msgspec.Struct) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line that a crash cut short must not swallow this one.
    is_cut = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
    with path.open("ab") as file:
        file.write(b"\n" * is_cut + msgspec.json.encode(value) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def is_done(label: Label, measurements: Iterable[Measurement]) -> bool:
    """Whether this has been measured: steadily, or as often as it may be."""
    return not needs_another([m for m in measurements if label_of(m) == label])


def label_of(measurement: Measurement) -> Label:
    """What it is of."""
    return Label(
        peer=measurement.peer,
        version=measurement.version,
        workload=measurement.workload,
        is_quick=measurement.is_quick,
        round_index=measurement.round_index,
    )


def counting(measurements: Sequence[Measurement]) -> list[Measurement]:
    """One measurement a round, of each server's latest version only. Long runs go before quick ones."""
    latest = {m.peer: m.version for m in measurements}
    attempts: dict[Label, list[Measurement]] = {}
    for measurement in measurements:
        if measurement.version == latest[measurement.peer]:
            attempts.setdefault(label_of(measurement), []).append(measurement)
    long = {(label.peer, label.workload) for label in attempts if not label.is_quick}
    return [
        settle(tries)
        for label, tries in attempts.items()
        if not (label.is_quick and (label.peer, label.workload) in long)
    ]


def this_machine() -> Machine:
    """From /proc, and what this process may use of it."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
        return found.group(1).strip() if found else ""

    # A name alone does not tell one generation from the next on a virtual machine.
    family, model = field("cpu family"), field("model")
    name = field("model name") or platform.machine()
    total = re.search(r"^MemTotal:\s*(\d+)", meminfo, re.MULTILINE)
    has = set((field("flags") or field("Features")).split())
    return Machine(
        cpu=f"{name} (family {family} model {model})" if family else name,
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=int(total.group(1)) / (1 << 20) if total else 0.0,
        flags=tuple(flag for flag in _FLAGS if flag in has),
        kernel=platform.release(),
        python=platform.python_version(),
    )
