"""`make gpu-report`: tests/gpu, then step times of the default model, into docs/gpu/<card>.json.

Needs an NVIDIA device, about ten minutes and no network (the default model has to be in the cache).
"""

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
CONTEXT = 256
STEPS = 30
BATCHES = (1, 8, 32, 128)


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("no NVIDIA device answers here: nothing was measured and no report was written\n")
        return 2
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--timeout=600", "tests/gpu"], cwd=ROOT, check=False
    )
    name = torch.cuda.get_device_name(0)
    report = {
        "card": name,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "tests_passed": tests.returncode == 0,
        "model": "smollm2-135m-instruct-q4",
        "context": CONTEXT,
        "steps": measure(),
    }
    target = ROOT / "docs" / "gpu" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {target}\n")
    return tests.returncode


def measure() -> list[dict[str, Any]]:
    """Decode steps, forward and draw together, for each batch size."""
    from app.core.config import EngineConfig
    from app.runner.torch.cuda_tier import load
    from app.store import resolve

    folder = resolve("smollm2-135m-instruct-q4", report=print)
    runner = load(EngineConfig(model_dir=str(folder.path), max_num_seqs=max(BATCHES)))
    return [_measure_batch(runner, size) for size in BATCHES]


def _measure_batch(runner: Any, size: int) -> dict[str, Any]:
    from app.core.plan import LogitsNeed, PlanEntry, RowStart, StepPlan
    from app.core.types import SamplingParams

    params = SamplingParams(seed=1, max_tokens=10_000, ignore_eos=True)
    width = -(-(CONTEXT + STEPS) // runner.info.block_size)
    tables = [tuple(range(row * width, (row + 1) * width)) for row in range(size)]
    prompt = tuple(range(100, 100 + CONTEXT))
    for row, table in enumerate(tables):
        start = RowStart(str(row), params, prompt, ())
        entry = PlanEntry(row, 0, prompt, 0, table, width, LogitsNeed.NONE, False, start)
        runner.forward(StepPlan(0, (entry,)))
    seconds = []
    for step in range(STEPS):
        entries = tuple(
            PlanEntry(row, CONTEXT + step, (300 + step,), 0, table, 0, LogitsNeed.LAST, True)
            for row, table in enumerate(tables)
        )
        plan = StepPlan(step, entries)
        begin = time.perf_counter()
        runner.sample(plan, runner.forward(plan))
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    return {"batch": size, "step_ms": round(median * 1e3, 3), "tokens_per_second": round(size / median)}


if __name__ == "__main__":
    raise SystemExit(main())
