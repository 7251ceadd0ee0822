"""The engine without HTTP under the workloads of the comparison: what clients would see, where a step's time goes.

`python -m loadtest.bench_engine [MODEL_DIR] [--threads N] [--quantization int8] [--budget TOKENS ...] [--rows ...]`

Scheduler, runner and the encoding of messages run in this process, one step after the other. With one thread the clock
is this thread's own CPU time, so that other programs hardly matter; with several it is the wall clock. The time within
the kernels is that of the calling thread, from kernels that were built with HW_PROFILE into a library of their own.
"""

import argparse
import ctypes
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import msgspec
import numpy as np

from app.core.config import EngineConfig
from app.core.types import EngineOutput, EngineRequest, SamplingParams
from app.engine.build import Engine, build_engine
from app.engine.stats import count_work, step_stats
from app.ipc.messages import StepOutputs
from app.runner.native.build import KERNEL_FLAGS_VARIABLE
from app.runner.native.precision import QUANTIZATIONS
from app.runner.native.runner import NativeRunner
from loadtest.bench_kernels import default_model
from loadtest.row_kinds import ROW_KINDS, drawn_as

LAYER_KINDS = (
    "rows", "qkv", "rows", "attention", "rows", "output", "rows", "rows", "gate and up", "rows", "down", "rows",
)  # fmt: skip
"""What each phase of a layer is, in the order of src/phases.h; rows: norm, rotation, rounding, residual."""
HEAD_KINDS = ("rows", "head", "rows")
OUTSIDE = ("schedule", "gather", "sample", "apply", "encode")


@dataclass(frozen=True)
class Workload:
    """A closed loop of fresh prompts, some of whose tokens may be common to all."""

    concurrency: int
    num_prompt: int
    num_output: int
    shared: float = 0.0
    rows: str = "greedy"
    """One of ROW_KINDS."""

    @property
    def name(self) -> str:
        """As docs/benchmarks.md writes it."""
        end = f", {self.shared:.0%} shared" if self.shared else ""
        rows = "" if self.rows == "greedy" else f", {self.rows}"
        return f"{self.concurrency}: {self.num_prompt} / {self.num_output}{end}{rows}"


WORKLOADS = (
    Workload(1, 128, 64), Workload(8, 128, 64), Workload(32, 128, 64), Workload(8, 1024, 64),
    Workload(16, 512, 32, shared=0.9),
)  # fmt: skip


@dataclass
class Run:
    """What one workload took. Times in seconds."""

    seconds: float = 0.0
    num_tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def line(self) -> str:
        """Throughput and latency."""
        p50, p90 = (np.percentile(self.first, p) * 1e3 for p in (50, 90))
        return (
            f"{self.num_tokens / self.seconds:8.0f} tok/s   TTFT p50 {p50:7.1f} p90 {p90:7.1f} ms"
            f"   ITL p50 {np.median(self.gaps) * 1e3:6.1f} p90 {np.percentile(self.gaps, 90) * 1e3:6.1f} ms"
        )


