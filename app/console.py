"""Lines for the person at the terminal: answers on standard output, remarks on standard error."""

import sys


def answer(text: str) -> None:
    """What was asked for."""
    print(text, flush=True)  # noqa: T201


def remark(text: str) -> None:
    """What happens meanwhile, and what went wrong."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
