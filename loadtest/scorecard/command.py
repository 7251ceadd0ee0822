"""`python -m loadtest scorecard`: one server that runs, or each of the compared ones in turn."""

import argparse
import asyncio
import datetime
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from app.core.errors import ConfigurationError
from app.store import default_model, resolve
from loadtest.compare.peers import Peer, Places, default_peers_dir, named_peers
from loadtest.compare.results import this_machine
from loadtest.compare.server import Server, ServerFailed, free_port
from loadtest.compare.session import request_fields
from loadtest.scorecard import checks, stress
from loadtest.scorecard.checks import Check
from loadtest.scorecard.finding import Finding, Verdict
from loadtest.scorecard.page import PAGE, RESULTS, Card, read_cards, render
from loadtest.scorecard.target import Target

API_KEY_VARIABLE = "OPENAI_API_KEY"
CHECKS: dict[str, Check] = {
    "fields": checks.fields_are_honoured,
    "nonsense": checks.nonsense_is_refused,
    "stop strings": checks.stops_do_not_leak,
    "characters": checks.characters_stay_whole,
    "stream = answer": checks.streams_equal_answers,
    "seeds": checks.seeds_repeat,
    "rows": checks.rows_are_rows,
    "usage": checks.usage_is_true,
    "aborts": checks.gauges_fall_back,
    "overload": stress.overload_is_refused_well,
    "hang": stress.a_stop_is_noticed,
    "kill -9": stress.a_kill_is_survived,
}
"""In the order in which they run: the last ones may leave nothing that listens."""
CHECK_SECONDS = 900.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line said."""

    url: str | None
    pid: int | None
    name: str
    peers: tuple[str, ...]
    checks: tuple[str, ...]
    peers_dir: Path
    report: bool


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `scorecard`."""
    parser = subparsers.add_parser(
        "scorecard",
        help="put a server through checks of what it promises",
        description=f"With --url one server that runs; else each of --peers, started here. {API_KEY_VARIABLE} is sent.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--url", help="a server that runs, with or without /v1; nothing is written to the page")
    add("--pid", type=int, help="its process: the one below it with the most memory is stopped, then killed")
    add("--name", default="server", help="what to call it")
    add("--peers", nargs="*", default=("headwater-bf16",), help="servers to start, as `compare --list-peers` says")
    add("--checks", nargs="*", default=(), metavar="CHECK", help=f"of {', '.join(CHECKS)}; default: all")
    add("--peers-dir", type=Path, default=default_peers_dir(os.environ), help="where they are installed")
    add("--report", action="store_true", help="check nothing: write the page from what was found")


def run(options: Options, say: Callable[[str], None]) -> int:
    """0: all checks ran; 1: a server failed to start; 2: the settings cannot be run."""
    try:
        chosen = _chosen(options.checks)
        if options.url is not None:
            target = Target(options.url, api_key=os.environ.get(API_KEY_VARIABLE), pid=options.pid)
            asyncio.run(check_all(target, chosen, lambda finding: say(line(finding))))
            return 0
        is_whole = options.report or _check_peers(options, chosen, say)
        PAGE.write_text(render(read_cards(RESULTS)), encoding="utf-8")
    except (ValueError, ConfigurationError) as error:
        sys.stderr.write(f"loadtest: {error}\n")
        return 2
    return 0 if is_whole else 1


async def check_all(target: Target, chosen: Sequence[str], tell: Callable[[Finding], None]) -> list[Finding]:
    """Run the checks one after the other; one that raises or takes too long is a failure that says so."""
    found = []
    async with target:
        for name in chosen:
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    finding = await CHECKS[name](target)
            except Exception as error:
                finding = Finding(name, Verdict.FAIL, f"the check ended with {type(error).__name__}: {error}")
            found.append(finding)
            tell(finding)
    return found


def line(finding: Finding) -> str:
    """One finding for the terminal."""
    return f"  {finding.verdict.value:8} {finding.check:16} {finding.detail}"


def _chosen(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"the check {name!r} is none of {', '.join(CHECKS)}")
    return [name for name in CHECKS if not names or name in names]


def _check_peers(options: Options, chosen: Sequence[str], say: Callable[[str], None]) -> bool:
    peers = named_peers(options.peers)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server that was started must end with us
    model = resolve(default_model(), report=say)
    places = Places(peers=options.peers_dir, model=model.path, model_name=model.name)
    return not [peer for peer in peers if not _check_peer(peer, places, chosen, say)]


def _check_peer(peer: Peer, places: Places, chosen: Sequence[str], say: Callable[[str], None]) -> bool:
    if (missing := places.missing(peer)) is not None:
        say(f"{peer.name} is not installed ({missing}): {peer.install}")
        return False
    port, version = free_port(), places.version(peer)
    fields = request_fields(peer, places)
    log = places.peers / "logs" / f"scorecard-{peer.name}.log"
    command, environment = places.command(peer, port=port), places.environment(peer)
    try:
        with Server(command, environment=environment, port=port, log=log) as server:
            server.wait_ready(fields, timeout_s=peer.ready_timeout_s)
            say(f"{peer.name} {version}")
            extra = dict(fields)
            model = extra.pop("model", None)
            target = Target(server.url, model=None if model is None else str(model), pid=server.pid, extra=extra)
            findings = asyncio.run(check_all(target, chosen, lambda finding: say(line(finding))))
    except ServerFailed as error:
        say(f"{peer.name} failed: {error}")
        return False
    if len(chosen) == len(CHECKS):
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        card = Card(peer.name, peer.title, peer.precision, version, this_machine().title, today, tuple(findings))
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = json.dumps(msgspec.to_builtins(card), indent=1, ensure_ascii=False)
        (RESULTS / f"{peer.name}.json").write_text(text + "\n", encoding="utf-8")
    return True
