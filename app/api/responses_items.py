"""The output items of one response, built from what its sequence says, with the events that tell of it.

Whole answers are built by the same steps as streams, so that they say the same.

Invariants: items are numbered from 0 in the order of the text; one is open at a time, and each is closed; the
joined deltas of an item are what it says at its end.
"""

import secrets
from collections.abc import Callable, Sequence

import msgspec

from app.api.schemas.chat import ChatTokenLogprob
from app.api.schemas.responses import (
    FunctionCall,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningPart,
)
from app.api.schemas.responses_events import (
    CallArgumentsDelta,
    CallArgumentsDone,
    ContentPartAdded,
    ContentPartDone,
    Event,
    OutputItemAdded,
    OutputItemDone,
    OutputTextDelta,
    OutputTextDone,
    ReasoningTextDelta,
    ReasoningTextDone,
)
from app.text.tools import CallDelta


class OutputItems:
    """The items so far."""

    def __init__(self, call_id_of: Callable[[int], str]) -> None:
        """`call_id_of` tells the id of call 0, 1, ..."""
        self._call_id_of = call_id_of
        self.items: list[OutputItem] = []
        """Those that are closed."""
        self._open: OutputItem | None = None
        self._parts: list[str] = []
        """Of the open item's text or arguments."""
        self._logprobs: list[ChatTokenLogprob] = []
        """Of the open message."""

    def add_reasoning(self, text: str) -> list[Event]:
        """More reasoning."""
        events: list[Event] = []
        item = self._open
        if not isinstance(item, ReasoningItem):
            item = ReasoningItem(id=_new_id("rs"), content=[], status="in_progress")
            events = self._begin(item)
            events.append(ContentPartAdded(item_id=item.id, output_index=self._index, part=ReasoningPart(text="")))
        self._parts.append(text)
        events.append(ReasoningTextDelta(item_id=item.id, output_index=self._index, delta=text))
        return events

    def add_text(self, text: str, logprobs: Sequence[ChatTokenLogprob] = ()) -> list[Event]:
        """More of the answer."""
        events: list[Event] = []
        item = self._open
        if not isinstance(item, OutputMessage):
            item = OutputMessage(id=_new_id("msg"), content=[], status="in_progress")
            events = self._begin(item)
            events.append(ContentPartAdded(item_id=item.id, output_index=self._index, part=OutputText(text="")))
        self._parts.append(text)
        self._logprobs += logprobs
        events.append(OutputTextDelta(item_id=item.id, output_index=self._index, delta=text, logprobs=list(logprobs)))
        return events

    def add_call(self, delta: CallDelta) -> list[Event]:
        """More of a call: its first delta has its name."""
        events: list[Event] = []
        item = self._open
        if delta.name is not None:
            call_id = self._call_id_of(delta.call)
            item = FunctionCall(id=_new_id("fc"), call_id=call_id, name=delta.name, arguments="", status="in_progress")
            events = self._begin(item)
        assert isinstance(item, FunctionCall), "text stands behind all of a call's arguments"
        if delta.arguments:
            self._parts.append(delta.arguments)
            events.append(CallArgumentsDelta(item_id=item.id, output_index=self._index, delta=delta.arguments))
        return events

    def close(self, status: ItemStatus) -> list[Event]:
        """The open item, if any, is over."""
        item = self._open
        if item is None:
            return []
        index, text = self._index, "".join(self._parts)
        item.status = status
        events = self._end(item, index, text)
        events.append(OutputItemDone(output_index=index, item=item))
        self.items.append(item)
        self._open, self._parts, self._logprobs = None, [], []
        return events

    @property
    def _index(self) -> int:
        """Of the open item."""
        return len(self.items)

    def _begin(self, item: OutputItem) -> list[Event]:
        events = self.close("completed")
        self._open = item
        # A copy: events are encoded when the item may be over already.
        events.append(OutputItemAdded(output_index=self._index, item=msgspec.structs.replace(item)))
        return events

    def _end(self, item: OutputItem, index: int, text: str) -> list[Event]:
        """Put the text into the item; the events that say that it is all."""
        if isinstance(item, FunctionCall):
            item.arguments = text
            return [CallArgumentsDone(item_id=item.id, output_index=index, name=item.name, arguments=text)]
        if isinstance(item, ReasoningItem):
            thought = ReasoningPart(text=text)
            item.content = [thought]
            return [
                ReasoningTextDone(item_id=item.id, output_index=index, text=text),
                ContentPartDone(item_id=item.id, output_index=index, part=thought),
            ]
        part = OutputText(text=text, logprobs=self._logprobs)
        item.content = [part]
        return [
            OutputTextDone(item_id=item.id, output_index=index, text=text, logprobs=self._logprobs),
            ContentPartDone(item_id=item.id, output_index=index, part=part),
        ]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
