"""Memory that outlives an engine process: what an engine is given of it, and what it made of that.

The API process makes memfds and keeps them open; each engine gets their descriptors with its first
message. Nothing is in them but what an engine can compute anew.
"""

from collections.abc import Sequence

import msgspec


class EngineMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors of the memfds, in the engine process. None: there is none, memory is the engine's own."""

    weights: int | None = None
    """Packed weights: written once, then sealed."""
    kv: int | None = None
    """The KV pool."""
    blocks: int | None = None
    """Which blocks of the pool are sealed, and under which hash. Replaced together with `kv`, never alone."""

    @classmethod
    def of(cls, descriptors: Sequence[int]) -> "EngineMemory":
        """From the descriptors that came, all three or none. Raises ValueError."""
        if not descriptors:
            return cls()
        weights, kv, blocks = descriptors
        return cls(weights=weights, kv=kv, blocks=blocks)


class KeptMemory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine keeps where the next one finds it, and what it found itself."""

    has_weights: bool = False
    has_kv: bool = False
    has_adopted_weights: bool = False
    """They were packed by an earlier engine."""
    num_adopted_blocks: int = 0
    """Sealed KV blocks that an earlier engine computed."""
    reason: str = ""
    """Why something is not kept, in one clause."""
