"""Medians and spread over rounds, and the Markdown tables made of them. Pure.

A slowdown is shown as plainly as a win: every server that was measured is in every table, and the ratios
are ours over the best other server of the same precision class, whichever way they point.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec

from loadtest.compare.measure import Measurement
from loadtest.compare.peers import Peer, shown_command
from loadtest.compare.workloads import WORKLOADS, Workload

_CLASSES = {"8 bits": ("int8", "q8"), "4 bits": ("int4", "q4")}
_UNSTEADY = ", unsteady"


class Spread(msgspec.Struct, frozen=True):
    """Of one figure over the rounds."""

    median: float
    low: float
    high: float
    count: int


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One server under one workload."""

    peer: str
    version: str
    workload: str
    is_quick: bool
    num_rounds: int
    num_unsteady: int
    """Rounds in which the machine moved in every attempt."""
    num_short: int
    """Requests that did not end with the tokens asked for: such a row is no comparison."""
    tokens_per_s: Spread
    tpot_ms: Spread | None
    ttft_p50_ms: Spread | None
    ttft_p90_ms: Spread | None
    itl_p90_ms: Spread | None
    client_cpu_share: Spread
    prompt_tokens: Spread
    cached_share: Spread | None
    ready_s: Spread
    memory_bytes: Spread

    @property
    def is_unsteady(self) -> bool:
        """Whether the machine moved in half of the rounds or more: the figure is as much the machine's as its own."""
        return self.num_unsteady * 2 >= self.num_rounds


def spread(values: Iterable[float | None]) -> Spread | None:
    """None where no round has the figure."""
    known = [value for value in values if value is not None]
    return Spread(statistics.median(known), min(known), max(known), len(known)) if known else None


