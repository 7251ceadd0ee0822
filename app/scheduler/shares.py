"""Who has been served how much: one counter a tenant, of tokens over weight.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): of the tenants
that wait, the one with the least counter goes next. What is counted is what the engine did: each token computed, and
each one drawn once more, so that output costs twice what a prompt does, and cached prefixes nothing.

A tenant that begins to wait is lifted to the least counter of those that wait already, or, where nobody does, to that
of the tenant that was let in last: not having asked earns nothing. So counters also start level after a restart.

Tenants with names also share the prompt tokens of a step, by weight, among those that were served in the last ten
seconds: so one tenant's long prompts do not make every step as long as steps may be, and another's first token late.

Invariant: of two tenants that wait all the while, neither is served more than the other, over its weight, by more
than a constant (a step's budget and one sequence's tokens over the least weight), however many requests either sends.
"""

from collections.abc import Iterable

RECENT_SECONDS = 10.0
MAX_TENANTS = 4096
"""Counters kept before some are forgotten."""


class Shares:
    """The counters of one scheduler."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._max_counters = MAX_TENANTS
        self._last = 0.0
        """The counter of the tenant that was let in last, as it was then."""
        self._now = 0.0
        self._recent: dict[str, tuple[float, float]] = {}
        """When each tenant was served last, and its weight."""
        self._used: dict[str, int] = {}
        """Prompt tokens that each has in this step."""

    def begin_step(self, now: float) -> None:
        """A step is planned at this time."""
        self._now = now
        self._used.clear()
        if len(self._recent) > 1:
            oldest = now - RECENT_SECONDS
            self._recent = {tenant: seen for tenant, seen in self._recent.items() if seen[0] >= oldest}

    def charge(self, tenant: str, num_tokens: int, *, weight: float, is_prompt: bool = False) -> None:
        """The engine works on so many tokens of this tenant's."""
        self._counters[tenant] = self._counters.get(tenant, 0.0) + num_tokens / weight
        self._recent[tenant] = (self._now, weight)
        if is_prompt:
            self._used[tenant] = self._used.get(tenant, 0) + num_tokens

    def prompt_tokens_left(self, tenant: str, budget: int, *, least: int) -> int:
        """Of the step's budget, for prompts of this tenant: `least` at least in each step."""
        if not tenant or len(self._recent) < 2 or tenant not in self._recent:
            return budget
        total = sum(weight for _, weight in self._recent.values())
        share = max(least, int(budget * self._recent[tenant][1] / total))
        return max(0, share - self._used.get(tenant, 0))

    def lift(self, tenant: str, waiting: Iterable[str]) -> None:
        """The tenant begins to wait, beside those of `waiting`."""
        level = min(map(self.of, waiting), default=self._last)
        self._counters[tenant] = max(level, self.of(tenant))

    def note_entry(self, tenant: str) -> None:
        """A sequence of this tenant leaves the queue."""
        self._last = self.of(tenant)

    def of(self, tenant: str) -> float:
        """The tenant's counter."""
        return self._counters.get(tenant, 0.0)

    def forget_some(self, live: Iterable[str]) -> None:
        """Where there are many counters, forget the smallest of tenants that are not `live`: they would be lifted most.

        Live ones wait or run: theirs are compared and set the level. Called before each new sequence, at little cost.
        """
        if len(self._counters) <= self._max_counters:
            return
        idle = self._counters.keys() - frozenset(live)
        for tenant in sorted(idle, key=self.of)[: -MAX_TENANTS // 2]:
            del self._counters[tenant]
        self._max_counters = max(MAX_TENANTS, 2 * len(self._counters))
