"""Flags of `chat`, `complete` and `demo`. What a command needs is imported when it runs."""

import argparse
import os
from typing import TYPE_CHECKING

from app.console import remark

if TYPE_CHECKING:
    from argparse import _SubParsersAction

EXIT_OK = 0
EXIT_FAILED = 1
DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "OPENAI_API_KEY"
SEVERAL = "several, divided by commas, go on with each other's answers"


def register(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands that talk to a server."""
    chat = commands.add_parser("chat", help="talk to the model; starts a server where none runs")
    _add_server(chat, f"{SEVERAL}; default: {DEFAULT_URL}, or a server of its own where none runs there")
    chat.add_argument("--system", help="system prompt")
    chat.set_defaults(command=_chat)

    complete = commands.add_parser("complete", help="complete standard input on standard output")
    _add_server(complete, f"{SEVERAL}; default: {DEFAULT_URL}")
    complete.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens [%(default)s]")
    complete.add_argument("--temperature", type=float, help="0 is greedy; default: the server's")
    complete.add_argument("--seed", type=int, help="key of the draws; default: drawn")
    complete.set_defaults(command=_complete)

    demo = commands.add_parser("demo", help="the same answers alone, together, and through five engine kills")
    _add_server(demo, "default: start one. Its engine is killed where it is on this machine")
    demo.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens of each answer [%(default)s]")
    demo.add_argument("--pid", type=int, help="engine to kill once, where the server's /ready names none")
    demo.set_defaults(command=_demo)


def _add_server(parser: argparse.ArgumentParser, default_url: str) -> None:
    parser.add_argument("--url", help=f"a server that runs, with the key of {KEY_VARIABLE} if it is set; {default_url}")
    parser.add_argument("--model", help="model to ask, or to serve; default: the first that is served")


def _chat(options: argparse.Namespace) -> int:
    import sys
    from contextlib import ExitStack

    from app.terminal.chat import Chat, Conversation, sink_of_terminal, terminal_lines
    from app.terminal.child import own_server
    from app.terminal.show import drop_output
    from app.terminal.wire import Api, ApiError, Unreachable

    def connect(stack: ExitStack) -> tuple[Api, str | None]:
        url = DEFAULT_URL if options.url is None else options.url
        api = stack.enter_context(Api(url, key=_key(), on_cut=_tell))
        try:
            api.ready()
        except Unreachable:
            if options.url is not None:
                raise
        else:
            return api, options.model
        remark(f"no server answers at {DEFAULT_URL}: starting one (the first time it fetches the model)")
        url = stack.enter_context(own_server(model=options.model))
        return stack.enter_context(Api(url)), None

    try:
        with ExitStack() as stack:
            api, name = connect(stack)
            model = api.choose_model(name).id
            remark(f"{model} at {api.url}; /help lists the commands")
            conversation = Conversation(model=model, system=options.system)
            Chat(api, conversation, read_line=terminal_lines(sys.stdin), sink=sink_of_terminal()).run()
    except ApiError as error:
        return _failed(error)
    except BrokenPipeError:
        drop_output()  # whoever read has read enough
        return EXIT_FAILED
    return EXIT_OK


def _complete(options: argparse.Namespace) -> int:
    import sys

    from app.terminal.complete import CompleteOptions, complete, standard_output
    from app.terminal.show import drop_output
    from app.terminal.wire import ApiError

    asked = CompleteOptions(
        url=DEFAULT_URL if options.url is None else options.url,
        model=options.model,
        key=_key(),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        on_cut=_tell,
    )
    try:
        complete(asked, source=sys.stdin.buffer, sink=standard_output())
    except ApiError as error:
        return _failed(error)
    except BrokenPipeError:
        drop_output()  # whoever read has read enough
        return EXIT_FAILED
    return EXIT_OK


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from app.terminal.demo import DemoOptions, run_demo
    from app.terminal.wire import ApiError

    asked = DemoOptions(
        url=options.url,
        model=options.model,
        pid=options.pid,
        key=None if options.url is None else _key(),
        max_tokens=options.max_tokens,
    )
    try:
        result = run_demo(asked, console=Console(highlight=False), progress=Console(stderr=True))
    except ApiError as error:
        return _failed(error)
    return result.verdict.exit_code


def _tell(reason: str) -> None:
    remark(f"headwater: {reason}; going on")


def _failed(error: Exception) -> int:
    remark(f"headwater: {error}")
    return EXIT_FAILED


def _key() -> str | None:
    """The key of servers that want one, where every client of this API looks for it."""
    return os.environ.get(KEY_VARIABLE) or None
