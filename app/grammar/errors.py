"""What is wrong with a grammar, in words that a client may read."""

import re

_MAX_CHARS = 300
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_NOISE = ("<non-verbose/>",)


class GrammarError(Exception):
    """A grammar cannot be served. The message is one sentence that names no field."""


def safe_message(text: str) -> str:
    """A library's message in one printable line of bounded length."""
    for noise in _NOISE:
        text = text.replace(noise, "")
    line = _UNPRINTABLE.sub(" ", text).strip().rstrip(".")
    return line if len(line) <= _MAX_CHARS else line[:_MAX_CHARS] + "…"
