"""The waiting queue: who is admitted next. Sorted at all times, so that the front is exact and removal cheap.

Sequences that were preempted go first. Of the others the tenant with the least share so far is next
(`app.scheduler.shares`), and of its sequences the one with the least priority value, then the oldest: a priority
orders a tenant's own work, and gets nobody ahead of another tenant.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import chain

from app.scheduler.sequence import Sequence
from app.scheduler.shares import Shares


class WaitingQueue:
    """Sequences by tenant, each in the order of `Sequence.queue_key`, which must not change while they wait here."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._preempted: list[Sequence] = []
        self._by_tenant: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._by_tenant.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in no order that matters."""
        return chain(self._preempted, *self._by_tenant.values())

    @property
    def num_tenants(self) -> int:
        """How many wait."""
        return len(self._by_tenant)

    @property
    def tenants(self) -> Iterator[tuple[str, float]]:
        """Those that wait, each with its weight."""
        return ((tenant, waiting[0].request.weight) for tenant, waiting in self._by_tenant.items())

    @property
    def front(self) -> Sequence | None:
        """Who is next, or None."""
        return self.front_but(_nobody)

    def front_but(self, is_passed_over: Callable[[str], bool]) -> Sequence | None:
        """Who is next where some tenants are passed over, or None."""
        if self._preempted:
            return self._preempted[0]
        of = self._shares.of
        fronts = (waiting[0] for tenant, waiting in self._by_tenant.items() if not is_passed_over(tenant))
        return min(fronts, key=lambda sequence: (of(_tenant(sequence)), sequence.arrival), default=None)

    def push(self, sequence: Sequence) -> None:
        """Put it where its key belongs."""
        tenant = _tenant(sequence)
        if sequence.was_admitted:
            insort(self._preempted, sequence, key=_key)
        elif tenant in self._by_tenant:
            insort(self._by_tenant[tenant], sequence, key=_key)
        else:
            self._shares.lift(tenant, self._by_tenant)
            self._by_tenant[tenant] = [sequence]

    def discard(self, sequence: Sequence) -> bool:
        """Take it out; False where it is not here."""
        tenant = _tenant(sequence)
        waiting = self._preempted if sequence.was_admitted else self._by_tenant.get(tenant, [])
        index = bisect_left(waiting, sequence.queue_key, key=_key)
        if index == len(waiting) or waiting[index] is not sequence:
            return False
        del waiting[index]
        if not waiting and not sequence.was_admitted:
            del self._by_tenant[tenant]
        return True


def _nobody(_tenant: str) -> bool:
    return False


def _tenant(sequence: Sequence) -> str:
    return sequence.request.tenant


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.queue_key
