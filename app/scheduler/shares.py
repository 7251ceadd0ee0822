"""Who has been served how much: one counter a tenant, of tokens over weight.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): of the tenants
that wait, the one with the least counter goes next. What is counted is what the engine did: each token computed, and
each one drawn once more, so that output costs twice what a prompt does, and cached prefixes nothing.

A tenant that begins to wait is lifted to the least counter of those that wait already, or, where nobody does, to that
of the tenant that was let in last: not having asked earns nothing. So counters also start level after a restart.

Tenants with names also share the prompt tokens of a step, by weight, among those that wait or were served in the last
two seconds. Counters say nothing of who could do with less: whoever comes is lifted to the level of who is there. So
beside them stands what each was served lately, forgotten at the same pace: a tenant with more of that than its part is
ahead. Its prompts yield to all others: they are computed in steps that have nobody else's, and a few tokens at a time,
so that who comes meanwhile waits for a short step. One that yields for long is not ahead any more.

Invariant: of two tenants that wait all the while, neither is served more than the other, over its weight, by more
than a constant (a step's budget and one sequence's tokens over the least weight), however many requests either sends.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

RECENT_SECONDS = 2.0
AHEAD = 1.1
"""Times its part of what was served lately that a tenant has at least where it is ahead."""
LEAST_AHEAD_PART = 4
"""Of a step's budget, as many parts: who was served less than one of them lately is not ahead, whatever others had."""
AHEAD_PART = 64
"""Of a step's budget, as many parts; one is for the prompts of a tenant that is ahead."""
AHEAD_TOKENS = 8
"""At least so many."""
MAX_TENANTS = 4096
"""Counters kept before some are forgotten."""


class _Recent(NamedTuple):
    """What a tenant was served lately."""

    at: float
    """When it was served last, or waited."""
    weight: float
    num_tokens: float
    """As of then: of earlier ones those are left that are not forgotten."""

    def left(self, now: float) -> float:
        """Tokens that are not forgotten by now."""
        return self.num_tokens * math.exp((self.at - now) / RECENT_SECONDS)


class Shares:
    """The counters of one scheduler."""

    def __init__(self, budget: int) -> None:
        """`budget`: tokens of a full step."""
        self._budget = budget
        self._counters: dict[str, float] = {}
        self._max_counters = MAX_TENANTS
        self._last = 0.0
        """The counter of the tenant that was let in last, as it was then."""
        self._now = 0.0
        self._recent: dict[str, _Recent] = {}
        self._ahead: frozenset[str] = frozenset()
        """As of this step's begin."""
        self._used: dict[str, int] = {}
        """Prompt tokens that each has in this step."""
        self._is_second_turn = False

    def begin_step(self, now: float, waiting: Iterable[tuple[str, float]]) -> None:
        """A step is planned at this time; `waiting` are the tenants that wait, each with its weight."""
        self._now = now
        self._used.clear()
        self._is_second_turn = False
        for tenant, weight in waiting:
            before = self._recent.get(tenant)
            self._recent[tenant] = _Recent(now, weight, 0.0 if before is None else before.left(now))
        if len(self._recent) > 1:
            oldest = now - RECENT_SECONDS
            self._recent = {tenant: seen for tenant, seen in self._recent.items() if seen.at >= oldest}
        self._ahead = self._find_ahead()

    def begin_second_turn(self) -> bool:
        """All others have what they need of this step: whoever is ahead may have some. False where nobody is."""
        self._is_second_turn = True
        return bool(self._ahead)

    def charge(self, tenant: str, num_tokens: int, *, weight: float, is_prompt: bool = False) -> None:
        """The engine works on so many tokens of this tenant's."""
        self._counters[tenant] = self._counters.get(tenant, 0.0) + num_tokens / weight
        before = self._recent.get(tenant)
        num_recent = num_tokens + (0.0 if before is None else before.left(self._now))
        self._recent[tenant] = _Recent(self._now, weight, num_recent)
        if is_prompt:
            self._used[tenant] = self._used.get(tenant, 0) + num_tokens

    def prompt_tokens_left(self, tenant: str, *, least: int) -> int:
        """Of a full step's tokens, for prompts of this tenant: `least` at least in each step, if it is not ahead."""
        if not tenant or len(self._recent) < 2 or tenant not in self._recent:
            return self._budget
        if tenant in self._ahead:
            if not self._is_second_turn or self._used.keys() - self._ahead:
                return 0
            share = max(AHEAD_TOKENS, self._budget // AHEAD_PART)
        else:
            total = sum(one.weight for one in self._recent.values())
            share = max(least, int(self._budget * self._recent[tenant].weight / total))
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

    def _find_ahead(self) -> frozenset[str]:
        if len(self._recent) < 2:
            return frozenset()
        served = {tenant: one.left(self._now) for tenant, one in self._recent.items()}
        part = AHEAD * sum(served.values()) / sum(one.weight for one in self._recent.values())
        least = self._budget / LEAST_AHEAD_PART
        return frozenset(
            tenant for tenant, one in self._recent.items() if served[tenant] > max(least, part * one.weight)
        )

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
