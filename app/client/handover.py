"""Who is blamed for the death of an engine. Pure.

Blame is proved, not counted. A death that came from inside puts every sequence of the step that did not end on
probation: the next engine computes each of them in steps of its own until it has brought a token
(`app.scheduler.probation`), so that whoever ends that engine too stands on the progress page alone. A death that
came from outside (somebody's kill -9 or SIGSTOP) blames nobody.
"""

from collections.abc import Iterable, Sequence

import msgspec

from app.client.journal import LiveSequence


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


def blame(live: Iterable[LiveSequence], keys_in_step: Sequence[int], *, is_self_inflicted: bool) -> Blame:
    """Put those in the step that did not end on probation, or convict the one that was tried in it.

    `keys_in_step` are those of the progress page, none where no step ran.
    """
    if not is_self_inflicted:
        return Blame()
    keys = frozenset(keys_in_step)
    in_step = tuple(sequence for sequence in live if sequence.key in keys)
    if len(keys_in_step) == 1 and in_step and in_step[0].is_on_probation:
        return Blame(convicted=in_step[0])
    for sequence in in_step:
        sequence.is_on_probation = True
    return Blame(in_step)
