"""The comparison's pure parts: what counts, what is repeated, what the tables say; and one server's life."""

import argparse
import sys
import time
from pathlib import Path

import msgspec
import pytest

from loadtest.compare import command, session
from loadtest.compare.client_check import agrees, check_table
from loadtest.compare.measure import MAX_ATTEMPTS, Label, Measurement, load, measure, needs_another, num_short, settle
from loadtest.compare.peers import Peer, Places, default_peers_dir, peer_table, shown_command, version_in
from loadtest.compare.plot import draw
from loadtest.compare.probe import MOVED_LIMIT, Peaks, moved
from loadtest.compare.probe import measure as measure_peaks
from loadtest.compare.report import BEGIN, END, between_marks, write_report
from loadtest.compare.results import Machine, Results, Turn, counting, is_done, label_of
from loadtest.compare.server import Server, ServerFailed, free_port, tree
from loadtest.compare.table import cells, markdown, precision_class, spread
from loadtest.compare.workloads import WORKLOADS, run_config, select, warmup_config
from loadtest.prompts import word_prompt
from loadtest.record import Outcome, RequestRecord

STEADY = Peaks(read_gbps=40.0, gemm_gflops=200.0)
SLOWED = Peaks(read_gbps=30.0, gemm_gflops=200.0)
MACHINE = Machine(cpu="A CPU", num_cores=2, memory_gib=24.0, flags=("avx2",), kernel="6.1", python="3.11")


