"""Flags of `chat`, `complete` and `demo`. What a command needs is imported when it runs."""

import argparse
import os
from typing import TYPE_CHECKING

from app.console import remark

if TYPE_CHECKING:
    from argparse import _SubParsersAction

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
DEFAULT_URL = "http://127.0.0.1:8000"


def register(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands that talk to a server."""
    _register_demo(commands)


def _register_demo(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser("demo", help="the same answers alone, together, and through five engine kills")
    demo.add_argument(
        "--url", help="a server that runs; default: start one. Its engine is killed if it is on this machine"
    )
    demo.add_argument("--model", help="model to ask for, or to serve [the first one, the default one]")
    demo.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens of each answer [%(default)s]")
    demo.add_argument("--pid", type=int, help="engine to kill once, where the server's /ready names none")
    demo.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from app.terminal.demo import DemoOptions, run_demo
    from app.terminal.wire import ApiError

    asked = DemoOptions(
        url=options.url,
        model=options.model,
        pid=options.pid,
        key=_key() if options.url is not None else None,
        max_tokens=options.max_tokens,
    )
    try:
        result = run_demo(asked, console=Console(highlight=False), progress=Console(stderr=True))
    except ApiError as error:
        remark(f"headwater: {error}")
        return EXIT_FAILED
    return result.verdict.exit_code


def _key() -> str | None:
    """The key of servers that want one, where every client of this API looks for it."""
    return os.environ.get("OPENAI_API_KEY") or None
