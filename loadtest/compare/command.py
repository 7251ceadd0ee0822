"""The subcommand: which servers, which workloads, how many rounds, in which order; everything else is done elsewhere.

Rounds are interleaved: a round takes every server once, each round begins with the next one, and only one
server runs at a time. What the results folder holds already is not measured again.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from app.core.errors import ConfigurationError
from app.store import ModelFolder, default_model, resolve
from loadtest.compare.client_check import BENCH_CLIENT, check
from loadtest.compare.curve import run_curves
from loadtest.compare.measure import Label, Measurement, measure
from loadtest.compare.peers import Peer, Places, default_peers_dir, named_peers, peer_table
from loadtest.compare.probe import probe
from loadtest.compare.report import write_report
from loadtest.compare.results import Results, is_done, this_machine
from loadtest.compare.server import ServerFailed
from loadtest.compare.session import Running, session, with_peer
from loadtest.compare.weights import prepare_ggufs
from loadtest.compare.workloads import WORKLOADS, Workload, run_config, select
from loadtest.run import RunConfig

QUICK_ROUNDS = 3
FULL_ROUNDS = 5
BUSY_LOAD = 0.5
CHECKED_LOADS = ("8:128/64", "32:128/64")
RESULTS = Path("loadtest/results")
PAGE = Path("docs/benchmarks.md")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line said."""

    peers: tuple[str, ...]
    workloads: tuple[str, ...]
    rounds: int | None
    quick: bool
    report: bool
    check_client: bool
    curve: bool
    list_peers: bool
    peers_dir: Path
    output: Path | None


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `compare`."""
    parser = subparsers.add_parser(
        "compare",
        help="measure Headwater beside other servers on this machine",
        description="Starts each server that is installed, one at a time. Interrupt it and start it again: it goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    names, loads = ", ".join(peer.name for peer in peer_table()), ", ".join(load.name for load in WORKLOADS)
    add("--peers", nargs="*", default=(), metavar="PEER", help=f"of {names}; default: all installed")
    add("--workloads", nargs="*", default=(), metavar="LOAD", help=f"of {loads}; default: all")
    add("--rounds", type=int, help=f"default: {FULL_ROUNDS}, with --quick {QUICK_ROUNDS}")
    add("--quick", action="store_true", help="half the requests, fewer servers, fewer rounds")
    add("--report", action="store_true", help="measure nothing: write the tables from what was measured")
    add("--check-client", action="store_true", help="instead: put vllm bench serve beside our client, on Headwater")
    add(
        "--curve",
        action="store_true",
        help="instead: Poisson arrivals at rising rates, and what each server makes good",
    )
    add("--list-peers", action="store_true", help="say which servers are installed, and how to install the others")
    add("--peers-dir", type=Path, default=default_peers_dir(os.environ), help="where they are installed")
    add("--output", type=Path, help=f"results folder; default: {RESULTS}/compare-MACHINE")


def run(options: Options, say: Callable[[str], None]) -> int:
    """0: measured; 1: a server failed, the others were measured; 2: the settings cannot be run."""
    try:
        peers, workloads = _select_peers(options), select(options.workloads)
        num_rounds = options.rounds if options.rounds is not None else (QUICK_ROUNDS if options.quick else FULL_ROUNDS)
        if num_rounds < 1:
            raise ValueError(f"--rounds is {num_rounds}; give at least 1")
        machine = this_machine()
        # A folder that was named is somebody's trial: the page shows this machine's own.
        page = PAGE if options.output is None and PAGE.exists() else None
        results = Results(options.output if options.output is not None else RESULTS / f"compare-{machine.slug}")
        if options.report:
            say(write_report(results, peer_table(), page=page))
            return 0
        model = resolve(default_model(), report=say)
        places = Places(peers=options.peers_dir, model=model.path, model_name=model.name)
        peers = _installed(peers, places, say)
        if options.list_peers:
            return 0
        results.keep_machine(machine)
        # The server under measurement must end with us.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _warn_if_busy(say)
        if options.check_client:
            _check_client(results, places, select(options.workloads or CHECKED_LOADS), say)
            is_whole = True
        elif options.curve:
            _prepare(peers, model, places, say)
            is_whole = run_curves(results, places, peers, is_quick=options.quick, say=say)
        else:
            _prepare(peers, model, places, say)
            comparison = Comparison(results, places, workloads, is_quick=options.quick, say=say)
            is_whole = comparison.run(peers, num_rounds)
        say(write_report(results, peer_table(), page=page))
    except (ValueError, ConfigurationError, ServerFailed) as error:
        sys.stderr.write(f"loadtest: {error}\n")
        return 2
    return 0 if is_whole else 1


class Comparison:
    """Rounds over servers; each measurement is kept as soon as it is made."""

    def __init__(
        self,
        results: Results,
        places: Places,
        workloads: Sequence[Workload],
        *,
        is_quick: bool,
        say: Callable[[str], None],
    ) -> None:
        self._results = results
        self._places = places
        self._workloads = workloads
        self._is_quick = is_quick
        self._say = say

    def run(self, peers: Sequence[Peer], num_rounds: int) -> bool:
        """True where every server answered every time; one that fails is left out of later rounds."""
        failed: set[str] = set()
        versions = {peer.name: self._places.version(peer) for peer in peers}
        for round_index in range(num_rounds):
            for peer in rotated(peers, round_index):
                if peer.name not in failed and not self._session(peer, versions[peer.name], round_index):
                    failed.add(peer.name)
        return not failed

    def _session(self, peer: Peer, version: str, round_index: int) -> bool:
        """Start one server and run what is missing of the round. False where it failed."""
        todo = self._missing(peer, version, round_index)
        if not todo:
            return True
        try:
            with session(peer, self._places) as running:
                self._say(f"round {round_index + 1}, {peer.name} {version}: ready after {running.ready_s:.1f} s")
                for workload in todo:
                    self._measure(peer, version, workload, round_index, running)
        except ServerFailed as error:
            self._say(f"{peer.name} failed and is left out: {error}")
            return False
        return True

    def _missing(self, peer: Peer, version: str, round_index: int) -> list[Workload]:
        known = self._results.measurements()
        return [w for w in self._workloads if not is_done(self._label(peer, version, w, round_index), known)]

    def _measure(self, peer: Peer, version: str, workload: Workload, round_index: int, running: Running) -> None:
        def config(attempt: int) -> RunConfig:
            plain = run_config(
                workload, url=running.url, is_quick=self._is_quick, round_index=round_index, attempt=attempt
            )
            return with_peer(plain, peer, self._places)

        def keep(measurement: Measurement) -> None:
            self._results.keep(measurement)
            self._say(line(measurement))

        label = self._label(peer, version, workload, round_index)
        measure(
            label,
            config,
            load=running.load,
            probe=probe,
            ready_s=running.ready_s,
            memory_bytes=running.memory_bytes,
            keep=keep,
        )

    def _label(self, peer: Peer, version: str, workload: Workload, round_index: int) -> Label:
        return Label(
            peer=peer.name,
            version=version,
            workload=workload.name,
            is_quick=self._is_quick,
            round_index=round_index,
        )


def rotated(peers: Sequence[Peer], round_index: int) -> list[Peer]:
    """The order of a round: each begins with the next server, so that none always follows the same one."""
    start = round_index % len(peers) if peers else 0
    return [*peers[start:], *peers[:start]]


def line(measurement: Measurement) -> str:
    """One attempt for the terminal."""
    m = measurement
    tpot = "-" if m.tpot_ms is None else f"{m.tpot_ms:.1f} ms"
    ttft = "-" if m.ttft_p90_ms is None else f"{m.ttft_p90_ms:.0f} ms"
    short = f", {m.num_short} short or failed {m.errors or ''}" if m.num_short else ""
    steady = "" if m.is_steady else f", peaks moved {m.moved:.0%}"
    return f"  {m.workload:10} {m.tokens_per_s:7.1f} tok/s, TPOT {tpot}, TTFT p90 {ttft}{short}{steady}"


def _select_peers(options: Options) -> list[Peer]:
    if options.peers:
        return named_peers(options.peers)
    return [peer for peer in peer_table() if peer.is_quick or not options.quick]


def _installed(peers: Sequence[Peer], places: Places, say: Callable[[str], None]) -> list[Peer]:
    found = []
    for peer in peers:
        missing = places.missing(peer)
        if missing is None:
            found.append(peer)
            say(f"{peer.name}: installed")
        else:
            say(f"{peer.name}: skipped, no {missing}; {peer.install} (see {PAGE})")
    return found


def _prepare(peers: Sequence[Peer], model: ModelFolder, places: Places, say: Callable[[str], None]) -> None:
    if any("{gguf}" in part for peer in peers for part in peer.command):
        prepare_ggufs(model, places.peers, report=say)


def _check_client(results: Results, places: Places, workloads: Sequence[Workload], say: Callable[[str], None]) -> None:
    peer = next(peer for peer in peer_table() if peer.is_ours)
    tool = places.fill(BENCH_CLIENT)
    if not Path(tool).exists():
        raise ValueError(f"there is no {tool}, the other client; see {PAGE}")
    with session(peer, places) as running:
        turns = check(
            workloads,
            url=running.url,
            tool=Path(tool),
            model_name=places.model_name,
            tokenizer=places.model,
            say=say,
        )
    results.keep_turns(turns)


def _warn_if_busy(say: Callable[[str], None]) -> None:
    busy = os.getloadavg()[0]
    if busy > BUSY_LOAD:
        say(f"the load average is {busy:.1f}: something else runs here, and figures will be worse and will spread")
