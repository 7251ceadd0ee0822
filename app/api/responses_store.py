"""Responses that can be read and gone on with: in memory, bounded, each key's apart from the others'.

A response is kept with what its turn added to the conversation and a reference to the turn before, so that a long
conversation is held once. A turn lives as long as a response that leads through it.

Invariants: never more responses or bytes than the limits; where they are reached, the key that holds most gives up
its oldest; a response of one key is not there for another. Used by one event loop's thread.
"""

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

Message = dict[str, object]
MAX_RESPONSES = 1000
MAX_BYTES = 64 * 1024 * 1024
_OVERHEAD_BYTES = 1024
"""Of a response and its turn, beside their texts."""


class Turn:
    """What one response added to a conversation, and what went before."""

    __slots__ = ("_messages", "num_bytes", "num_users", "previous")

    def __init__(self, messages: list[Message], previous: "Turn | None") -> None:
        """`messages` as chat templates read them: the input of the turn and its output."""
        self._messages = msgspec.json.encode(messages)
        self.previous = previous
        self.num_bytes = len(self._messages) + _OVERHEAD_BYTES
        self.num_users = 0
        """Responses and turns that refer to it."""

    def conversation(self) -> list[Message]:
        """All messages up to the end of this turn."""
        turns: list[bytes] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn._messages)
            turn = turn.previous
        return [message for turn in reversed(turns) for message in msgspec.json.decode(turn, type=list[Message])]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response."""

    body: bytes
    """As JSON."""
    input: bytes
    """What was sent as the request's input, as JSON."""
    turn: Turn

    @property
    def num_bytes(self) -> int:
        """Without its turn, which others may share."""
        return len(self.body) + len(self.input)


class ResponseStore:
    """The stored responses of all keys."""

    def __init__(self, *, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        """With a limit of 0, nothing is stored."""
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._tenants: dict[str, OrderedDict[str, StoredResponse]] = {}
        self._num_tenant_bytes: dict[str, int] = {}
        self.num_responses = 0
        self.num_bytes = 0

    @property
    def is_on(self) -> bool:
        """Whether anything is stored."""
        return self._max_responses > 0 and self._max_bytes > 0

    def find(self, tenant: str, response_id: str) -> StoredResponse | None:
        """The tenant's response, which counts as used now."""
        held = self._tenants.get(tenant, OrderedDict())
        found = held.get(response_id)
        if found is not None:
            held.move_to_end(response_id)
        return found

    def add(self, tenant: str, response_id: str, response: StoredResponse) -> None:
        """Store it; others make room. One that alone exceeds the limits is not stored."""
        size = response.num_bytes + response.turn.num_bytes
        if not self.is_on or size > self._max_bytes:
            return
        self._tenants.setdefault(tenant, OrderedDict())[response_id] = response
        self.num_responses += 1
        self._count(tenant, response.num_bytes)
        self._use(tenant, response.turn)
        while self.num_responses > self._max_responses or self.num_bytes > self._max_bytes:
            largest = max(self._num_tenant_bytes, key=self._num_tenant_bytes.__getitem__)
            self.remove(largest, next(iter(self._tenants[largest])))

    def remove(self, tenant: str, response_id: str) -> bool:
        """Forget it. Conversations that went on from it stay whole. False: it was not there."""
        held = self._tenants.get(tenant)
        response = None if held is None else held.pop(response_id, None)
        if held is None or response is None:
            return False
        self.num_responses -= 1
        self._count(tenant, -response.num_bytes)
        self._leave(tenant, response.turn)
        if not held:
            del self._tenants[tenant], self._num_tenant_bytes[tenant]
        return True

    def _use(self, tenant: str, turn: Turn) -> None:
        """The turn, and where nothing referred to it yet or any more, those before."""
        one: Turn | None = turn
        while one is not None:
            one.num_users += 1
            if one.num_users > 1:
                return
            self._count(tenant, one.num_bytes)
            one = one.previous

    def _leave(self, tenant: str, turn: Turn) -> None:
        one: Turn | None = turn
        while one is not None:
            one.num_users -= 1
            if one.num_users > 0:
                return
            self._count(tenant, -one.num_bytes)
            one = one.previous

    def _count(self, tenant: str, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._num_tenant_bytes[tenant] = self._num_tenant_bytes.get(tenant, 0) + num_bytes
