"""Requests that ended engines by themselves, so that sending them again does not end the next one.

Clients retry on a 500. A request counts as the same where prompt and parameters are, whatever seed was drawn.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

import msgspec

from app.core.types import EngineRequest

MAX_ENTRIES = 1024
QUARANTINE_SECONDS = 600.0


class Quarantine:
    """The last MAX_ENTRIES convicted requests, as digests, each for QUARANTINE_SECONDS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def put(self, request: EngineRequest) -> None:
        """Keep this request out from now on."""
        self._until[_digest(request)] = self._clock() + QUARANTINE_SECONDS
        while len(self._until) > MAX_ENTRIES:
            self._until.popitem(last=False)

    def holds(self, request: EngineRequest) -> bool:
        """Whether this request is kept out. Costs nothing while nobody is."""
        now = self._clock()
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        return bool(self._until) and _digest(request) in self._until


def _digest(request: EngineRequest) -> bytes:
    params = msgspec.structs.replace(request.params, seed=0)
    return blake2b(msgspec.msgpack.encode((request.prompt_token_ids, params)), digest_size=16).digest()