def measurement(peer: str = "headwater-bf16", tokens_per_s: float = 100.0, **changes: object) -> Measurement:
    plain = Measurement(
        peer=peer, version="1", workload="8:128/64", is_quick=False, round_index=0, attempt=0, num_requests=64,
        num_completed=64, num_short=0, errors={}, tokens_per_s=tokens_per_s, tpot_ms=10.0, ttft_p50_ms=50.0,
        ttft_p90_ms=80.0, itl_p90_ms=12.0, client_cpu_share=0.05, prompt_tokens=128.0, cached_share=None,
        duration_s=20.0, ready_s=1.5, memory_bytes=500 << 20, before=STEADY, after=STEADY, finished="2026-11-24",
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def test_the_larger_of_both_movements_counts_in_both_directions() -> None:
    assert moved(STEADY, STEADY) == 0
    assert moved(STEADY, SLOWED) == moved(SLOWED, STEADY) == pytest.approx(0.25)
    assert moved(STEADY, Peaks(read_gbps=36.0, gemm_gflops=100.0)) == pytest.approx(0.5)


def test_an_unsteady_run_is_repeated_a_bounded_number_of_times() -> None:
    steady, unsteady = measurement(), measurement(after=SLOWED)
    assert (steady.is_steady, unsteady.is_steady) == (True, False)
    assert needs_another([])
    assert not needs_another([steady])
    assert needs_another([unsteady])
    assert not needs_another([unsteady, steady])
    assert not needs_another([unsteady] * MAX_ATTEMPTS)


def test_the_attempt_that_counts_moved_least() -> None:
    worst, best = measurement(after=SLOWED), measurement(after=Peaks(read_gbps=33.0, gemm_gflops=200.0))
    assert not best.is_steady
    assert settle([worst, best, worst]) is best


def test_the_limit_itself_is_steady() -> None:
    after = Peaks(read_gbps=STEADY.read_gbps * (1 - MOVED_LIMIT), gemm_gflops=200.0)
    assert moved(STEADY, after) == pytest.approx(MOVED_LIMIT)


def test_short_answers_and_failures_are_counted() -> None:
    def record(outcome: Outcome, output_tokens: int) -> RequestRecord:
        return RequestRecord(index=0, scheduled_ns=0, outcome=outcome, output_tokens=output_tokens)

    records = [
        record(Outcome.COMPLETED, 64),
        record(Outcome.COMPLETED, 63),
        record(Outcome.COMPLETED, 65),
        record(Outcome.REFUSED, 64),
    ]
    assert num_short(records, 64) == 3


def test_a_server_gets_the_same_prompts_as_the_others_and_never_the_same_twice() -> None:
    workload = WORKLOADS[-1]
    runs = [
        run_config(workload, url="http://x", is_quick=False, round_index=round_index, attempt=attempt)
        for round_index in range(3)
        for attempt in range(MAX_ATTEMPTS)
    ]
    seeds = {run.seed for run in runs} | {warmup_config(run).seed for run in runs}
    assert len(seeds) == 2 * len(runs)
    assert len({run_config(w, url="", is_quick=True, round_index=0, attempt=0).seed for w in WORKLOADS}) == 5
    prompts = {
        word_prompt(config.input_len, shared=config.shared_prefix, seed=config.seed, index=0)[:200]
        for run in runs
        for config in (run, warmup_config(run))
    }
    assert len(prompts) == 2 * len(runs)
    assert runs[0] == run_config(workload, url="http://x", is_quick=False, round_index=0, attempt=0)


def test_a_warm_up_is_a_small_part_of_its_run() -> None:
    for workload in WORKLOADS:
        run = run_config(workload, url="", is_quick=True, round_index=0, attempt=0)
        warm = warmup_config(run)
        assert 1 <= warm.num_requests <= min(run.num_requests, run.concurrency)
        assert warm.input_len == run.input_len
        assert run.num_requests % run.concurrency == 0


def test_workloads_are_named_or_refused() -> None:
    assert select([]) == WORKLOADS
    assert [workload.name for workload in select(["32:128/64", "1:128/64"])] == ["1:128/64", "32:128/64"]
    with pytest.raises(ValueError, match="'1:1/1' is none of 1:128/64"):
        select(["1:1/1"])


def test_rounds_begin_with_another_server_each() -> None:
    peers = list(peer_table()[:3])
    orders = [[peer.name for peer in command.rotated(peers, index)] for index in range(3)]
    assert {order[0] for order in orders} == {peer.name for peer in peers}
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert command.rotated([], 1) == []


def test_what_was_measured_is_found_again_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    results = Results(tmp_path / "compare")
    assert results.measurements() == []
    results.keep(measurement())
    path = results.folder / "measurements.jsonl"
    path.write_bytes(path.read_bytes() + b'{"peer": "headw')
    results.keep(measurement(tokens_per_s=120.0))
    assert [m.tokens_per_s for m in results.measurements()] == [100.0, 120.0]


def test_a_comparison_goes_on_where_it_stopped() -> None:
    done, label = measurement(), label_of(measurement())
    assert not is_done(label, [])
    assert is_done(label, [done])
    assert not is_done(label, [measurement(after=SLOWED)])
    assert is_done(label, [measurement(after=SLOWED, attempt=n) for n in range(MAX_ATTEMPTS)])
    for change in ({"version": "2"}, {"round_index": 1}, {"is_quick": True}, {"workload": "1:128/64"}, {"peer": "x"}):
        assert not is_done(label, [measurement(**change)])


def test_only_the_latest_version_counts_and_long_runs_before_quick_ones() -> None:
    old, new = measurement(version="1"), measurement(version="2", tokens_per_s=200.0)
    assert counting([old, new]) == [new]
    quick = measurement(is_quick=True, round_index=7)
    assert counting([quick]) == [quick]
    assert counting([quick, old]) == [old]
    tries = [measurement(after=SLOWED), measurement(attempt=1, tokens_per_s=90.0)]
    assert counting([*tries, measurement(round_index=1)]) == [tries[1], measurement(round_index=1)]


def test_a_folder_holds_one_machines_figures(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.keep_machine(MACHINE)
    results.keep_machine(msgspec.structs.replace(MACHINE, kernel="6.2"))
    assert results.machine() == msgspec.structs.replace(MACHINE, kernel="6.2")
    with pytest.raises(ValueError, match="A CPU, 2 cores"):
        results.keep_machine(msgspec.structs.replace(MACHINE, num_cores=4))


def test_spread_is_median_and_ends() -> None:
    assert spread([]) is None
    assert spread([None]) is None
    found = spread([3.0, None, 1.0, 2.0, 10.0])
    assert found is not None
    assert (found.median, found.low, found.high, found.count) == (2.5, 1.0, 10.0, 4)


def test_cells_take_the_median_round() -> None:
    rounds = [measurement(tokens_per_s=value, round_index=index) for index, value in enumerate((90.0, 300.0, 100.0))]
    (cell,) = cells([*rounds])
    assert (cell.tokens_per_s.median, cell.num_rounds, cell.num_unsteady) == (100.0, 3, 0)


def test_tables_show_losses_as_plainly_as_wins() -> None:
    made = [
        measurement(tokens_per_s=150.0),
        measurement("llama-bf16", tokens_per_s=200.0, tpot_ms=5.0),
        measurement("llama-q8_0", tokens_per_s=300.0),
        measurement("vllm", tokens_per_s=100.0),
    ]
    text = markdown(made, peer_table(), "A CPU")
    assert "| headwater-bf16 | 0.75 | 2.00 | 1.00 | 1.00 | llama-bf16 (same precision) |" in text
    assert "| headwater-bf16 | 0.50 | 1.00 | 1.00 | 1.00 | llama-q8_0 (any precision) |" in text
    assert "150 (150 to 150)" in text


def test_a_server_that_answers_short_is_shown_and_compared_with_nobody() -> None:
    made = [measurement(), measurement("llama-bf16", tokens_per_s=900.0, num_short=3), measurement("vllm")]
    text = markdown(made, peer_table(), "A CPU")
    assert "900 (900 to 900), 3 short or failed" in text
    assert "llama-bf16 (same precision)" not in text
    assert "vllm (same precision)" in text
    assert markdown([], peer_table(), "A CPU") == "Nothing has been measured yet.\n"


def test_figures_of_an_unsteady_machine_are_marked() -> None:
    rounds = [measurement(round_index=0, after=SLOWED), measurement(round_index=1)]
    text = markdown([*rounds, measurement("vllm")], peer_table(), "A CPU")
    assert "100 (100 to 100), unsteady |" in text
    assert "vllm (same precision), unsteady |" in text
    text = markdown([*rounds, measurement(round_index=2), measurement("vllm")], peer_table(), "A CPU")
    assert ", unsteady" not in text


def test_precisions_of_eight_bits_are_one_class() -> None:
    assert precision_class("int8") == precision_class("Q8_0") != precision_class("bf16")
    assert precision_class("int4") == precision_class("Q4_K_M") != precision_class("Q8_0")


def test_the_report_fills_the_page_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{BEGIN}\nold\n{END}\nend\n")
    results = Results(tmp_path / "compare")
    results.keep_machine(MACHINE)
    results.keep(measurement())
    for _ in range(2):
        text = write_report(results, peer_table(), page=page)
    assert page.read_text() == f"# Title\n{BEGIN}\n\n{text.strip()}\n\n{END}\nend\n"
    assert "A CPU, 2 cores, 24 GiB" in text
    assert (results.folder / "plot.svg").read_text().startswith("<svg")
    with pytest.raises(ValueError, match="compare: begin"):
        between_marks("no marks", "text")


def test_the_plot_has_a_bar_for_each_server() -> None:
    made = cells([measurement(), measurement("vllm", tokens_per_s=0.0)])
    assert draw(made, peer_table(), "a < b").count("<rect") == 3
    assert "a &lt; b" in draw([], peer_table(), "a < b")


def test_the_peers_are_well_formed() -> None:
    peers = peer_table()
    assert len({peer.name for peer in peers}) == len(peers)
    places = Places(peers=Path("/p"), model=Path("/m"), model_name="name")
    for peer in peers:
        filled = places.command(peer, port=81)
        assert ("81" in filled) != peer.is_in_process
        assert not any("{" in part for part in filled)
        shown = shown_command(peer)
        assert "/" not in shown.replace("bin/", "")
        assert "{" not in shown
        msgspec.json.encode(session.request_fields(peer, places))


def test_a_peer_that_is_not_installed_is_skipped_with_a_line(tmp_path: Path) -> None:
    said: list[str] = []
    places = Places(peers=tmp_path, model=tmp_path, model_name="name")
    found = command._installed(peer_table(), places, said.append)
    assert {peer.name for peer in found} == {peer.name for peer in peer_table() if peer.is_ours}
    assert any(text.startswith("llama-bf16: skipped, no ") and "docs/benchmarks.md" in text for text in said)


def test_versions_are_found_in_what_commands_print() -> None:
    assert version_in("version: 0.6.0-dev (build 11434, commit unknown)\nbuilt with GNU 12.2.0") == "11434"
    assert version_in("version: 0.6.0-dev (build 0, commit unknown)") == "0.6.0-dev"
    assert version_in("WARNING\n0.32.0\n") == "0.32.0"
    assert version_in("") == "unknown"


def test_the_peers_folder_is_named_by_a_variable() -> None:
    assert default_peers_dir({"HEADWATER_PEERS": "/x/y"}) == Path("/x/y")
    assert default_peers_dir({}).name == "headwater-peers"


def test_requests_speak_the_servers_own_words() -> None:
    places = Places(peers=Path("/p"), model=Path("/m"), model_name="name")
    transformers = next(peer for peer in peer_table() if peer.name == "transformers")
    plain = run_config(WORKLOADS[0], url="http://x", is_quick=True, round_index=0, attempt=0)
    config = session.with_peer(plain, transformers, places)
    assert config.model == "/m"
    assert not config.ignore_eos
    assert set(config.extra_body) == {"generation_config"}
    assert session.with_peer(plain, peer_table()[0], places) == plain


def test_the_clients_agree_or_the_table_says_so(tmp_path: Path) -> None:
    def turn(workload: str, ours: float, theirs: float) -> Turn:
        return Turn(
            workload=workload, our_tokens_per_s=ours, their_tokens_per_s=theirs, our_tpot_ms=1.0, their_tpot_ms=2.0
        )

    assert (agrees(109, 100), agrees(91, 100), agrees(112, 100), agrees(80, 100)) == (True, True, False, False)
    turns = [turn("a", 100, 99), turn("a", 104, 100), turn("a", 102, 500), turn("b", 50, 100)]
    table = check_table(turns)
    assert "| a | 102 | 100 | 1.02 | 1.0 / 2.0 |" in table
    assert "| b | 50 | 100 | 0.50 (they disagree) |" in table
    results = Results(tmp_path)
    assert results.turns() == []
    results.keep_turns(turns)
    assert results.turns() == turns
    assert "vllm bench serve" in write_report(results, peer_table(), page=None)


def test_options_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(dest="command"))
    for arguments, told in ((["--peers", "x"], "'x' is none of"), (["--rounds", "0"], "--rounds is 0")):
        options = vars(parser.parse_args(["compare", *arguments, "--output", str(tmp_path)]))
        assert command.run(msgspec.convert(options, command.Options), print) == 2
        assert told in capsys.readouterr().err


# A worker in a few lines: two tokens a request, a millisecond apart.
WORKER = """
import json, sys
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    done = [{"sent_ns": i * 10**6, "output_ns": [(i + 1) * 10**6, (i + 2) * 10**6], "output_tokens": 2}
            for i, _ in enumerate(asked["prompts"])]
    print(json.dumps(done), flush=True)
"""


def test_what_has_no_address_is_measured_by_its_own_moments(tmp_path: Path) -> None:
    plain = next(peer for peer in peer_table() if peer.is_in_process)
    (tmp_path / "worker.py").write_text(WORKER)
    peer = msgspec.structs.replace(plain, command=("{python}", "{peers}/worker.py"))
    places = Places(peers=tmp_path, model=tmp_path, model_name="name")
    with session.session(peer, places) as running:
        assert running.memory_bytes() > 1 << 20
        config = run_config(WORKLOADS[0], url="", is_quick=True, round_index=0, attempt=0)
        summary = running.load(config).summary
    assert summary.completed == WORKLOADS[0].num_quick and summary.output_tokens == 2 * summary.completed
    assert summary.ttft_ms is not None and summary.ttft_ms.p50 == 1.0
    broken = msgspec.structs.replace(plain, command=("{python}", "-c", "print('no model')"))
    with pytest.raises(ServerFailed, match="no model"), session.session(broken, places):
        pass


def test_the_probe_measures_something() -> None:
    peaks = measure_peaks(1)
    assert peaks.read_gbps > 0.1
    assert peaks.gemm_gflops > 0.1


# A server in a few lines: it answers after its second request, and has a child in a session of its own.
SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
seen = []
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer(b'{"data": [{"id": "m"}]}')
    def do_POST(self):
        seen.append(self.rfile.read(int(self.headers["Content-Length"])))
        if len(seen) < 2:
            return self.send_error(503)
        events = [b'{"choices": [{"text": "a"}]}'] * 2
        events += [b'{"choices": [{"finish_reason": "length"}], "usage": {"completion_tokens": TOKENS}}']
        self.answer(b"".join(b"data: %s\\n\\n" % event for event in events))
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_ready_when_it_answers_and_ends_with_all_its_children(tmp_path: Path) -> None:
    port = free_port()
    with Server([sys.executable, "-c", SERVER, str(port)], environment={}, port=port, log=tmp_path / "log") as server:
        assert 0 < server.wait_ready({}, timeout_s=60) < 60
        assert server._process is not None
        members = tree(server._process.pid)
        assert len(members) == 2
        assert server.memory_bytes() > 1 << 20
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in members[:1])
    assert all(_is_gone(pid) for pid in members)


