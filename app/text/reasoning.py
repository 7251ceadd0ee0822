"""Owns the split of what a model thinks from what it answers: text between tags, before the answer.

Whether an answer begins in reasoning is decided by its prompt: templates open the tag themselves, close it where
thinking is switched off, or leave it to the model. White space at the ends of both parts is dropped, as templates do
where they show a turn again. What looks like a tag behind the first end of reasoning is text.

Invariant: what is found does not depend on how the text was split.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import NamedTuple

_SPACE = " \t\r\n"


class Start(Enum):
    """Where an output begins."""

    INSIDE = auto()
    """In reasoning."""
    OPEN = auto()
    """The model decides: with the tag it reasons."""
    OVER = auto()
    """Behind its reasoning, or in an answer that is gone on with."""


class ReasoningStep(NamedTuple):
    """What a push released."""

    reasoning: str
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningForm:
    """How a family writes its reasoning."""

    opening: str
    closing: str
    is_assumed: bool = False
    """An output that could be either is reasoning, although no tag opens it."""

    def start_after(self, prompt: str, *, continued: str = "") -> Start:
        """Where the output of a prompt begins; `continued` is the answer that the prompt goes on with."""
        if continued.strip():
            return Start.INSIDE if continued.rfind(self.opening) > continued.rfind(self.closing) else Start.OVER
        end = prompt.rstrip()
        if end.endswith(self.opening):
            return Start.INSIDE
        if end.endswith(self.closing):
            return Start.OVER
        return Start.INSIDE if self.is_assumed else Start.OPEN


FORMS: Mapping[str, ReasoningForm] = MappingProxyType(
    {
        "qwen3": ReasoningForm("<think>", "</think>"),
        "deepseek_r1": ReasoningForm("<think>", "</think>", is_assumed=True),
    }
)
"""By the names of vLLM's parsers."""


class _Place(Enum):
    BEFORE = auto()
    """Nothing but white space, or the beginning of a tag."""
    REASONING = auto()
    BETWEEN = auto()
    """White space behind the tag that ends it."""
    ANSWER = auto()


class ReasoningParser:
    """The two parts of one output."""

    def __init__(self, form: ReasoningForm, start: Start) -> None:
        self._form = form
        self._is_inside = start is Start.INSIDE
        self._place = _Place.ANSWER if start is Start.OVER else _Place.BEFORE
        self._held = ""
        self._is_first = True
        """No reasoning was released: white space is dropped."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the output is in its reasoning, as far as is known."""
        return self._place is _Place.REASONING or (self._place is _Place.BEFORE and self._is_inside)

    def push(self, text: str) -> ReasoningStep:
        """Take the next text."""
        if self._place is _Place.ANSWER:
            return ReasoningStep("", text)
        self._held += text
        reasoning = ""
        if self._place is _Place.BEFORE:
            self._begin()
        if self._place is _Place.REASONING:
            reasoning = self._reason()
        if self._place is _Place.BETWEEN:
            self._held = self._held.lstrip(_SPACE)
            if self._held:
                self._place = _Place.ANSWER
        if self._place is not _Place.ANSWER:
            return ReasoningStep(reasoning, "")
        answer, self._held = self._held, ""
        return ReasoningStep(reasoning, answer)

    def finish(self) -> ReasoningStep:
        """What was held back, when the output ends."""
        held, self._held = self._held, ""
        if self.is_reasoning:
            return ReasoningStep(held.rstrip(_SPACE), "")
        return ReasoningStep("", held if self._place is _Place.BEFORE else "")

    def _begin(self) -> None:
        """Find out what the output begins with. A tag that a template opened already may come again."""
        opening = self._form.opening
        begun = self._held.lstrip(_SPACE)
        if begun.startswith(opening):
            self._place, self._held = _Place.REASONING, begun[len(opening) :].lstrip(_SPACE)
        elif begun and not opening.startswith(begun):
            self._place = _Place.REASONING if self._is_inside else _Place.ANSWER
            self._held = begun if self._is_inside else self._held

    def _reason(self) -> str:
        """The reasoning that is certain to be some. White space waits for what follows it."""
        closing = self._form.closing
        if self._is_first:
            self._held = self._held.lstrip(_SPACE)
        before, found, behind = self._held.partition(closing)
        if found:
            self._place, self._held = _Place.BETWEEN, behind
            return before.rstrip(_SPACE)
        size = next((size for size in range(len(closing) - 1, 0, -1) if before.endswith(closing[:size])), 0)
        certain = before[: len(before) - size].rstrip(_SPACE)
        self._held = self._held[len(certain) :]
        self._is_first = self._is_first and not certain
        return certain
