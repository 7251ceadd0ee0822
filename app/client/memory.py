"""The memfds that outlive engines: who makes them, when they are dropped, when they go.

Their contents belong to the engines; this process holds descriptors and maps nothing, so the memory is
counted once, where it was written. It goes when the last descriptor and the last engine are gone: at the latest
when this process ends, in whatever way.
"""

import logging
import os

from app.core.memory import KeptMemory

logger = logging.getLogger("headwater.client")


class MemoryKeeper:
    """Descriptors for engines, made when first asked for. The owner closes it."""

    def __init__(self) -> None:
        self._weights: int | None = None
        self._kv: tuple[int, int] | None = None
        """Pool and block record: made together, dropped together."""

    def descriptors(self) -> tuple[int, ...]:
        """Weights, KV pool and block record, or none where this machine gives no memfds: engines do without."""
        try:
            if self._weights is None:
                self._weights = _create("headwater-weights")
            if self._kv is None:
                pool = _create("headwater-kv")
                try:
                    self._kv = (pool, _create("headwater-blocks"))
                except OSError:
                    os.close(pool)
                    raise
        except (OSError, AttributeError) as error:
            logger.info("no memory can outlive an engine: %s", error)
            return ()
        return (self._weights, *self._kv)

    def retain(self, kept: KeptMemory) -> None:
        """Drop what the engine that is ready does not keep: it holds nothing, or what belongs to another model."""
        if not kept.has_weights:
            self._drop_weights()
        if not kept.has_kv:
            self.drop_kv()

    def drop_kv(self) -> None:
        """What stands in the KV pool is not to be believed, or its memory is needed."""
        for descriptor in self._kv or ():
            os.close(descriptor)
        self._kv = None

    def drop(self) -> None:
        """Nothing is to be believed: the next engine starts as the first one did."""
        self.drop_kv()
        self._drop_weights()

    def close(self) -> None:
        """Give everything back. Harmless the second time."""
        self.drop()

    def _drop_weights(self) -> None:
        if self._weights is not None:
            os.close(self._weights)
        self._weights = None


def _create(name: str) -> int:
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
