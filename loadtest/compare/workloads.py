"""What is asked of every server: the five loads, how many requests stand for each, and fresh prompts for each run.

Prompts are common words, each one token of the SmolLM2 vocabulary, so that a server which takes no token
ids gets the same prompts as all others. They depend on (workload, round, attempt) alone: every server gets
the same ones in a round, and none gets a prompt twice.
"""

import zlib
from collections.abc import Sequence

import msgspec

from loadtest.run import RunConfig

_WARMUP_TOKENS = 4096
_WARMUP_OUTPUT = 4


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """A closed loop: `concurrency` requests are always running."""

    concurrency: int
    input_len: int
    output_len: int
    shared_prefix: float = 0.0
    """Part of the input, 0 to 1, that the requests of one run share."""
    num_requests: int
    num_quick: int
    """Requests of a run with --quick."""

    @property
    def name(self) -> str:
        return f"{self.concurrency}:{self.input_len}/{self.output_len}"

    @property
    def title(self) -> str:
        shared = f", {self.shared_prefix:.0%} shared prefix" if self.shared_prefix else ""
        return f"{self.concurrency}: {self.input_len} / {self.output_len}{shared}"


WORKLOADS = (
    Workload(concurrency=1, input_len=128, output_len=64, num_requests=16, num_quick=8),
    Workload(concurrency=8, input_len=128, output_len=64, num_requests=64, num_quick=32),
    Workload(concurrency=32, input_len=128, output_len=64, num_requests=128, num_quick=64),
    Workload(concurrency=8, input_len=1024, output_len=64, num_requests=32, num_quick=16),
    Workload(concurrency=16, input_len=512, output_len=32, shared_prefix=0.9, num_requests=96, num_quick=48),
)


def select(names: Sequence[str]) -> tuple[Workload, ...]:
    """The workloads of these names, in the table's order; all where none is named. Raises ValueError."""
    known = {workload.name: workload for workload in WORKLOADS}
    for name in names:
        if name not in known:
            raise ValueError(f"the workload {name!r} is none of {', '.join(known)}")
    return tuple(workload for workload in WORKLOADS if not names or workload.name in names)


def run_config(workload: Workload, *, url: str, is_quick: bool, round_index: int, attempt: int) -> RunConfig:
    """The measured run."""
    return RunConfig(
        url=url,
        num_requests=workload.num_quick if is_quick else workload.num_requests,
        concurrency=workload.concurrency,
        input_len=workload.input_len,
        output_len=workload.output_len,
        shared_prefix=workload.shared_prefix,
        seed=_seed(workload, round_index, attempt),
    )


def warmup_config(measured: RunConfig) -> RunConfig:
    """A short run of the same shape before it, with prompts (and a shared prefix) of its own."""
    num_requests = max(1, min(measured.concurrency, _WARMUP_TOKENS // measured.input_len))
    return msgspec.structs.replace(
        measured, num_requests=num_requests, output_len=_WARMUP_OUTPUT, seed=measured.seed ^ 0x5A5A5A5A
    )


def _seed(workload: Workload, round_index: int, attempt: int) -> int:
    return zlib.crc32(f"{workload.name} {round_index} {attempt}".encode())
