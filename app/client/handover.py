"""What goes to the next engine in which parts, and who is blamed for the death of the last one. Pure.

Blame is proved, not counted. A death that came from inside puts every sequence that was being computed on
probation: the step's, and the one whose grammar was prepared beside it. The next engine computes each of them in
steps of its own until it has brought a token (`app.scheduler.probation`), and prepares its grammar while nothing
else is done, so that whoever ends that engine too stands on the progress page alone. A death that came from outside
(somebody's kill -9 or SIGSTOP) blames nobody.
"""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from app.client.journal import LiveSequence
from app.core.types import EngineRequest

MAX_PART_BYTES = 16 * 1024 * 1024
"""Encoded requests in one Add message: far below the frame limit, so that only a lone request can exceed that."""


class Blame(msgspec.Struct, frozen=True):
    """What a death says about the sequences."""

    suspects: tuple[LiveSequence, ...] = ()
    """Put on probation."""
    convicted: LiveSequence | None = None
    """Its lone step ended an engine that had been started after it was suspected."""

    @property
    def explains_death(self) -> bool:
        """One suspect alone, who gets another chance: the engine itself need not be broken."""
        return len(self.suspects) == 1 and self.convicted is None


def blame(live: Iterable[LiveSequence], keys_at_work: Sequence[int], *, is_self_inflicted: bool) -> Blame:
    """Put those that were being computed on probation, or convict the one that was tried alone.

    `keys_at_work` are those of the progress page, each once; none where nothing was computed.
    """
    if not is_self_inflicted:
        return Blame()
    keys = frozenset(keys_at_work)
    suspects = tuple(sequence for sequence in live if sequence.key in keys)
    if len(keys_at_work) == 1 and suspects and suspects[0].is_on_probation:
        return Blame(convicted=suspects[0])
    for sequence in suspects:
        sequence.is_on_probation = True
    return Blame(suspects)


def suspects_first(live: Iterable[LiveSequence]) -> list[LiveSequence]:
    """In the order in which a new engine gets them: it tries suspects before it begins anything else."""
    return sorted(live, key=lambda sequence: not sequence.is_on_probation)


def in_parts(
    requests: Iterable[EngineRequest], *, max_bytes: int = MAX_PART_BYTES
) -> Iterator[tuple[EngineRequest, ...]]:
    """Requests in groups of at most `max_bytes` bytes as they are sent, or of one."""
    part: list[EngineRequest] = []
    num_bytes = 0
    for request in requests:
        size = len(msgspec.msgpack.encode(request))
        if part and num_bytes + size > max_bytes:
            yield tuple(part)
            part, num_bytes = [], 0
        part.append(request)
        num_bytes += size
    if part:
        yield tuple(part)
