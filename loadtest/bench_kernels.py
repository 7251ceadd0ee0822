"""Each kernel of the native tier against what this machine reads and computes at most.

`python -m loadtest.bench_kernels [MODEL_DIR] [--threads N] [--quantization int8]`, or `make bench-kernels`.
Times are the best of several rounds, one thread by its own CPU time, several by the clock: on a busy
machine a call of the clock that is longer than a slice of the scheduler (some 4 ms) holds other programs'
time, so linears are timed a few layers a call. The peaks are measured between the kernels. Weights are
walked through layer by layer, so they come from memory as in a step, and each linear is finished as in a
step (residual, silu).
"""

import argparse
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from app.core.config import EngineConfig
from app.core.plan import LogitsNeed, PlanEntry, RowStart, StepPlan
from app.core.types import SamplingParams
from app.runner.native import load
from app.runner.native.blocks import BLOCK
from app.runner.native.library import CLayer, address
from app.runner.native.model import BLOCK_SIZE
from app.runner.native.precision import QUANTIZATIONS
from app.runner.native.runner import NativeForward, NativeRunner
from app.store import list_models

ROUNDS = 15
READ_BYTES = 128 << 20
PEAK_ROUNDS = 200_000
LAYERS_A_CALL = 5
LINEARS = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True)
class Peaks:
    """The best seen so far, all threads together."""

    bytes_per_second: float
    ops_per_second: float


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seconds: float
    num_bytes: float
    num_ops: float

    def text(self, peaks: Peaks) -> str:
        """Milliseconds, GB/s and GFLOP/s with their share of the peak."""
        rate, ops = self.num_bytes / self.seconds, self.num_ops / self.seconds
        return (
            f"{self.name:28} {self.seconds * 1e3:9.3f} ms {rate / 1e9:7.1f} GB/s {rate / peaks.bytes_per_second:5.0%}"
            f" {ops / 1e9:8.1f} GFLOP/s {ops / peaks.ops_per_second:5.0%}"
        )


def best(actions: Sequence[Callable[[], object]], clock: Callable[[], float], rounds: int = ROUNDS) -> float:
    """Seconds of the actions one after the other, each at its fastest of several rounds."""
    seconds = [float("inf")] * len(actions)
    for _ in range(rounds):
        for index, action in enumerate(actions):
            begin = clock()
            action()
            seconds[index] = min(seconds[index], clock() - begin)
    return sum(seconds)


