"""`python -m loadtest.bench_pipeline`: what the HTTP path alone carries.

Starts `headwater serve` with the scripted runner, which computes nothing, so that the figure is of the
socket, journal, detokenizer, stop matcher and SSE. Client, API process and engine share this
machine's cores, and the CPU seconds of each side are printed beside the figure.

An engine that is faster than the API process gets its outputs merged: one event then carries many
tokens, and tokens/s says little of the cost of an event. So steps are paced (`--step-ms`), and the
figure stands with its tokens per event: near 1 every step reached its client as an event of its own.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console

from loadtest.report import show, write
from loadtest.run import RunConfig, RunResult, run_load

NUM_STREAMS = 64
STOP_STRINGS = ["\n\n用户：", "<|never|>"]
"""Never completed, always looked for."""
START_SECONDS = 120.0
STOP_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every request completed; 1: some did not, or the server did not start."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        with _server(options.model, num_streams=options.streams, step_ms=options.step_ms) as url:
            config = _config(url, options)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                result = runner.run(run_load(config, targets={}, api_key=None, progress=lambda _: None))
    except (RuntimeError, ValueError) as error:
        sys.stderr.write(f"bench_pipeline: {error}\n")
        return 1
    show(result.summary, console)
    console.print(_verdict(result, options))
    if options.output is not None:
        write(_without_port(result), options.output)
    return 0 if result.summary.completed == config.num_requests else 1


def _verdict(result: RunResult, options: argparse.Namespace) -> str:
    summary = result.summary
    num_events = sum(len(record.output_ns) for record in result.records)
    server = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        f"{summary.output_tokens_per_s:.0f} tokens/s in {num_events / summary.duration_s:.0f} events/s, "
        f"{summary.output_tokens / max(num_events, 1):.2f} tokens per event, over {options.streams} streams, "
        f"steps of at least {options.step_ms} ms, {os.cpu_count()} cores; "
        f"server CPU {server.ru_utime + server.ru_stime:.1f} s with its start and warm-up, "
        f"client CPU {summary.client_cpu_share * summary.duration_s:.1f} s"
    )


def _config(url: str, options: argparse.Namespace) -> RunConfig:
    return RunConfig(
        url=url,
        prompt_kind="token-ids",
        num_requests=options.streams * options.rounds,
        num_warmups=options.streams,
        concurrency=options.streams,
        input_len=32,
        output_len=options.output_len,
        extra_body={"stop": STOP_STRINGS},
    )


def _without_port(result: RunResult) -> RunResult:
    return msgspec.structs.replace(result, config=msgspec.structs.replace(result.config, url="http://127.0.0.1"))


@contextmanager
def _server(model: str, *, num_streams: int, step_ms: float) -> Iterator[str]:
    """A server of this checkout on a free port; ended, and waited for, at the exit. Raises RuntimeError."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"num_kv_blocks": 64 * num_streams, "block_size": 64, "vocab_size": 49_152}
    scripted = json.dumps(settings | {"step_seconds": step_ms / 1e3})
    command = [str(Path(sys.executable).with_name("headwater")), "serve", model, "--port", str(port)]
    command += ["--tier", "scripted", "--scripted", scripted, "--max-num-seqs", str(num_streams)]
    command += ["--log-level", "warning"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_ready(f"http://127.0.0.1:{port}/ready", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"the server was not ready within {START_SECONDS:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_pipeline", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4", help="whose tokenizer is used")
    parser.add_argument("--streams", type=int, default=NUM_STREAMS, help="requests kept running")
    parser.add_argument("--rounds", type=int, default=4, help="requests that each stream makes")
    parser.add_argument("--output-len", type=int, default=512, help="tokens of each answer")
    parser.add_argument("--step-ms", type=float, default=2.0, help="least time of a step; 0 lets outputs be merged")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the results there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
