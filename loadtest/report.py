"""Shows a result on the terminal and writes it to a folder."""

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.plot import draw
from loadtest.run import RunResult
from loadtest.summary import Distribution, Summary

_BUSY_SHARE = 0.8


def show(summary: Summary, console: Console) -> None:
    """The figures as two tables, and a warning where the client was the bottleneck."""
    console.print(_latencies(summary))
    console.print(_rates(summary))
    for detail, count in summary.errors.items():
        console.print(f"  {count} × {detail}", markup=False)
    if summary.client_cpu_share > _BUSY_SHARE:
        console.print(
            f"The client used {summary.client_cpu_share:.0%} of a core: these figures are partly its own. "
            "Lower the rate or run several clients."
        )


def write(result: RunResult, folder: Path) -> None:
    """summary.json (with the settings), requests.jsonl (raw, one line a request) and plot.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = msgspec.json.encode({"config": result.config, "summary": result.summary})
    (folder / "summary.json").write_bytes(msgspec.json.format(summary, indent=2) + b"\n")
    (folder / "requests.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(result.records))
    (folder / "plot.svg").write_text(draw(result.records, _title(result)), encoding="utf-8")


def _title(result: RunResult) -> str:
    config = result.config
    load = f"{config.concurrency} at once" if config.rate is None else f"{config.rate} requests/s"
    return f"{config.model}: {config.num_requests} requests, {load}, {config.input_len} in, {config.output_len} out"


def _latencies(summary: Summary) -> Table:
    table = Table("ms", "mean", "p50", "p90", "p99", "max", title="Latency of completed requests")
    rows = {
        "TTFT": summary.ttft_ms,
        "ITL": summary.itl_ms,
        "TPOT": summary.tpot_ms,
        "end to end": summary.e2e_ms,
        "client late by": summary.client_lag_ms,
    }
    for name, values in rows.items():
        table.add_row(name, *_cells(values))
    return table


def _cells(values: Distribution | None) -> list[str]:
    if values is None:
        return ["-"] * 5
    return [f"{value:.2f}" for value in (values.mean, values.p50, values.p90, values.p99, values.max)]


def _rates(summary: Summary) -> Table:
    table = Table("", "", title="Load", show_header=False)
    table.add_row("duration", f"{summary.duration_s:.2f} s")
    if summary.offered_rate is not None:
        table.add_row("offered / sent", f"{summary.offered_rate:.2f} / {summary.sent_rate:.2f} requests/s")
    table.add_row("completed", f"{summary.completed}, {summary.request_rate:.2f} requests/s")
    for outcome, count in summary.outcomes.items():
        if outcome != "completed":
            table.add_row(outcome, str(count))
    table.add_row("output tokens", f"{summary.output_tokens}, {summary.output_tokens_per_s:.1f} tokens/s")
    table.add_row("prompt tokens", f"{summary.prompt_tokens}, {summary.cached_token_share:.1%} cached")
    if summary.goodput is not None and summary.goodput_share is not None:
        table.add_row("goodput", f"{summary.goodput:.2f} requests/s, {summary.goodput_share:.1%} of those sent")
    table.add_row("client CPU", f"{summary.client_cpu_share:.0%} of a core")
    return table
