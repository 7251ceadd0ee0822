"""The log: one JSON object or one line of text a record."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from app.observability.logging import configure_logging

NAMES = ("headwater", "uvicorn")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    kept = {name: (logging.getLogger(name).handlers, logging.getLogger(name).level) for name in NAMES}
    yield
    for name, (handlers, level) in kept.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, True
        logger.setLevel(level)


def log(form: str, *, level: str = "info") -> str:
    stream = io.StringIO()
    configure_logging(level=level, form=form, stream=stream)
    logger = logging.getLogger("headwater.test")
    logger.debug("quiet")
    logger.info("hello %s", "你好", extra={"facts": {"id": "a\nb", "n": 3, "t": 0.12345, "none": None, "o": {1, 2}}})
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("failed")
    return stream.getvalue()


def test_json_lines() -> None:
    first, second = (json.loads(line) for line in log("json").splitlines())
    assert (first["message"], first["level"], first["logger"]) == ("hello 你好", "info", "headwater.test")
    assert (first["id"], first["n"], first["none"]) == ("a\nb", 3, None)
    assert first["time"].endswith("+00:00") and "ValueError: why" in second["traceback"]


def test_text_for_people_keeps_a_record_on_its_line() -> None:
    first, *rest = log("text").splitlines()
    assert first.endswith(" info    hello 你好 id='a\\nb' n=3 t=0.123 o={1, 2}") and "none" not in first
    assert rest[-1] == "ValueError: why"


def test_auto_is_json_where_there_is_no_terminal_and_levels_hold() -> None:
    assert json.loads(log("auto").splitlines()[0])["n"] == 3
    assert "quiet" in log("json", level="debug") and "hello" not in log("json", level="error")