def test_a_server_that_ends_or_never_answers_is_a_failure_with_its_last_words(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        pytest.raises(ServerFailed, match="status 1:\nno such model"),
        Server(words, environment={}, port=free_port(), log=tmp_path / "log") as server,
    ):
        server.wait_ready({}, timeout_s=60)
    silent = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        pytest.raises(ServerFailed, match="no answer within 0 s"),
        Server(silent, environment={}, port=free_port(), log=tmp_path / "log") as server,
    ):
        server.wait_ready({}, timeout_s=0.2)


def test_a_session_measures_repeats_and_keeps_every_attempt(tmp_path: Path) -> None:
    script = SERVER.replace("TOKENS", "64")
    peer = Peer(
        name="toy", title="Toy", precision="bf16", command=(sys.executable, "-c", "{toy}", "{port}"), needs=(),
        install="", tried="", version_command=(),
    )  # fmt: skip
    port = free_port()
    kept: list[Measurement] = []
    peaks = iter([STEADY, SLOWED, STEADY, STEADY])
    with Server([sys.executable, "-c", script, str(port)], environment={}, port=port, log=tmp_path / "log") as server:
        ready_s = server.wait_ready({}, timeout_s=60)
        counted = measure(
            Label(peer=peer.name, version="1", workload=WORKLOADS[0].name, is_quick=True, round_index=0),
            lambda attempt: run_config(
                WORKLOADS[0], url=server.url, is_quick=True, round_index=0, attempt=attempt
            ),
            load=load, probe=lambda: next(peaks), ready_s=ready_s, memory_bytes=server.memory_bytes, keep=kept.append,
        )  # fmt: skip
    assert [(m.attempt, m.is_steady) for m in kept] == [(0, False), (1, True)]
    assert counted is kept[1]
    assert (counted.num_requests, counted.num_completed, counted.num_short) == (8, 8, 0)
    assert counted.tokens_per_s > 0
    assert "peaks moved 25%" in command.line(kept[0])


def _is_gone(pid: int) -> bool:
    """A child whose parent is gone may wait to be reaped by the system's first process."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False
