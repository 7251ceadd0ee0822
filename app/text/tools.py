"""Owns the finding of tool calls in a stream of text, in the two forms in which models write them.

- tagged (Hermes, Qwen): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere in the text;
- bare (Llama, Mistral): the text is nothing but such objects, or a list of them, with `arguments` or
  `parameters`. Only the names of known tools count there: JSON may be the answer itself.

Arguments are passed on as the model wrote them, whether they are valid JSON or not. What begins like a call
and turns out to be none is text, whole. White space before a call, and at the end behind one, is dropped.

Invariant: what is found does not depend on how the text was split.
"""

import json
from collections.abc import Collection
from enum import Enum, StrEnum, auto
from typing import NamedTuple

from app.text.call_reader import SPACE, CallReader

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"
_SEPARATORS = SPACE + ",;"
_SLIPS = SPACE + "}"
"""A brace too many behind a call is the commonest slip of small models."""


class CallForm(StrEnum):
    """How calls are written."""

    TAGGED = "tagged"
    BARE = "bare"


class CallFrame(NamedTuple):
    """What stands around the arguments of a call."""

    before: str
    after: str


class CallDelta(NamedTuple):
    """What a push added to a call."""

    call: int
    """Which one: 0, 1, ..."""
    name: str | None
    """With the first delta of a call."""
    arguments: str
    """More of their JSON text."""


class ToolStep(NamedTuple):
    """What a push brought: text for the reader, and calls, at most one delta for each."""

    text: str
    calls: tuple[CallDelta, ...]


def call_frame(form: CallForm, name: str) -> CallFrame:
    """A call of the tool `name` as models of this form write it."""
    quoted = json.dumps(name, ensure_ascii=False)
    if form is CallForm.TAGGED:
        return CallFrame(f'{OPEN_TAG}\n{{"name": {quoted}, "arguments": ', f"}}\n{CLOSE_TAG}")
    return CallFrame(f'{{"name": {quoted}, "parameters": ', "}")


class _State(Enum):
    START = auto()
    """Nothing but white space yet."""
    TEXT = auto()
    CALL = auto()
    """In an object that may be a call."""
    BETWEEN = auto()
    """Behind one: another, or the end of its tag or list."""
    DONE = auto()
    """Behind the only call that was asked for."""


class ToolParser:
    """The calls in one stream."""

    def __init__(self, names: Collection[str], *, single: bool = False) -> None:
        """`names` are those of the tools; with `single` the text ends with the first call."""
        self._names = frozenset(names)
        self._single = single
        self._state = _State.START
        self._form = CallForm.TAGGED
        self._space = ""
        """White space that is text, unless a call follows."""
        self._tag = ""
        """The beginning of a tag, or what stands between calls."""
        self._reader = CallReader(None)
        self._returned: list[str] = []
        """Characters of what was no call."""
        self._text: list[str] = []
        self._calls: dict[int, CallDelta] = {}
        self.num_calls = 0

    @property
    def has_calls(self) -> bool:
        """Whether a call was found, if only its beginning."""
        return self.num_calls > 0 or (self._state is _State.CALL and self._reader.has_begun)

    def push(self, text: str) -> ToolStep:
        """Take the next text."""
        self._read(text)
        return self._step()

    def finish(self) -> ToolStep:
        """What was held back, when the stream ends."""
        while self._state is _State.CALL and not self._reader.has_begun:
            self._give_back()
            self._read("")
        if self._state in (_State.START, _State.TEXT) or not self.has_calls:
            if self._tag or not self.has_calls:
                self._text.append(self._space)
            self._text.append(self._tag)
            self._space = self._tag = ""
        return self._step()

    def _read(self, text: str) -> None:
        """Character by character; what is given back is read again, before the rest."""
        rest = [*reversed(text), *reversed(self._returned)]
        self._returned = []
        while rest:
            self._take(rest.pop())
            if self._returned:
                rest += reversed(self._returned)
                self._returned = []

    def _step(self) -> ToolStep:
        step = ToolStep("".join(self._text), tuple(self._calls.values()))
        self._text, self._calls = [], {}
        return step

    def _take(self, char: str) -> None:
        match self._state:
            case _State.START:
                self._take_first(char)
            case _State.TEXT:
                self._take_text(char)
            case _State.CALL:
                self._take_call(char)
            case _State.BETWEEN:
                self._take_between(char)
            case _:
                pass  # behind the only call that was asked for

    def _take_first(self, char: str) -> None:
        if char in SPACE:
            self._space += char
        elif char == "[":
            self._form, self._tag, self._state = CallForm.BARE, char, _State.BETWEEN
        elif char == "{":
            self._form = CallForm.BARE
            self._open(char)
        else:
            self._state = _State.TEXT
            self._take_text(char)

    def _take_text(self, char: str) -> None:
        if char == OPEN_TAG[len(self._tag)]:
            self._tag += char
            if self._tag == OPEN_TAG:
                self._form = CallForm.TAGGED
                self._open("")
            return
        if self._tag:
            self._text += (self._space, self._tag)
            self._space = self._tag = ""
            self._take_text(char)
        elif char in SPACE:
            self._space += char
        else:
            self._text += (self._space, char)
            self._space = ""

    def _take_call(self, char: str) -> None:
        reader = self._reader
        delta = reader.take(char)
        if delta is not None:
            index = self.num_calls
            known = self._calls.get(index, CallDelta(index, None, ""))
            name = delta.name if known.name is None else known.name
            self._calls[index] = CallDelta(index, name, known.arguments + delta.arguments)
        if reader.is_over:
            if not reader.has_begun:
                self._give_back()
                return
            self.num_calls += 1
            self._space = self._tag = ""
            self._state = _State.DONE if self._single else _State.BETWEEN
            if reader.is_broken:
                self._take(char)

    def _take_between(self, char: str) -> None:
        if char == "{" and (not self._tag or self._form is CallForm.BARE):
            self._open(char)
        elif self._form is CallForm.TAGGED:
            self._take_close_tag(char)
        elif not self.num_calls and char in SPACE:
            self._tag += char  # of a list that has only begun
        elif self.num_calls and char == "]":
            self._state = _State.TEXT
        elif not self.num_calls or char not in _SEPARATORS:
            self._leave(char)

    def _take_close_tag(self, char: str) -> None:
        if char == CLOSE_TAG[len(self._tag)]:
            self._tag += char
            if self._tag == CLOSE_TAG:
                self._tag, self._state = "", _State.TEXT
        elif self._tag or char not in _SLIPS:
            self._leave(char)

    def _leave(self, char: str) -> None:
        """What stood between was no end of a call: it is text, and so is what follows."""
        self._text += (self._space, self._tag)
        self._space = self._tag = ""
        self._state = _State.TEXT
        self._take_text(char)

    def _open(self, char: str) -> None:
        """An object begins, with `char` or behind a tag."""
        self._reader = CallReader(self._names if self._form is CallForm.BARE else None)
        self._state = _State.CALL
        if char:
            self._reader.take(char)

    def _give_back(self) -> None:
        """The object was no call: all of it is text, in which calls may stand."""
        self._text += (self._space, self._tag)
        self._space = self._tag = ""
        self._state = _State.TEXT
        self._returned = self._reader.raw
