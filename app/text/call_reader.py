"""Owns the reading of one JSON object that may be a tool call, character by character.

Invariant: once a name and the beginning of arguments were read the object is a call, whatever follows; before
that every character is kept, so that what is no call can be given back as text.
"""

import json
from enum import Enum, auto
from typing import NamedTuple

MAX_OPENING = 4096
"""Characters in which a call must have its name and begin its arguments. Without this bound, text that begins
like many calls, one in the other, would be read again for each."""
SPACE = " \t\r\n"
_ARGUMENTS = frozenset({"arguments", "parameters"})
_BARE_KEYS = frozenset({"name", "type", "id", *_ARGUMENTS})


class _Place(Enum):
    OPENING = auto()
    KEY = auto()
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()
    IN_VALUE = auto()
    AFTER = auto()


class CallPart(NamedTuple):
    """What a character brought of a call."""

    name: str | None
    """With the first part of a call."""
    arguments: str
    """More of their JSON text."""


class CallReader:
    """One object, character by character. Over when it ends, or when it cannot be a call any more."""

    def __init__(self, names: frozenset[str] | None) -> None:
        """`names` are those that count; None: any, and without arguments, too."""
        self._names = names
        self._place = _Place.OPENING
        self._key = ""
        self._value = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._name: str | None = None
        self._waiting: str | None = None
        """Arguments that came before the name."""
        self.raw: list[str] = []
        self.has_begun = False
        """A name and the beginning of arguments were found: it is a call, whatever follows."""
        self.is_over = False
        self.is_broken = False
        """Over because of a character that has no place; it is not part of the object."""
        self._streams = False

    def take(self, char: str) -> CallPart | None:
        """What this character brought."""
        if not self.has_begun:
            self.raw.append(char)
            if len(self.raw) > MAX_OPENING:
                self.is_over = True
                return None
        if self._place is _Place.IN_VALUE:
            return self._take_value(char)
        if self._place is _Place.IN_KEY:
            self._take_key(char)
            return None
        return None if char in SPACE else self._take_mark(char)

    def _take_mark(self, char: str) -> CallPart | None:
        """A character outside of keys and values."""
        match self._place, char:
            case _Place.OPENING, "{":
                self._place = _Place.KEY
            case (_Place.KEY, '"'):
                self._place, self._key, self._in_string, self._escaped = _Place.IN_KEY, "", True, False
            case (_Place.KEY, "}") | (_Place.AFTER, "}"):
                return self._end()
            case _Place.COLON, ":":
                self._place = _Place.VALUE
            case _Place.VALUE, _:
                return self._begin_value(char)
            case _Place.AFTER, ",":
                self._place = _Place.KEY
            case _:
                self.is_over = self.is_broken = True
        return None

    def _take_key(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._place = _Place.COLON
            self.is_over = self._names is not None and not self.has_begun and self._key not in _BARE_KEYS
            return
        self._key += char

    def _begin_value(self, char: str) -> CallPart | None:
        self._place, self._value = _Place.IN_VALUE, ""
        self._depth, self._in_string, self._escaped = 0, False, False
        wrong = (self._key == "name" and char != '"') or (self._key in _ARGUMENTS and char not in '{"n')
        if wrong and not self.has_begun:
            self.is_over = True
            return None
        return self._take_value(char)

    def _take_value(self, char: str) -> CallPart | None:
        is_end = False
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                is_end = self._depth == 0
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif self._depth and char in "}]":
            self._depth -= 1
            is_end = self._depth == 0
        elif not self._depth and char in SPACE + ",}":
            # The end of a number or a word, and no part of it.
            ended = self._end_value()
            after = self._end_scalar(char)
            return after if ended is None else ended
        self._value += char
        streamed = self._stream(char) if self._is_streamed else None
        ended = self._end_value() if is_end else None
        return ended if streamed is None else streamed

    @property
    def _is_streamed(self) -> bool:
        """Whether the value is an object of arguments, and the first one."""
        return self._key in _ARGUMENTS and self._value[0] == "{" and (not self.has_begun or self._streams)

    def _stream(self, char: str) -> CallPart | None:
        if self._name is None:
            self._waiting = self._value
            return None
        if self.has_begun:
            return CallPart(None, char)
        self._streams = True
        return self._begin(char)

    def _begin(self, arguments: str) -> CallPart:
        self.has_begun = True
        self.raw = []
        return CallPart(self._name, arguments)

    def _end_scalar(self, char: str) -> CallPart | None:
        if self.is_over:
            return None
        self._place = _Place.AFTER
        if char == ",":
            self._place = _Place.KEY
        return self._end() if char == "}" else None

    def _end_value(self) -> CallPart | None:
        self._place = _Place.AFTER
        if self._streams:
            self._streams = False
            return None
        if self.has_begun:
            return None
        if self._key == "name":
            return self._end_name()
        if self._key in _ARGUMENTS and self._value[0] != "{":
            self._waiting = _text_of(self._value) if self._value[0] == '"' else "{}"
            self.is_over = self._value[0] != '"' and self._value != "null"
            if self.is_over:
                return None
            return None if self._name is None else self._begin(self._waiting)
        return None

    def _end_name(self) -> CallPart | None:
        self._name = _text_of(self._value)
        if not self._name or (self._names is not None and self._name not in self._names):
            self.is_over = True
            return None
        return None if self._waiting is None else self._begin(self._waiting)

    def _end(self) -> CallPart | None:
        self.is_over = True
        if self.has_begun or self._name is None or self._names is not None:
            return None
        return self._begin("{}")


def _text_of(quoted: str) -> str:
    """The text of a JSON string; as it stands where it is none."""
    try:
        return str(json.loads(quoted, strict=False))
    except ValueError:
        return quoted[1:-1]
