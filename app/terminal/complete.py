"""`headwater complete`: the prompt on standard input, its completion on standard output, as it comes."""

import io
import sys
from collections.abc import Callable
from typing import IO, NamedTuple

from app.terminal.show import printable
from app.terminal.wire import Api, ApiError

FINISHED = frozenset({"stop", "length"})


class CompleteOptions(NamedTuple):
    """What to ask for; None leaves it to the server."""

    url: str
    model: str | None
    key: str | None
    max_tokens: int
    temperature: float | None
    seed: int | None
    on_cut: Callable[[str], None] | None = None
    """Is told when the answer must go on elsewhere."""


def complete(options: CompleteOptions, *, source: IO[bytes], sink: IO[str]) -> None:
    """Copy the completion of `source` to `sink`, byte for byte; a terminal gets no control characters.

    Raises ApiError where the completion is not whole: what came of it has been written.
    """
    prompt = _read_prompt(source)
    is_terminal = sink.isatty()
    finish_reason: str | None = None
    with Api(options.url, key=options.key, on_cut=options.on_cut) as api:
        body = {"model": api.choose_model(options.model).id, "prompt": prompt, "max_tokens": options.max_tokens}
        body |= {"temperature": options.temperature, "seed": options.seed}
        given = {name: value for name, value in body.items() if value is not None}
        for delta in api.stream("/v1/completions", given | {"stream": True}):
            sink.write(printable(delta.text) if is_terminal else delta.text)
            sink.flush()
            finish_reason = delta.finish_reason or finish_reason
    if is_terminal:
        sink.write("\n")
    if finish_reason not in FINISHED:
        raise ApiError(f"the answer is not whole: it ended with the finish reason {finish_reason!r}")


def standard_output() -> IO[str]:
    """Standard output as UTF-8 whatever the locale, with newlines as they are."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", newline="")
    return stream


def _read_prompt(source: IO[bytes]) -> str:
    try:
        return source.read().decode()
    except UnicodeDecodeError as error:
        raise ApiError(f"standard input is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
