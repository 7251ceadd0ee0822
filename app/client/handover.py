"""The order in which live sequences go to a new engine, and who is blamed for the death of the old one.

A sequence that was being computed when an engine died, and of which no token had come since it was
handed over, gets a strike; a token takes its strikes back. Sequences without strikes go to the next
engine at once. Those with strikes go one by one, each when the one before has brought a token, fewest
strikes first: so the innocent pass, and the one that ends engines is soon alone with its strikes. At
`max_strikes` it ends with EngineFailed.

This is suspicion, not proof: others may compute in the step of the one on trial. Proof would be a
trial in an engine of its own.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from app.client.journal import LiveSequence


class Blame(msgspec.Struct, frozen=True):
    """What a death says about the sequences."""

    suspects: tuple[LiveSequence, ...]
    convicted: tuple[LiveSequence, ...]

    @property
    def explains_death(self) -> bool:
        """One suspect alone, who gets another chance: the engine itself need not be broken."""
        return len(self.suspects) == 1 and not self.convicted


def blame(live: Iterable[LiveSequence], keys_in_step: Sequence[int], *, max_strikes: int) -> Blame:
    """Give strikes to those in the step that did not end, as the progress page names them."""
    keys = frozenset(keys_in_step)
    suspects = tuple(sequence for sequence in live if sequence.key in keys and not sequence.has_progressed)
    for sequence in suspects:
        sequence.strikes += 1
    return Blame(suspects, tuple(sequence for sequence in suspects if sequence.strikes >= max_strikes))


class HandOver:
    """Hands the journal's sequences to one new engine."""

    def __init__(self) -> None:
        self._held: deque[LiveSequence] = deque()
        self._on_trial: LiveSequence | None = None

    @property
    def is_complete(self) -> bool:
        """Nobody is held back any more."""
        return not self._held

    def begin(self, live: Iterable[LiveSequence]) -> list[LiveSequence]:
        """Those to hand over now. Trials begin after the first step of the others."""
        self._on_trial = None
        sequences = list(live)
        self._held = deque(sorted((s for s in sequences if s.strikes), key=lambda s: s.strikes))
        clean = [sequence for sequence in sequences if not sequence.strikes]
        return clean or self.release()

    def release(self) -> list[LiveSequence]:
        """After a step, or after a sequence left: the next one to hand over, if it is its turn."""
        on_trial = self._on_trial
        if on_trial is not None and not (on_trial.has_progressed or on_trial.is_finished):
            return []
        while self._held:
            sequence = self._held.popleft()
            if not sequence.is_finished:
                self._on_trial = sequence
                return [sequence]
        return []
