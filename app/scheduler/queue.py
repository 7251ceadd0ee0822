"""The waiting queue: who is admitted next. Sorted at all times, so that the front is exact and removal cheap."""

from bisect import bisect_left, insort

from app.scheduler.sequence import Sequence


class WaitingQueue:
    """Sequences in the order of `Sequence.queue_key`, which must not change while they wait here."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def front(self) -> Sequence | None:
        """Who is next, or None."""
        return self._sequences[0] if self._sequences else None

    def push(self, sequence: Sequence) -> None:
        """Put it where its key belongs."""
        insort(self._sequences, sequence, key=_key)

    def discard(self, sequence: Sequence) -> bool:
        """Take it out; False where it is not here."""
        index = bisect_left(self._sequences, sequence.queue_key, key=_key)
        if index == len(self._sequences) or self._sequences[index] is not sequence:
            return False
        del self._sequences[index]
        return True


def _key(sequence: Sequence) -> tuple[bool, int, int]:
    return sequence.queue_key
