"""An answer's events with a cursor in front of each, and none that the client has already.

Invariants: the cursor of an event stands behind all that this event and those before it say; a choice says nothing
until it is where the client's cursor stands, with the text and the tokens that the client has, by their digests.
"""

from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from app.api.answers import AnswerForm
from app.api.cursor import DIGEST_BYTES, ChoiceCursor, Cursor, ids_as_bytes
from app.api.errors import ResumeDiverged
from app.api.sequence_text import Delta, SequenceText

_BOUNDARY = b"\n\n"


class ResumableForm:
    """Wraps the form of one stream."""

    def __init__(self, form: AnswerForm, texts: Sequence[SequenceText], *, start: Cursor) -> None:
        """`start`: where the client stands; of a new stream nothing is sent yet."""
        self._form = form
        self._texts = texts
        self._head = start
        self._was_ended = start.is_ended
        self._choices = list(start.choices)
        """How far each is at the client, with the events made so far."""
        self._states = [_ChoiceState(choice) for choice in start.choices]
        self.has_diverged = False
        """A choice did not come to where the client is."""

    def event(self, index: int, delta: Delta) -> bytes:
        """The events of one delta. Raises ResumeDiverged where the choice does not come to where the client is."""
        state, before, text = self._states[index], self._choices[index], self._texts[index]
        state.add(delta)
        events = _split(self._form.event(index, delta))
        if state.is_behind:
            try:
                state.catch_up(index, is_finished=delta.finish_reason is not None)
            except ResumeDiverged:
                self.has_diverged = True
                raise
            return b""
        if before is not None and before.position == 0:
            events = events[1:]  # its opening was sent
        *openings, last = events or [b""]
        if openings:
            self._choices[index] = _ChoiceState(None).cursor(text.num_cached_tokens)
            openings = [_stamped(opening, self._cursor()) for opening in openings]
        cursor = state.cursor(text.num_cached_tokens)
        if delta.finish_reason is not None:
            num_reasoning = text.num_reasoning_tokens
            cursor = msgspec.structs.replace(cursor, is_finished=True, num_reasoning_tokens=num_reasoning)
        self._choices[index] = cursor
        return b"".join(openings) + (_stamped(last, self._cursor()) if last else b"")

    def end(self) -> bytes:
        """The last events."""
        self._head = msgspec.structs.replace(self._head, is_ended=True)
        cursor = self._cursor()
        events = _split(self._form.end())
        return b"".join([_stamped(event, cursor) for event in (events[-1:] if self._was_ended else events)])

    def failure(self, error: Exception) -> bytes:
        """The last events of a stream that fails. They have no cursor: the client stands where it stood."""
        return self._form.failure(error)

    def collect(self, index: int, delta: Delta) -> None:
        """Keep a delta for `whole`."""
        self._form.collect(index, delta)

    def whole(self) -> object:
        """The body of an answer that is not a stream."""
        return self._form.whole()

    def _cursor(self) -> bytes:
        return msgspec.structs.replace(self._head, choices=tuple(self._choices)).write().encode("ascii")


class _ChoiceState:
    """What one choice has said so far, and what it must have said before it says more."""

    __slots__ = ("_ids", "_position", "_target", "_text")

    def __init__(self, start: ChoiceCursor | None) -> None:
        self._position = 0
        self._text = blake2b(digest_size=DIGEST_BYTES)
        self._ids = blake2b(digest_size=DIGEST_BYTES)
        self._target = start if start is not None and start.position > 0 else None

    @property
    def is_behind(self) -> bool:
        """The client has what is said now."""
        return self._target is not None

    def add(self, delta: Delta) -> None:
        """Say it."""
        self._position += len(delta.token_ids)
        self._text.update((delta.reasoning + delta.text).encode())  # reasoning stands before all text
        self._ids.update(ids_as_bytes(delta.token_ids))

    def catch_up(self, index: int, *, is_finished: bool) -> None:
        """One step nearer to the client, or there. Raises ResumeDiverged."""
        target = self._target
        assert target is not None
        if self._position < target.position and not is_finished:
            return
        if is_finished or self.cursor(target.num_cached_tokens) != target:
            raise ResumeDiverged(
                f"Choice {index} said something else in its first {target.position} tokens than the client has of it, "
                "so it does not go on."
            )
        self._target = None

    def cursor(self, num_cached_tokens: int) -> ChoiceCursor:
        """For the client that has what was said so far, and it is not the end."""
        return ChoiceCursor(self._position, self._text.digest(), self._ids.digest(), num_cached_tokens)


def _split(data: bytes) -> list[bytes]:
    """Events one by one; JSON holds no newlines."""
    return [event + _BOUNDARY for event in data.split(_BOUNDARY) if event]


def _stamped(event: bytes, cursor: bytes) -> bytes:
    return b"id: %b\n%b" % (cursor, event)
