"""How the server's log looks: JSON lines for machines, plain text for people. Standard library logging.

A record's facts travel in `extra={"facts": {...}}`: the JSON form merges them into the line's object,
the text form appends them as `name=value`. Prompts and outputs are never among them.
"""

import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

import msgspec

ROOT_LOGGER = "headwater"


def configure_logging(*, level: str = "info", form: str = "auto", stream: TextIO | None = None) -> None:
    """Send the server's and uvicorn's records to `stream` (default: standard error).

    `form` is json, text, or auto: text on a terminal, JSON lines elsewhere.
    """
    target = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    as_text = form == "text" or (form == "auto" and target.isatty())
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    for name in (ROOT_LOGGER, "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def facts_of(record: logging.LogRecord) -> Mapping[str, object]:
    """The structured part of a record."""
    facts = getattr(record, "facts", None)
    return facts if isinstance(facts, Mapping) else {}


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; whatever a fact holds becomes JSON or its repr."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **facts_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=repr).decode()


class TextFormatter(logging.Formatter):
    """Time, level, message, facts; a traceback below."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line for people; line breaks inside facts are escaped."""
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        facts = "".join(f" {name}={_plain(value)}" for name, value in facts_of(record).items() if value is not None)
        text = f"{clock} {record.levelname.lower():7} {record.getMessage()}{facts}"
        return text + "\n" + self.formatException(record.exc_info) if record.exc_info else text


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if text.isprintable() else repr(text)
