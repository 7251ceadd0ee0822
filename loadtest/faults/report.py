"""docs/reliability.md, written from all trials ever appended."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from loadtest.faults.ledger import Outcome, Trial
from loadtest.faults.matrix import NOT_APPLICABLE, PHASES

PAGE = Path("docs/reliability.md")
AIMED_TRIALS = 20

_HEAD = """\
# Reliability, measured

This page is generated from [loadtest/results/faults.jsonl](../loadtest/results/faults.jsonl), to which every run
of `python -m loadtest faults` appends; each line names commit, machine, item, cell and outcome. Streams are compared
byte by byte (text, log-probabilities, finish reasons, of every choice) with an uninterrupted run of the same
request. *Failed cleanly* means that the request at which the fault was aimed ended with an error that says so, and
that nobody else noticed. *Wrong* is anything else; it must be 0. Where nothing went wrong in n trials, the true rate is
with 95 % confidence below 3/n. Everything runs over HTTP on loopback; the faults are injected by
`loadtest/faulty_engine.py`, the server has no code for them.

Trials that were wrong stay in the file and on this page; the last section says what they were.
"""


def render(trials: list[Trial]) -> str:
    """The whole page."""
    by_item: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_item[trial.item].append(trial)
    parts = [_HEAD, _runs(trials)]
    if "kills" in by_item:
        parts.append(_kills(by_item["kills"], by_item["streams"]))
    if "portable" in by_item:
        parts.append(_portable(by_item["portable"]))
    if "matrix" in by_item:
        parts.append(_matrix(by_item["matrix"]))
    for item, title, text in _SIMPLE:
        if item in by_item:
            parts.append(_simple(title, text, by_item[item]))
    parts.append(_wrong(trials))
    return "\n".join(parts)


_SIMPLE = (
    (
        "poison",
        "One request that ends engines",
        "One request ends every engine that computes it; the others must not notice more than a pause. At most 3 "
        "engines may die ([how blame is proved](decisions/0006-blame-is-proved.md)).",
    ),
    (
        "aborts",
        "Clients that leave",
        "Connections closed at random moments, by where the request stood. Afterwards no KV block and no sequence may "
        "be held, and the streams beside them are as ever.",
    ),
    (
        "canaries",
        "Canaries across requests",
        "Requests of several keys (`cache_salt`) share prefixes and end in a canary of their own, under aborts and "
        "kills, in a KV cache that is too small. Answers repeat what stands in the sequence's KV blocks, so a block "
        "with another's content shows; what a new key asks first may not come from the cache. Below HTTP, at the "
        "engine's client, where a key is a cache salt.",
    ),
    (
        "determinism",
        "Determinism",
        "The same prompts in batches of many sizes, in shuffled orders of arrival, on the default model and the native "
        "tier: distinct outputs for each prompt must be 1. One trial is one prompt in one arrangement.",
    ),
    (
        "machine",
        "Any order of events",
        "A Hypothesis state machine over scheduler, block pool and journal (`tests/property/handover_machine.py`): "
        "requests, steps, messages that arrive or are lost, deaths from outside and by a poison, aborts, and clients "
        "that go on elsewhere, in any order on engines of any small size. After each rule all invariants of pool and "
        "scheduler hold, and each client has a prefix of its own answer; in the end each has all of it, and who was "
        "convicted was guilty. One trial is one rule; the plan asks for 1,000,000. Figures are of parts of the run.",
    ),
    (
        "overload",
        "More than it can do",
        "Requests a second that are answered whole with a first token within 2 s, at 2, 5 and 10 times of what the "
        "server answers when it is never idle (16 rows, 48 sequences in flight; Poisson arrivals, nobody tries again). "
        "The last trial of each cell is with `--queue-timeout 2`, which refuses who would wait too long; those before "
        "it are without: as many sequences were taken on as may be in flight, which on the model is a wait of more "
        "than 2 s, so that what was answered was answered late ([0024](decisions/0025-a-wait-is-foreseen.md)). "
        "Aims: 95 % of the peak, and a refusal within 50 ms at p99, as the client sees it. The client runs on the same "
        "cores; its own CPU time is told as a share of one core, and not subtracted. `load` is the machine's load "
        "average when the trial ended: above its number of cores, others had a part in the figures. Not in the file: a "
        "first run on 2026-11-24 that measured the peak too low (1 of 6 trials missed an aim), and one after it that "
        "was cut short to change the server, whose full garbage collections held it up (5 of 6 missed an aim).",
    ),
    (
        "fairness",
        "One heavy key and nine light ones",
        "Nine keys ask for little and think in between; then a tenth keeps four times as much in flight as the server "
        "has rows, with prompts ten times as long. The median TTFT of the nine is to be at most 1.5 times what it is "
        "alone ([how keys share](how-to/overload.md#keys-side-by-side)). On the scripted tier a step lasts the same "
        "whatever is in it, so its row shows the queue alone; on the model a step is longer the more it computes.",
    ),
    (
        "slow",
        "Slow clients",
        "1,000 connections whose request never ends, one byte every few seconds, and 1,000 that ask for a stream and "
        "read nothing, beside four honest users. Their TTFT p99 is to be within 10 % of what it is alone, and /health "
        "is to answer within 20 ms at p99. Not in the file: a first run on 2026-11-24 whose requests the server "
        "refused for their Host header.",
    ),
    (
        "attacks",
        "The largest legal requests, and attacks on others",
        "One request each, the legal ones marked, to a server of its own with a context of 1,000,000 tokens on the "
        "scripted tier, so that no "
        "text of 2 MiB is too long; /health is asked without pause meanwhile. Wrong: another status than expected, or "
        "an ordinary request is answered otherwise afterwards. The longest stall (aim: 20 ms) is by how much a timer "
        "in the server's own event loop was late, less the wait for a processor, and at most the CPU time that it "
        "used meanwhile; the one beside others is without that bound, so that other work on the machine counts where "
        "it holds up who holds the interpreter's lock (`loadtest/watched_server.py`; not in the oldest trials). The "
        "longest wait of a probe is as a client on the same machine sees it; the client says how late it was itself. "
        "The peak is of the API process's resident memory. "
        "[The threat model](explanation/threat-model.md) says what holds the rows that are not here.",
    ),
    (
        "price",
        "Price of journal and supervisor",
        "CPU time of journal, supervisor and message "
        "decoding in the API process, as a share of what it and the engine used; the aim is under 0.02.",
    ),
    (
        "soak",
        "Soak",
        "Six clients that think between requests, each answer held to its uninterrupted run, one stream in seven left "
        "at a random moment; the first half under `kill -9` of the engine, the second without. Watched are each "
        "process's own memory (anonymous PSS), descriptors and threads; a quarter of each half is left out, for it to "
        "settle. `margin` is of the slope's 95 % interval. Wrong: it grows by more than 4 MiB an hour beyond the "
        "margin (asked of halves of a quarter of an hour or more), descriptors or threads grow, an answer differs, or "
        "a gauge is not 0 afterwards.",
    ),
)


def bound(count: int, num_wrong: int) -> str:
    """Upper end of what the rate of wrong outcomes can be, 95 %."""
    if num_wrong:
        return f"{num_wrong} of {count}"
    return f"0 of {count:,}" + (f"; < {300 / count:.2g} %" if count > 3 else "")


def _runs(trials: list[Trial]) -> str:
    machines = sorted({trial.machine for trial in trials})
    commits = {trial.commit for trial in trials}
    first, last = min(trial.at for trial in trials)[:10], max(trial.at for trial in trials)[:10]
    num = sum(trial.count for trial in trials)
    return f"{num:,} trials from {first} to {last}, {len(commits)} commits, on: {'; '.join(machines)}.\n"


def _kills(kills: list[Trial], streams: list[Trial]) -> str:
    lines = [
        "## `kill -9` under live streams\n",
        "Back to back, at random steps; each kill waits until every stream that was live has gone on. Pauses are",
        "seen by the clients, from the kill to the next event: of the first stream, and of the last. On a shared",
        "machine the suite runs at low priority beside other work, which stretches them. The plan asks for 400 kills",
        "on the scripted tier and 100 on the default model.\n",
        "| tier | kills | wrong | first p50 | p99 | max | last p50 | p99 | max |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell, trials in _by_cell(kills):
        first = sorted(trial.figures["first"] for trial in trials if "first" in trial.figures)
        last = sorted(trial.figures["last"] for trial in trials if "last" in trial.figures)
        shown = [f"{value:.2f} s" for values in (first, last) if values for value in _percentiles(values)]
        num_wrong = _count(trials, Outcome.WRONG)
        lines.append(f"| {cell} | {len(trials)} | {bound(len(trials), num_wrong)} | {' | '.join(shown)} |")
    lines += ["\n| streams compared | equal | lost, doubled, differing or failed |", "| --- | --- | --- |"]
    for cell, trials in _by_cell(streams):
        num = sum(trial.count for trial in trials)
        num_wrong = _count(trials, Outcome.WRONG)
        lines.append(f"| {cell} | {num - num_wrong:,} | {bound(num, num_wrong)} |")
    return "\n".join(lines) + "\n"


def _portable(trials: list[Trial]) -> str:
    lines = [
        "## `kill -9` of a whole server\n",
        "The API process and its engine are killed under 16 live streams of mixed kinds, and each stream goes on on a",
        "second server that shares nothing but the model's files ([how](how-to/resume-a-stream.md)). Half of them hand",
        "their token ids back, so that the second server reads them; for the others it decodes again. Each is",
        "compared with an ordinary stream in one piece: text, arguments of calls, log-probabilities, finish reasons,",
        "usage. On the default model chats, tools and JSON of a schema are among them. Pauses are from the kill to the",
        "next event of the first stream, and of the last.\n",
        "| tier | kills | wrong | streams | gone on by token ids | by decoding again | bytes of text "
        "| streams that differ | first p50 | max | last p50 | max |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell, of_cell in _by_cell(trials):
        sums = [
            f"{sum(trial.figures.get(name, 0) for trial in of_cell):,.0f}"
            for name in ("streams", "by_tokens", "by_decode", "bytes", "differing")
        ]
        for name in ("first_s", "last_s"):
            p50, _, most = _percentiles(sorted(trial.figures[name] for trial in of_cell if name in trial.figures))
            sums += [f"{p50:.2f} s", f"{most:.2f} s"]
        num_wrong = _count(of_cell, Outcome.WRONG)
        lines.append(f"| {cell} | {len(of_cell)} | {bound(len(of_cell), num_wrong)} | {' | '.join(sums)} |")
    return "\n".join(lines) + "\n"


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    return values[len(values) // 2], values[min(len(values) - 1, int(len(values) * 0.99))], values[-1]


def _matrix(trials: list[Trial]) -> str:
    cells = dict(_by_cell(trials))
    kinds = list(dict.fromkeys(cell.split(" x ")[0] for cell in cells))
    least = min(sum(t.count for t in of_cell) for of_cell in cells.values())
    num, num_wrong = len(trials), _count(trials, Outcome.WRONG)
    lines = [
        "## Fault and phase\n",
        "One fault in one phase of one request, beside other streams, on the scripted tier. Each cell: survived +",
        f"failed cleanly of trials; the plan asks for {AIMED_TRIALS} trials a cell, the smallest has {least}. Wrong:",
        f"{bound(num, num_wrong)}.\n",
        f"| fault | {' | '.join(phase.replace('_', ' ') for phase in PHASES)} |",
        f"| --- | {' | '.join('---' for _ in PHASES)} |",
    ]
    for kind in kinds:
        row = [_cell(cells.get(f"{kind} x {phase}", [])) for phase in PHASES]
        lines.append(f"| {kind.replace('_', ' ')} | {' | '.join(row)} |")
    lines.append("\nNot run: " + "; ".join(f"{name} ({why})" for name, why in NOT_APPLICABLE.items()) + ".")
    return "\n".join(lines) + "\n"


def _cell(trials: list[Trial]) -> str:
    if not trials:
        return ""
    survived, clean = _count(trials, Outcome.SURVIVED), _count(trials, Outcome.FAILED_CLEANLY)
    num_wrong = _count(trials, Outcome.WRONG)
    shown = f"{survived} + {clean} of {len(trials)}"
    return f"{shown}, **{num_wrong} wrong**" if num_wrong else shown


def _simple(title: str, text: str, trials: list[Trial]) -> str:
    lines = [f"## {title}\n", f"{text}\n", "| cell | trials | wrong | figures |", "| --- | --- | --- | --- |"]
    for cell, of_cell in _by_cell(trials):
        num, num_wrong = sum(trial.count for trial in of_cell), _count(of_cell, Outcome.WRONG)
        names = list(dict.fromkeys(name for trial in of_cell for name in trial.figures))
        figures = [
            f"{name.replace('_', ' ')} {_span([t.figures[name] for t in of_cell if name in t.figures])}"
            for name in names
        ]
        lines.append(f"| {cell} | {num:,} | {bound(num, num_wrong)} | {', '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _wrong(trials: list[Trial]) -> str:
    wrong = [trial for trial in trials if trial.outcome is Outcome.WRONG]
    lines = ["## What was wrong\n"]
    lines += [f"- {t.at[:10]} {t.commit} {t.item}, {t.cell}: {t.detail or 'no detail'} ({t.count})" for t in wrong]
    return "\n".join(lines if wrong else [*lines, "Nothing so far."]) + "\n"


def _by_cell(trials: Iterable[Trial]) -> list[tuple[str, list[Trial]]]:
    cells: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        cells[trial.cell].append(trial)
    return list(cells.items())


def _count(trials: Iterable[Trial], outcome: Outcome) -> int:
    return sum(trial.count for trial in trials if trial.outcome is outcome)