def cells(measurements: Sequence[Measurement]) -> list[Cell]:
    """One for each (server, workload), from the measurements that count: see `results.counting`."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault((measurement.peer, measurement.workload), []).append(measurement)
    return [_cell(group) for group in groups.values()]


def _cell(group: Sequence[Measurement]) -> Cell:
    def over(figure: Callable[[Measurement], float | None]) -> Spread | None:
        return spread(figure(m) for m in group)

    def always(figure: Callable[[Measurement], float]) -> Spread:
        values = [figure(m) for m in group]
        return Spread(statistics.median(values), min(values), max(values), len(values))

    first = group[0]
    return Cell(
        peer=first.peer,
        version=first.version,
        workload=first.workload,
        is_quick=first.is_quick,
        num_rounds=len(group),
        num_unsteady=sum(not m.is_steady for m in group),
        num_short=sum(m.num_short for m in group),
        tokens_per_s=always(lambda m: m.tokens_per_s),
        tpot_ms=over(lambda m: m.tpot_ms),
        ttft_p50_ms=over(lambda m: m.ttft_p50_ms),
        ttft_p90_ms=over(lambda m: m.ttft_p90_ms),
        itl_p90_ms=over(lambda m: m.itl_p90_ms),
        client_cpu_share=always(lambda m: m.client_cpu_share),
        prompt_tokens=always(lambda m: m.prompt_tokens),
        cached_share=over(lambda m: m.cached_share),
        ready_s=always(lambda m: m.ready_s),
        memory_bytes=always(lambda m: float(m.memory_bytes)),
    )


def markdown(measurements: Sequence[Measurement], peers: Sequence[Peer], machine_title: str) -> str:
    """All tables, from the measurements that count."""
    made = cells(measurements)
    shown = [peer for peer in peers if any(cell.peer == peer.name for cell in made)]
    if not shown:
        return "Nothing has been measured yet.\n"
    workloads = [workload for workload in WORKLOADS if any(cell.workload == workload.name for cell in made)]
    parts = [
        f"Machine: {machine_title}. Medians over rounds, (lowest to highest round) beside throughput.",
        "### Throughput, output tokens/s\n\n" + _throughput(made, shown, workloads),
        "### Headwater over the best other server\n\n" + _ratios(made, shown, workloads),
        "### Latency\n\n" + "\n\n".join(_latency(made, shown, workload) for workload in workloads),
        "### Servers\n\n" + _servers(made, shown),
        "### The machine during the runs\n\n" + _machine(measurements, made),
    ]
    return "\n\n".join(parts) + "\n"


def _throughput(made: Sequence[Cell], peers: Sequence[Peer], workloads: Sequence[Workload]) -> str:
    header = ["server", *(workload.title for workload in workloads)]
    rows = []
    for peer in peers:
        found = [_find(made, peer.name, workload.name) for workload in workloads]
        rates = ["-" if cell is None else _rate(cell) for cell in found]
        rows.append([f"{peer.title} {peer.precision}", *rates])
    return _table(header, rows) + "\n\nWorkloads: concurrency, input / output tokens."


def _rate(cell: Cell) -> str:
    value = cell.tokens_per_s
    text = f"{value.median:.0f} ({value.low:.0f} to {value.high:.0f})" + _UNSTEADY * cell.is_unsteady
    return f"{text}, {cell.num_short} short or failed" if cell.num_short else text


def _ratios(made: Sequence[Cell], peers: Sequence[Peer], workloads: Sequence[Workload]) -> str:
    header = ["workload", "ours", "tokens/s over", "TPOT over", "TTFT p90 over", "ITL p90 over", "best other"]
    rows = []
    for workload in workloads:
        for ours in (peer for peer in peers if peer.is_ours):
            for label, others in _opponents(ours, peers):
                row = _ratio_row(made, workload, ours, label, others)
                if row is not None:
                    rows.append(row)
    if not rows:
        return "No other server was measured."
    note = (
        "The best other server is the one with the highest throughput on that workload. Above 1 is better for "
        "tokens/s, below 1 for the latencies. Unsteady: the machine moved in half of the rounds or more of either, "
        "and the ratio shows nothing."
    )
    return _table(header, rows) + "\n\n" + note


def _opponents(ours: Peer, peers: Sequence[Peer]) -> list[tuple[str, list[Peer]]]:
    """Servers of the same precision, all of them where that makes a difference, and what has no HTTP to pay for."""
    others = [peer for peer in peers if not peer.is_ours and not peer.is_in_process]
    in_process = [peer for peer in peers if peer.is_in_process]
    same = [peer for peer in others if precision_class(peer.precision) == precision_class(ours.precision)]
    groups = [("same precision", same), ("any precision", others), ("in process", in_process)]
    return [(label, group) for label, group in groups if group and not (label == "any precision" and group == same)]


def precision_class(precision: str) -> str:
    """int8 and Q8_0 both keep 8 bits a weight, int4 and Q4_.. 4; every other precision stands for itself."""
    for name, beginnings in _CLASSES.items():
        if precision.lower().startswith(beginnings):
            return name
    return precision


def _ratio_row(
    made: Sequence[Cell], workload: Workload, ours: Peer, label: str, others: Sequence[Peer]
) -> list[str] | None:
    mine = _find(made, ours.name, workload.name)
    theirs = [cell for peer in others if (cell := _find(made, peer.name, workload.name)) and not cell.num_short]
    if mine is None or mine.num_short or not theirs:
        return None
    best = max(theirs, key=lambda cell: cell.tokens_per_s.median)
    pairs = (
        (mine.tokens_per_s, best.tokens_per_s),
        (mine.tpot_ms, best.tpot_ms),
        (mine.ttft_p90_ms, best.ttft_p90_ms),
        (mine.itl_p90_ms, best.itl_p90_ms),
    )
    unsteady = _UNSTEADY * (mine.is_unsteady or best.is_unsteady)
    return [workload.title, ours.name, *(_ratio(*pair) for pair in pairs), f"{best.peer} ({label}){unsteady}"]


def _ratio(mine: Spread | None, theirs: Spread | None) -> str:
    return f"{mine.median / theirs.median:.2f}" if mine and theirs and theirs.median else "-"


def _latency(made: Sequence[Cell], peers: Sequence[Peer], workload: Workload) -> str:
    header = ["server", "TPOT ms", "TTFT p50 ms", "TTFT p90 ms", "ITL p90 ms", "cached", "prompt tokens", "client CPU"]
    rows = []
    for peer in peers:
        if (cell := _find(made, peer.name, workload.name)) is not None:
            cached = "-" if cell.cached_share is None else f"{cell.cached_share.median:.0%}"
            latencies = (cell.tpot_ms, cell.ttft_p50_ms, cell.ttft_p90_ms, cell.itl_p90_ms)
            tail = [cached, f"{cell.prompt_tokens.median:.0f}", f"{cell.client_cpu_share.median:.0%}"]
            rows.append([f"{peer.title} {peer.precision}", *map(_milliseconds, latencies), *tail])
    return f"{workload.title}\n\n" + _table(header, rows)


def _milliseconds(value: Spread | None) -> str:
    if value is None:
        return "-"
    return f"{value.median:.1f}" if value.median < 100 else f"{value.median:.0f}"


def _servers(made: Sequence[Cell], peers: Sequence[Peer]) -> str:
    header = ["server", "precision", "version", "ready after start", "memory", "command", "tried"]
    rows = []
    for peer in peers:
        own = [cell for cell in made if cell.peer == peer.name]
        ready = statistics.median(cell.ready_s.median for cell in own)
        memory = max(cell.memory_bytes.high for cell in own)
        command = f"`{shown_command(peer)}`"
        name = f"{peer.title} (`{peer.name}`)"
        rows.append([name, peer.precision, own[0].version, f"{ready:.1f} s", _mib(memory), command, peer.tried])
    return _table(header, rows)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"


def _machine(measurements: Sequence[Measurement], made: Sequence[Cell]) -> str:
    read = spread(value for m in measurements for value in (m.before.read_gbps, m.after.read_gbps))
    gemm = spread(value for m in measurements for value in (m.before.gemm_gflops, m.after.gemm_gflops))
    unsteady = sum(cell.num_unsteady for cell in made)
    repeated = sum(m.attempt > 0 for m in measurements)
    quick = "with --quick" if any(m.is_quick for m in measurements) else "full runs"
    assert read is not None
    assert gemm is not None
    return (
        f"Reading {read.median:.0f} GB/s ({read.low:.0f} to {read.high:.0f}), float32 products {gemm.median:.0f} "
        f"GFLOP/s ({gemm.low:.0f} to {gemm.high:.0f}), probed with numpy before and after every run. Of "
        f"{len(measurements)} runs ({quick}), {repeated} count from a repetition and {unsteady} stayed unsteady: "
        "their peaks moved by more than 15 % in every attempt."
    )


def _find(made: Sequence[Cell], peer: str, workload: str) -> Cell | None:
    return next((cell for cell in made if (cell.peer, cell.workload) == (peer, workload)), None)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
