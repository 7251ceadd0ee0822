"""`make gpu-report`: tests/gpu, then times of a card, into docs/gpu/<card>.json (`report_format`).

Needs an NVIDIA device, about ten minutes, 20 GB of disk for random weights of the 8B shape and no network (the default
model has to be in the cache). `--dry-run` walks through every section on the CPU with a tiny model: its figures say
nothing, its report has the same form.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from app.runner.base import TierUnavailable  # noqa: E402
from tests.gpu import measure  # noqa: E402
from tests.gpu.report_format import Prefill, Report, Restart, Step, Target, Throughput  # noqa: E402


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    device: str
    big: dict[str, Any]
    default_model: str | None
    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    big_batches: tuple[int, ...] = (1, 32)
    num_steps: int = 30
    context: int = 256
    prompt: int = 2048
    streams: tuple[int, ...] = (1, 32, 256)
    num_tokens: int = 256
    """Of each stream."""


FULL = Scale("cuda", measure.EIGHT_B, "smollm2-135m-instruct-q4")
DRY = Scale(
    "cpu", measure.TINY, None, big_batches=(1, 3), num_steps=2, context=40, prompt=64, streams=(1,), num_tokens=48
)
SMALL, BIG = "135M", "8B shape, random weights"


class Reporter:
    """Runs sections, and goes on where one fails: a report with one less is still worth a card's time."""

    def __init__(self, scale: Scale, machine: Any) -> None:
        self._scale = scale
        self._machine = machine
        self.failures: dict[str, str] = {}
        self.steps: list[Step] = []
        self.prefills: list[Prefill] = []
        self.restarts: list[Restart] = []
        self.throughputs: list[Throughput] = []

    def section(self, name: str, work: Callable[[], None]) -> None:
        sys.stderr.write(f"{name} ...\n")
        try:
            work()
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            sys.stderr.write(f"{name}: {self.failures[name]}\n")

    def model(self, name: str, folder: Path, batches: Sequence[int]) -> None:
        """Steps, a prompt and a restart of one model."""
        for mode, is_fixed in (("", False), (", deterministic", True)):
            self.section(f"{name}{mode}", partial(self._times, name, folder, batches, is_fixed))
        self.section(f"restart, {name}", partial(self._restart, name, folder))

    def streams(self, folder: Path) -> None:
        for count in self._scale.streams:
            self.section(f"{count} streams", partial(self._throughput, folder, count))

    def _times(self, name: str, folder: Path, batches: Sequence[int], is_fixed: bool) -> None:
        scale = self._scale
        with measure.loaded(folder, scale.device, max_num_seqs=max(batches), deterministic=is_fixed) as runner:
            for batch in batches:
                seconds = measure.decode_seconds(runner, batch, context=scale.context, num_steps=scale.num_steps)
                self.steps.append(measure.step(name, is_fixed, batch, scale.context, seconds, runner, self._machine))
            ms = measure.prefill_seconds(runner, scale.prompt) * 1e3
            self.prefills.append(Prefill(name, is_fixed, scale.prompt, round(ms, 3)))

    def _restart(self, name: str, folder: Path) -> None:
        self.restarts.append(
            measure.restart(folder, name, device=self._scale.device, num_tokens=self._scale.num_tokens)
        )

    def _throughput(self, folder: Path, streams: int) -> None:
        self.throughputs.append(measure.throughput(folder, streams, self._scale.device, self._scale.num_tokens))


def make_report(scale: Scale) -> Report:
    """Everything, section by section."""
    machine = measure.machine(scale.device)
    reporter = Reporter(scale, machine)
    counts = measure.run_tests()
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as scratch:
        big = measure.make_shape(Path(scratch), scale.big)
        small = big if scale.default_model is None else measure.cached(scale.default_model)
        if scale.default_model is not None:
            reporter.model(SMALL, small, scale.batches)
        reporter.model(BIG, big, scale.big_batches)
        reporter.streams(small)
    return Report(
        is_dry_run=scale.device == "cpu",
        date=time.strftime("%Y-%m-%d"),
        machine=machine,
        tests=counts,
        steps=tuple(reporter.steps),
        prefills=tuple(reporter.prefills),
        throughputs=tuple(reporter.throughputs),
        restarts=tuple(reporter.restarts),
        targets=tuple(targets(reporter.steps, reporter.throughputs, reporter.restarts)),
        failures=reporter.failures,
    )


def targets(steps: Sequence[Step], throughputs: Sequence[Throughput], restarts: Sequence[Restart]) -> Iterable[Target]:
    """What is to be reached, beside what was."""
    times = {(one.model, one.is_deterministic, one.batch): one for one in steps}
    lone = times.get((BIG, False, 1))
    share = None if lone is None else lone.bandwidth_share
    yield _target("share of the read bandwidth, 8B shape, batch of 1", share, at_least=0.75)
    small = times.get((SMALL, False, 1))
    yield _target("ms a step, 135M, batch of 1", None if small is None else small.step_ms, at_most=1.2)
    for one in throughputs:
        theirs = one.transformers_tokens_per_second
        ratio = None if theirs is None else one.tokens_per_second / theirs
        yield _target(f"times transformers' continuous batching, {one.streams} streams", ratio, at_least=1.5)
    seconds = [one.seconds for one in restarts if one.model == BIG]
    yield _target("seconds from a kill to the next token, 8B shape", max(seconds, default=None), at_most=5.0)
    for (model, is_fixed, batch), fixed in times.items():
        if is_fixed and (plain := times.get((model, False, batch))) is not None:
            price = 100.0 * (fixed.step_ms / plain.step_ms - 1.0)
            yield _target(f"percent that --deterministic costs, {model}, batch of {batch}", price, at_most=10.0)


def _target(
    name: str, measured: float | None, *, at_least: float | None = None, at_most: float | None = None
) -> Target:
    wanted = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    if measured is None:
        return Target(name, wanted, None, None)
    is_met = (at_least is None or measured >= at_least) and (at_most is None or measured <= at_most)
    return Target(name, wanted, round(measured, 3), is_met)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: written; 1: written, and a test or a section failed; 2: no card."""
    parser = argparse.ArgumentParser(prog="make gpu-report", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="every section on the CPU with a tiny model")
    parser.add_argument("--out", type=Path, help="default: docs/gpu/<card>.json; of a dry run build/gpu-dry-run.json")
    options = parser.parse_args(arguments)
    if not options.dry_run:
        from app.runner.torch.card import find_card

        try:
            find_card()
        except TierUnavailable as unavailable:
            sys.stderr.write(f"{unavailable.reason}: nothing measured, no report; {unavailable.remedy}\n")
            return 2
    report = make_report(DRY if options.dry_run else FULL)
    name = re.sub(r"[^a-z0-9]+", "-", report.machine.card.lower()).strip("-")
    default = ROOT / ("build/gpu-dry-run.json" if options.dry_run else f"docs/gpu/{name}.json")
    target: Path = options.out or default
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    sys.stdout.write(f"wrote {target}\n")
    return 1 if report.failures or report.tests.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
