"""Sequences on probation: who computes alone, and when.

The client puts a sequence on probation when an engine died in a step that computed it. Here such a sequence
runs in steps of its own, one such sequence at a time, until it has brought a token: if the engine dies in one of
these steps, the progress page names this sequence alone. Lone steps and steps of all others take turns.

Invariants: at most one running sequence is on probation, the trial; a step that computes it computes nobody else.
"""

from app.scheduler.queue import WaitingQueue
from app.scheduler.sequence import Sequence
from app.scheduler.shares import Shares


class Probation:
    """The queue of those on probation, and the one whose turn it is."""

    def __init__(self) -> None:
        self._queue = WaitingQueue(Shares(1))  # tried in turn: no share is counted
        self._was_lone = False
        self.trial: Sequence | None = None
        """The one that runs."""
        self.lacks_room = False
        """The front of the queue found no row or too few blocks: whoever else waits must not take what comes free."""

    def __len__(self) -> int:
        """How many wait."""
        return len(self._queue)

    @property
    def front(self) -> Sequence | None:
        """Who is tried next, or None."""
        return self._queue.front

    def push(self, sequence: Sequence) -> None:
        """Let it wait for its trial."""
        self._queue.push(sequence)

    def discard(self, sequence: Sequence) -> bool:
        """Take one out that waits; False where it does not wait here."""
        self.lacks_room = False
        return self._queue.discard(sequence)

    def end(self, sequence: Sequence) -> None:
        """It brought a token, or runs no more."""
        if self.trial is sequence:
            self.trial = None

    def turns(self) -> tuple[bool, ...]:
        """Kinds of step to try, in this order, until one has work; True is a lone one."""
        if self.trial is None and not len(self._queue):
            return (False,)
        return (False, True) if self._was_lone else (True, False)

    def note_step(self, *, is_lone: bool) -> None:
        """A step of this kind was planned."""
        self._was_lone = is_lone


def num_lone_tokens(sequence: Sequence, num_tokens: int) -> int:
    """How many of `num_tokens` that fit a lone step to compute: the last token received is decoded by itself.

    So that the trial repeats the step that it was suspected in: with the same context, and as a decode.
    """
    end = sequence.num_computed_tokens + num_tokens
    has_output = len(sequence.token_ids) > sequence.num_prompt_tokens
    return num_tokens - 1 if has_output and num_tokens > 1 and end == len(sequence.token_ids) else num_tokens