class Bench:
    """A loaded model and its library's benchmark functions."""

    def __init__(self, model_dir: Path, *, threads: int, quantization: str | None) -> None:
        config = EngineConfig(
            model_dir=str(model_dir), num_threads=threads, quantization=quantization, num_kv_blocks=1024,
            max_num_batched_tokens=512,
        )  # fmt: skip
        self.runner: NativeRunner = load(config)
        self.threads = threads
        self.is_int8 = quantization is not None
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.library = self.runner.library
        self.model = self.runner.model
        self.rng = np.random.default_rng(0)
        self._data = np.ones(READ_BYTES // 4, dtype=np.float32)

    def peaks(self) -> Peaks:
        """Reading a large array, and dot-product steps on registers; each thread does its share."""
        read = self.library.function("hw_read", c_float, c_void_p, c_int64)
        name = "hw_peak_int8" if self.is_int8 else "hw_peak_bf16"
        peak = self.library.function(name, c_int64, c_int64, c_void_p)
        sinks = [np.zeros(256, dtype=np.float32) for _ in range(self.threads)]
        share = len(self._data) // self.threads // 128 * 128
        parts = [self._data[i * share : (i + 1) * share] for i in range(self.threads)]
        ops = peak(1, address(sinks[0])) * PEAK_ROUNDS * self.threads
        return Peaks(
            bytes_per_second=share
            * 4
            * self.threads
            / self._best(lambda: self._together(lambda i: read(address(parts[i]), share))),
            ops_per_second=ops / self._best(lambda: self._together(lambda i: peak(PEAK_ROUNDS, address(sinks[i])))),
        )

    def linear(self, which: int, rows: int) -> Row:
        """One linear of every layer."""
        run = self.library.function(
            "hw_run_linears", None, c_void_p, ctypes.POINTER(CLayer), c_int32, c_int32, c_int32, c_void_p, c_void_p,
            c_void_p,
        )  # fmt: skip
        linear = getattr(self.model.weights.layers[0], LINEARS[which])
        num_layers = len(self.model.weights.layers)
        x = self.rng.integers(0x3C00, 0x3F00, (rows, linear.k)).astype(np.uint16)
        scales = np.ones((rows, linear.k // BLOCK + 1, 4), dtype=np.float32)  # enough for weights in blocks
        out = np.zeros((rows, linear.n_pad), dtype=np.float32)

        def run_some(first: int) -> None:
            layers = ctypes.pointer(self.model.layers[first])
            count = min(LAYERS_A_CALL, num_layers - first)
            run(self.runner.context, layers, count, which, rows, address(x), address(scales), address(out))

        calls = [partial(run_some, first) for first in range(0, num_layers, LAYERS_A_CALL)]
        seconds = best(calls, self.clock) / num_layers
        return Row(f"{LINEARS[which]} {linear.k}x{linear.n_pad} M={rows}", seconds, linear.weight.nbytes,
                   2.0 * linear.k * linear.n_pad * rows)  # fmt: skip

    def attention(self, num_rows: int, context: int, num_new: int) -> Row:
        """The attention of a step: `num_new` tokens a row, after `context` tokens."""
        _, forward = self._step(num_rows, context, num_new)
        run = self.library.function("hw_run_attention", None, c_void_p, c_void_p, c_void_p)
        struct = forward.arrays.struct(forward.wanted)
        reference = ctypes.cast(self.model.reference, c_void_p)
        shape = self.model.shape
        seconds = self._best(lambda: run(self.runner.context, reference, ctypes.cast(ctypes.byref(struct), c_void_p)))
        keys = sum(context + i + 1 for i in range(num_new)) * num_rows
        num_bytes = num_rows * (context + num_new) * shape.kv_bytes_per_token
        ops = 4.0 * keys * shape.num_heads * shape.head_dim * shape.num_layers
        return Row(f"attention B={num_rows} ctx={context} +{num_new}", seconds, num_bytes, ops)

    def step(self, num_rows: int, context: int, num_new: int) -> Row:
        """A whole step with greedy sampling."""
        plan, _ = self._step(num_rows, context, num_new)
        seconds = self._best(lambda: self.runner.sample(plan, self.runner.forward(plan)))
        shape, weights = self.model.shape, self.model.weights
        kv = num_rows * (context + num_new) * shape.kv_bytes_per_token
        layers = sum(
            getattr(layer, name).n_pad * getattr(layer, name).k for layer in weights.layers for name in LINEARS
        )
        ops = 2.0 * (layers * num_rows * num_new + weights.head.n_pad * weights.head.k * num_rows)
        return Row(f"step B={num_rows} ctx={context} +{num_new}", seconds, weights.num_bytes + kv, ops)

    def _step(self, num_rows: int, context: int, num_new: int) -> tuple[StepPlan, NativeForward]:
        blocks = -(-(context + num_new) // BLOCK_SIZE)
        tables = [tuple(range(row * blocks, (row + 1) * blocks)) for row in range(num_rows)]
        for row, table in enumerate(tables):
            for start in range(0, max(context, 1), 512):
                count = min(512, context - start) or 1
                self.runner.forward(StepPlan(0, (self._entry(row, start, count, table, is_first=start == 0),)))
        entries = tuple(self._entry(row, context, num_new, table) for row, table in enumerate(tables))
        plan = StepPlan(0, entries)
        return plan, self.runner.forward(plan)

    def _entry(self, row: int, start: int, count: int, table: Sequence[int], *, is_first: bool = False) -> PlanEntry:
        token_ids = tuple(self.rng.integers(0, self.model.shape.vocab_size, count).tolist())
        params = SamplingParams(seed=0, max_tokens=1, temperature=0.0)
        return PlanEntry(
            row=row, start=start, token_ids=token_ids, num_draft_tokens=0, block_table=tuple(table),
            num_new_blocks=0, logits=LogitsNeed.LAST, sample=True,
            start_row=RowStart(str(row), params, token_ids, ()) if is_first else None,
        )  # fmt: skip

    def _best(self, action: Callable[[], object]) -> float:
        return best([action], self.clock)

    def _together(self, action: Callable[[int], object]) -> None:
        threads = [threading.Thread(target=action, args=(i,)) for i in range(1, self.threads)]
        for thread in threads:
            thread.start()
        action(0)
        for thread in threads:
            thread.join()


def default_model() -> Path:
    """The default model's folder in the cache."""
    for model in list_models():
        if model.is_default and model.path is not None:
            return model.path
    raise SystemExit("the default model is not in the cache: run `headwater pull` or name a folder")


def report(bench: Bench, write: Callable[[str], object]) -> None:
    """Print the table; the peaks are the best of three measurements around it."""
    measured = [bench.peaks()]
    rows = [bench.linear(which, num_rows) for which in range(4) for num_rows in (1, 8, 32, 64)]
    measured.append(bench.peaks())
    rows += [
        bench.attention(*shape) for shape in ((1, 256, 1), (8, 1024, 1), (32, 256, 1), (1, 0, 256), (1, 1024, 256))
    ]
    rows += [bench.step(*shape) for shape in ((1, 256, 1), (8, 256, 1), (32, 256, 1), (8, 1024, 1), (1, 0, 256))]
    measured.append(bench.peaks())
    peaks = Peaks(max(p.bytes_per_second for p in measured), max(p.ops_per_second for p in measured))
    write(f"{bench.runner.info.tier_reason}, {bench.runner.info.dtype}: peaks {peaks.bytes_per_second / 1e9:.1f} GB/s, "
          f"{peaks.ops_per_second / 1e9:.0f} GFLOP/s; best of {ROUNDS} rounds\n")  # fmt: skip
    for row in rows:
        write(row.text(peaks) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Each native kernel against the machine's measured peaks.")
    parser.add_argument("model_dir", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quantization", choices=list(QUANTIZATIONS))
    options = parser.parse_args()
    for threads in options.threads:
        bench = Bench(options.model_dir or default_model(), threads=threads, quantization=options.quantization)
        report(bench, sys.stdout.write)
        bench.runner.close()


if __name__ == "__main__":
    main()