class Loop:
    """The engine's loop, with a clock around each part of a step."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        assert isinstance(engine.runner, NativeRunner)
        self._engine, self._runner, self._clock = engine, engine.runner, clock
        model = self._runner.model
        self._kinds = ("rows", *LAYER_KINDS * model.shape.num_layers, *HEAD_KINDS)
        self._phases = np.zeros(len(self._kinds), dtype=np.uint64)
        profile = self._runner.library.function("hw_profile", None, *(ctypes.c_void_p,) * 3)
        profile(self._runner.context, ctypes.cast(model.reference, ctypes.c_void_p), self._phases.ctypes.data)

    def run(self, workload: Workload, num_requests: int, seed: int) -> Run:
        """Run the workload to its end."""
        rng = np.random.default_rng(seed)
        common = tuple(rng.integers(5, 40_000, round(workload.num_prompt * workload.shared)).tolist())
        rest = workload.num_prompt - len(common)
        waiting = deque(
            EngineRequest(
                request_id=f"{seed}-{index}",
                prompt_token_ids=(*common, *rng.integers(5, 40_000, rest).tolist()),
                params=drawn_as(
                    workload.rows, SamplingParams(seed=index, max_tokens=workload.num_output, ignore_eos=True)
                ),
            )
            for index in range(num_requests)
        )
        run, last = Run(), dict[str, float]()
        begin = self._clock()
        self._phases[:] = 0

        def add() -> None:
            request = waiting.popleft()
            now = last[request.request_id] = self._clock()
            self._engine.scheduler.add(request, now)

        for _ in range(min(workload.concurrency, num_requests)):
            add()
        is_first = set(last)
        while self._engine.scheduler.has_work:
            outputs = self._step(run)
            now = self._clock()
            for output in outputs:
                (run.first if output.request_id in is_first else run.gaps).append(now - last[output.request_id])
                is_first.discard(output.request_id)
                last[output.request_id] = now
                run.num_tokens += len(output.token_ids)
                if output.finish_reason is not None and waiting:
                    is_first.add(waiting[0].request_id)
                    add()
        run.seconds = self._clock() - begin
        for kind, nanoseconds in zip(self._kinds, self._phases.tolist(), strict=True):
            run.spent[kind] += nanoseconds / 1e9
            run.spent["gather"] -= nanoseconds / 1e9
        return run

    def _step(self, run: Run) -> tuple[EngineOutput, ...]:
        scheduler, clock, spent = self._engine.scheduler, self._clock, run.spent
        times = [clock()]
        plan = scheduler.schedule(times[0])
        assert plan is not None
        times.append(clock())
        forward = self._runner.forward(plan)
        times.append(clock())
        result = self._runner.sample(plan, forward)
        times.append(clock())
        outputs = scheduler.apply(plan, result, times[-1])
        times.append(clock())
        work = count_work(plan, times[-1] - times[0])
        stats = step_stats(work, scheduler.counts(), num_kv_blocks=self._engine.limits.num_kv_blocks)
        msgspec.msgpack.encode(StepOutputs(0, plan.step_id, tuple(outputs), stats))
        times.append(clock())
        for part, begin, end in zip(OUTSIDE, times, times[1:], strict=False):
            spent[part] += end - begin
        return outputs


def table(runs: dict[str, Run]) -> str:
    """Markdown: the share of each part in each workload."""
    kinds = ("qkv", "output", "gate and up", "down", "head", "attention", "rows")
    lines = ["| share of the step thread | " + " | ".join(runs) + " |", "| --- |" + " --- |" * len(runs)]
    for kind in (*kinds, *OUTSIDE):
        lines.append(
            f"| {kind} | " + " | ".join(f"{run.spent[kind] / run.seconds:.1%}" for run in runs.values()) + " |"
        )
    outside = (f"{1 - sum(run.spent[kind] for kind in kinds) / run.seconds:.1%}" for run in runs.values())
    lines.append("| **outside of kernels** | " + " | ".join(outside) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="The engine without HTTP, and where a step's time goes.")
    parser.add_argument("model_dir", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quantization", choices=list(QUANTIZATIONS))
    parser.add_argument("--budget", type=int, nargs="+", help="tokens a step; default: as a server measures it")
    parser.add_argument("--rounds", type=int, default=2, help="times concurrency is the number of requests")
    parser.add_argument("--workloads", type=int, nargs="+", default=list(range(len(WORKLOADS))), help="0 to 4")
    parser.add_argument("--rows", choices=list(ROW_KINDS), nargs="+", default=["greedy"], help="how tokens are drawn")
    options = parser.parse_args()
    os.environ[KERNEL_FLAGS_VARIABLE] = "-DHW_PROFILE"
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    for budget in options.budget or [None]:
        config = EngineConfig(
            model_dir=str(options.model_dir or default_model()), tier="native", num_threads=options.threads,
            quantization=options.quantization, max_num_batched_tokens=budget, num_kv_blocks=1024,
        )  # fmt: skip
        engine = build_engine(config)
        loop, runs = Loop(engine, clock), dict[str, Run]()
        loop.run(Workload(4, 64, 8), 8, seed=-1 & 0xFF)
        info = engine.runner.info
        sys.stdout.write(f"{info.tier_reason}, {info.dtype}, {info.max_num_batched_tokens} tokens a step\n")
        for index, rows in product(options.workloads, options.rows):
            workload = replace(WORKLOADS[index], rows=rows)
            # Other prompts for each run: none finds its own in the prefix cache.
            run = loop.run(workload, workload.concurrency * options.rounds, seed=len(runs))
            runs[workload.name] = run
            sys.stdout.write(f"{workload.name:26} {run.line()}\n")
        sys.stdout.write(table(runs) + "\n")
        engine.runner.close()


if __name__ == "__main__":
    main()
