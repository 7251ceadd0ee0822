"""Prints docs/reference/flags.md and docs/reference/exit-codes.md, which a test holds to the code.

`python scripts/describe_settings.py flags` reads app.settings and the parsers of `headwater`;
`python scripts/describe_settings.py exit-codes` reads the constants of app.cli.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from app.cli import EXIT_CONFIGURATION, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, make_parser
from app.settings import API_KEY_VARIABLE, ENV_PREFIX, OTHER_VARIABLES, Settings

FLAGS_PAGE = """\
# Flags and variables

This page is generated from `app/settings.py` and `app/cli.py` (`python scripts/describe_settings.py flags`).

A flag goes over a variable, a variable over the default. Switches take `--no-` in front of their name, and `true` or
`false` in the variable. A variable that begins with `{prefix}` and is not listed here ends the start: it is a slip of
the pen. `headwater check` takes the same flags and says what would be served.

## headwater serve, headwater check

| flag | variable | default | meaning |
| --- | --- | --- | --- |
{settings}

## Variables without a flag

| variable | meaning |
| --- | --- |
{variables}

## The other commands
{commands}"""

EXIT_CODES_PAGE = """\
# Exit codes

This page is generated from `app/cli.py` (`python scripts/describe_settings.py exit-codes`).

| code | meaning |
| --- | --- |
{rows}

A service manager may restart on {failed} and should not on {configuration}: see the unit in
[Deploy](../how-to/deploy.md). The first SIGTERM or SIGINT drains `headwater serve`, which then ends with {ok}; so does
the SIGHUP of a terminal that closes, while any other reloads. What ends an engine is no exit code of the server:
another engine is started, and the log says how the old one ended.
"""

VARIABLE_MEANINGS: Mapping[str, str] = {
    API_KEY_VARIABLE: "One API key. Several, and keys that change: `--api-key-file`.",
    "HEADWATER_CACHE": "Folder of fetched and converted models; default `~/.cache/headwater`.",
    "HEADWATER_ISA": "Kernels of the native tier to use instead of the best that the CPU has, for comparisons.",
}

EXIT_CODE_MEANINGS: Mapping[int, str] = {
    EXIT_OK: "Done; of `serve`: drained after a signal. Of `demo`: all answers were equal.",
    EXIT_FAILED: "It was tried and failed: no engine can be kept alive, a server did not answer or said an error, "
    "a reload changed nothing, answers of `demo` differ, a training run stopped.",
    EXIT_CONFIGURATION: "Flags, variables, the model or the machine do not fit: a restart would fail the same way.",
    EXIT_INTERRUPTED: "Interrupted from the keyboard, where nothing was to be drained.",
}


def flags_page() -> str:
    """The page of flags."""
    if set(VARIABLE_MEANINGS) != OTHER_VARIABLES:
        raise ValueError(f"say what they mean: {sorted(OTHER_VARIABLES ^ set(VARIABLE_MEANINGS))}")
    return FLAGS_PAGE.format(
        prefix=ENV_PREFIX,
        settings="\n".join(_setting_rows()),
        variables="\n".join(f"| `{name}` | {VARIABLE_MEANINGS[name]} |" for name in sorted(VARIABLE_MEANINGS)),
        commands="".join(_command_sections()),
    )


def exit_codes_page() -> str:
    """The page of exit codes."""
    return EXIT_CODES_PAGE.format(
        rows="\n".join(f"| {code} | {EXIT_CODE_MEANINGS[code]} |" for code in sorted(EXIT_CODE_MEANINGS)),
        ok=EXIT_OK,
        failed=EXIT_FAILED,
        configuration=EXIT_CONFIGURATION,
    )


def _setting_rows() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        flag = "MODEL" if name == "model" else "--" + name.replace("_", "-")
        text = _cell(field.description or "") + _choices(field.annotation)
        yield f"| `{flag}` | `{ENV_PREFIX}{name.upper()}` | {_default(field.default)} | {text} |"


def _command_sections() -> Iterator[str]:
    """One section for each command that is not configured by Settings."""
    for name, parser in _commands(make_parser()).items():
        actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        if "model" in {action.dest for action in actions} and "host" in {action.dest for action in actions}:
            continue
        yield f"\n### {parser.prog}\n\n{_summary(make_parser(), name)}\n"
        rows = [_action_row(parser, action) for action in actions]
        if rows:
            yield "\n| argument | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    choices: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            choices.update(action.choices)
    return choices


def _summary(parser: argparse.ArgumentParser, command: str) -> str:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                if choice.dest == command:
                    text = choice.help or ""
                    return text[:1].upper() + text[1:] + "."
    return ""


def _action_row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    name = action.option_strings[-1] if action.option_strings else metavar
    default = "required" if action.required else _default(action.default)
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    shown = f" [{action.default}]"
    return f"| `{name}` | {default} | {_cell(text.removesuffix(shown))} |"


def _default(value: object) -> str:
    if value in (None, "", (), {}, argparse.SUPPRESS):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


def _choices(annotation: object) -> str:
    """The values that a Literal, or a union with one, takes."""
    literals = [kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is Literal]
    return " Values: " + ", ".join(f"`{value}`" for value in get_args(literals[0])) + "." if literals else ""


def _cell(text: str) -> str:
    """Text for a table: a sentence, with flags and variables set as code."""
    words = [f"`{word}`" if word.startswith(("--", ENV_PREFIX)) else word for word in text.split(" ")]
    joined = " ".join(words).replace(",`", "`,").replace(";`", "`;").replace("|", "\\|")
    return joined[:1].upper() + joined[1:] + "."


def main() -> None:
    """Print the page that the argument names."""
    pages: Mapping[str, Callable[[], str]] = {"flags": flags_page, "exit-codes": exit_codes_page}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", choices=pages)
    sys.stdout.write(pages[parser.parse_args().page]())


if __name__ == "__main__":
    main()
