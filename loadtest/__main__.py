"""`python -m loadtest run | compare | faults | scorecard`: loads servers and reports what came of it."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.compare import command as compare
from loadtest.faults import command as faults
from loadtest.record import RequestRecord
from loadtest.report import show, write
from loadtest.run import RunConfig, RunResult, run_load
from loadtest.scorecard import command as scorecard
from loadtest.summary import parse_targets

API_KEY_VARIABLE = "OPENAI_API_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every request completed; 1: some did not; 2: the settings cannot be run."""
    options = vars(_parser().parse_args(arguments))
    if options["command"] == "faults":
        return _faults(options)
    if options["command"] == "scorecard":
        return _scorecard(options)
    command, output = options.pop("command"), options["output"]
    if command == "compare":
        return _compare(options)
    del options["output"]
    try:
        config = msgspec.convert(options, RunConfig)
        _check(config)
        result = _run(config)
    except (ValueError, msgspec.ValidationError) as error:
        sys.stderr.write(f"loadtest: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    show(result.summary, Console())
    if output is not None:
        write(result, output)
        Console().print(f"Written to {output}", markup=False)
    return 0 if result.summary.completed == config.num_requests else 1


def _faults(options: dict[str, object]) -> int:
    try:
        return faults.run(msgspec.convert(options, faults.Options), lambda text: Console().print(text, markup=False))
    except KeyboardInterrupt:
        return 130


def _scorecard(options: dict[str, object]) -> int:
    try:
        return scorecard.run(
            msgspec.convert(options, scorecard.Options), lambda text: Console().print(text, markup=False)
        )
    except KeyboardInterrupt:
        return 130


def _compare(options: dict[str, object]) -> int:
    console = Console(highlight=False, soft_wrap=True)
    try:
        return compare.run(msgspec.convert(options, compare.Options), lambda text: console.print(text, markup=False))
    except KeyboardInterrupt:
        return 130


def _run(config: RunConfig) -> RunResult:
    targets = parse_targets(config.goodput)
    api_key = os.environ.get(API_KEY_VARIABLE)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn twice a second: the bar's thread must not delay the stamps.
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as bar:
        task = bar.add_task("requests", total=config.num_requests)

        def advance(_: RequestRecord) -> None:
            bar.advance(task)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run_load(config, targets=targets, api_key=api_key, progress=advance))


def _check(config: RunConfig) -> None:
    for name in ("num_requests", "concurrency", "input_len", "output_len"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}; give at least 1")
    if not 0 <= config.shared_prefix <= 1:
        raise ValueError(f"--shared-prefix is {config.shared_prefix}; give a part of the input, 0 to 1")
    if config.num_warmups < 0:
        raise ValueError(f"--num-warmups is {config.num_warmups}; give 0 or more")
    if config.vocab_size < 2:
        raise ValueError(f"--vocab-size is {config.vocab_size}; give the model's")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="Loads OpenAI-compatible servers.")
    commands = parser.add_subparsers(dest="command", required=True)
    compare.add_parser(commands)
    faults.add_parser(commands)
    scorecard.add_parser(commands)
    run = commands.add_parser(
        "run",
        help="send requests and report latency, throughput and goodput",
        description=f"A key, if the server wants one, is read from {API_KEY_VARIABLE}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = run.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server, with or without /v1")
    add("--model", help="model name; default: the first that the server names")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="which route to load")
    add("--num-requests", type=int, default=100, help="requests that are measured")
    add("--num-warmups", type=int, default=0, help="requests before them that are not")
    add("--concurrency", type=int, default=8, help="closed loop: requests kept running")
    add("--rate", type=float, help="open loop: requests per second, sent whatever the server does")
    add("--burstiness", type=float, default=1.0, help="open loop: 1 is Poisson, below comes in bursts")
    add("--input-len", type=int, default=128, help="prompt length in words or token ids")
    add("--output-len", type=int, default=128, help="max_tokens")
    add("--shared-prefix", type=float, default=0.0, help="part of the prompt that all share, 0 to 1")
    add("--prompt-kind", choices=("words", "token-ids"), default="words", help="what prompts are made of")
    add("--vocab-size", type=int, default=32_000, help="token ids stay below it")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="ask for full-length answers")
    add("--temperature", type=float, default=0.0, help="sampling temperature")
    add("--seed", type=int, default=0, help="of prompts and arrivals")
    add("--timeout-s", type=float, default=600.0, help="longest that one request may take")
    add("--keep-alive", action=argparse.BooleanOptionalAction, default=True, help="use connections again")
    add("--goodput", nargs="*", default=(), metavar="NAME:MS", help="targets: ttft:1000 tpot:100 e2e:9000")
    add("--extra-body", type=msgspec.json.decode, default={}, metavar="JSON", help="fields added to every body")
    add("--output", type=Path, metavar="FOLDER", help="write summary.json, requests.jsonl and plot.svg there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
