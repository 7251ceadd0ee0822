"""Whether another client agrees with ours: `vllm bench serve`, which comes with a peer, against one running server.

Both clients put the same load on Headwater in turn, several times. Their prompts differ (random tokens there),
their figures should not.
"""

import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from loadtest.compare.measure import load
from loadtest.compare.results import Turn
from loadtest.compare.server import ServerFailed
from loadtest.compare.workloads import Workload, run_config, warmup_config

BENCH_CLIENT = "{peers}/vllm/bin/vllm"
LIMIT = 0.10
"""By which part the medians of both clients may differ."""
NUM_TURNS = 3
_TIMEOUT_S = 600.0
_FIRST_ROUND = 1_000_000
"""Rounds of a comparison stay far below it: no prompt is sent twice."""


class _BenchResult(msgspec.Struct, frozen=True):
    """The part of vllm bench serve's result file that is compared."""

    completed: int
    total_output_tokens: int
    output_throughput: float
    median_tpot_ms: float


def check(
    workloads: Sequence[Workload], *, url: str, tool: Path, model_name: str, tokenizer: Path, say: Callable[[str], None]
) -> list[Turn]:
    """Run both clients in turn. Raises ServerFailed where the other one cannot run or gets short answers."""
    turns = []
    for workload in workloads:
        for index in range(NUM_TURNS):
            config = run_config(workload, url=url, is_quick=False, round_index=_FIRST_ROUND + index, attempt=0)
            load(warmup_config(config))
            ours = load(config).summary
            theirs = _bench(workload, index, url=url, tool=tool, model_name=model_name, tokenizer=tokenizer)
            turn = Turn(
                workload=workload.name,
                our_tokens_per_s=ours.output_tokens_per_s,
                their_tokens_per_s=theirs.output_throughput,
                our_tpot_ms=0.0 if ours.tpot_ms is None else ours.tpot_ms.p50,
                their_tpot_ms=theirs.median_tpot_ms,
            )
            say(
                f"  {turn.workload:10} ours {turn.our_tokens_per_s:.1f} tok/s, TPOT {turn.our_tpot_ms:.1f} ms; "
                f"vllm bench serve {turn.their_tokens_per_s:.1f} tok/s, TPOT {turn.their_tpot_ms:.1f} ms"
            )
            turns.append(turn)
    return turns


def check_table(turns: Sequence[Turn]) -> str:
    """Medians of both clients as a Markdown table."""
    lines = [
        "| workload | our client, tokens/s | vllm bench serve, tokens/s | ratio | TPOT, ours / theirs, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(turn.workload for turn in turns):
        own = [turn for turn in turns if turn.workload == name]
        ours = statistics.median(turn.our_tokens_per_s for turn in own)
        theirs = statistics.median(turn.their_tokens_per_s for turn in own)
        tpots = (statistics.median(t.our_tpot_ms for t in own), statistics.median(t.their_tpot_ms for t in own))
        ratio = f"{ours / theirs:.2f}" + ("" if agrees(ours, theirs) else " (they disagree)")
        lines.append(f"| {name} | {ours:.0f} | {theirs:.0f} | {ratio} | {tpots[0]:.1f} / {tpots[1]:.1f} |")
    return "\n".join(lines)


def agrees(ours: float, theirs: float) -> bool:
    """Whether both are within `LIMIT` of each other."""
    return abs(ours / theirs - 1) <= LIMIT


def _bench(workload: Workload, seed: int, *, url: str, tool: Path, model_name: str, tokenizer: Path) -> _BenchResult:
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "backend": "openai", "base-url": url, "endpoint": "/v1/completions", "model": model_name,
            "tokenizer": str(tokenizer), "dataset-name": "random", "random-input-len": str(workload.input_len),
            "random-output-len": str(workload.output_len), "num-prompts": str(workload.num_requests),
            "max-concurrency": str(workload.concurrency), "seed": str(seed), "temperature": "0",
            "result-dir": folder, "result-filename": "result.json",
        }  # fmt: skip
        flags = ["--ignore-eos", "--save-result", "--disable-tqdm"]
        command = [str(tool), "bench", "serve", *(p for k, v in options.items() for p in (f"--{k}", v)), *flags]
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        path = Path(folder) / "result.json"
        if result.returncode != 0 or not path.exists():
            raise ServerFailed(f"vllm bench serve failed: {(result.stdout + result.stderr)[-800:]}")
        found = msgspec.json.decode(path.read_bytes(), type=_BenchResult)
    asked = workload.num_requests * workload.output_len
    if found.total_output_tokens != asked:
        raise ServerFailed(f"vllm bench serve got {found.total_output_tokens} tokens of {asked}")
    return found
