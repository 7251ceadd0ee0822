"""The command `headwater`: what a person types and reads. Each command imports what it needs, when it runs."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from app import __version__
from app.console import answer, remark
from app.core.errors import ConfigurationError
from app.terminal.commands import register as register_terminal
from app.training.commands import register as register_training

if TYPE_CHECKING:
    from app.settings import Settings

EXIT_OK = 0
EXIT_CONFIGURATION = 2
"""Settings, model or machine do not fit: a restart would fail the same way."""
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Mistakes of the operator are printed without a traceback."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except ConfigurationError as error:
        remark(f"headwater: {error}")
        return EXIT_CONFIGURATION
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Takes flags by their whole names only, and so do the parsers of its commands.

    A flag of another server that begins as one of ours must be an error, not ours.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})


class _RefuseKey(argparse.Action):
    """Ends with where keys belong, without printing the one that was given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error(
            "--api-key is not taken, for flags show in process lists: "
            "use --api-key-file FILE or the variable HEADWATER_API_KEY"
        )


def make_parser() -> argparse.ArgumentParser:
    """The flags of all commands; their reference page is made from it."""
    parser: argparse.ArgumentParser = _Parser(
        prog="headwater", description="Serve a trained decoder behind the OpenAI API."
    )
    parser.add_argument("--version", action="version", version=f"headwater {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="serve a model")
    _add_settings(serve)
    serve.set_defaults(command=_serve)

    check = commands.add_parser("check", help="say what would be served, where and why, without serving")
    _add_settings(check)
    check.set_defaults(command=_check)

    reload = commands.add_parser("reload", help="have a server that runs here read its model, keys and template again")
    reload.add_argument("--pid", type=int, help="process of the server; default: the only one here")
    reload.set_defaults(command=_reload)

    pull = commands.add_parser("pull", help="fetch a model into the cache")
    pull.add_argument("model", metavar="MODEL", help="catalogue name or hub repository")
    pull.set_defaults(command=_pull)

    commands.add_parser("list", help="list the catalogue and what is in the cache").set_defaults(command=_list)
    register_terminal(commands)
    register_training(commands, find_model=_find_model)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of Settings. Values are checked there, not here."""
    from app.settings import Settings, split_names

    parser.add_argument("--api-key", nargs="?", action=_RefuseKey, help=argparse.SUPPRESS)
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        default = "" if field.default in (None, (), "", {}) else f" [{field.default}]"
        help_text = f"{field.description}{default}".replace("%", "%%")
        if name == "model":
            parser.add_argument(name, nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=help_text)
        elif field.annotation is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=field.description
            )
        elif field.default == ():
            # One value a flag: several would swallow the MODEL behind them.
            parser.add_argument(
                flag, type=split_names, action="extend", default=argparse.SUPPRESS, metavar="NAMES", help=help_text
            )
        elif field.default == {}:
            import json

            parser.add_argument(flag, type=json.loads, default=argparse.SUPPRESS, metavar="JSON", help=help_text)
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar=_metavar(name), help=help_text)


def _metavar(name: str) -> str:
    return name.rsplit("_", 1)[-1].upper()


def _settings(options: argparse.Namespace) -> "Settings":
    from app.settings import Settings, load_settings

    return load_settings(**{name: value for name, value in vars(options).items() if name in Settings.model_fields})


def _serve(options: argparse.Namespace) -> int:
    from app.serve import serve

    return serve(_settings(options))


def _check(options: argparse.Namespace) -> int:
    from app.serve import check

    return check(_settings(options))


def _reload(options: argparse.Namespace) -> int:
    from app.control import ControlError, ask_reload, find_server

    try:
        pid = find_server() if options.pid is None else options.pid
        remark(f"headwater: asking the server of process {pid}")
        return EXIT_OK if ask_reload(pid, report=answer) else EXIT_FAILED
    except ControlError as error:
        remark(f"headwater: {error}")
        return EXIT_FAILED


def _pull(options: argparse.Namespace) -> int:
    from app.store import pull

    folder = pull(options.model, report=remark)
    answer(f"{folder.name} is in {folder.path} ({folder.licence or 'licence not stated'})")
    return EXIT_OK


def _find_model(name: str) -> Path:
    from app.store import resolve

    return resolve(name, report=remark).path


def _list(_options: argparse.Namespace) -> int:
    from app.store import list_models

    for model in list_models():
        where = f"in the cache: {model.path}" if model.is_cached else "not in the cache"
        default = ", the default" if model.is_default else ""
        answer(f"{model.name} ({model.licence}{default}; context {model.context_length})")
        answer(f"    {model.description}\n    {model.source}\n    {where}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
