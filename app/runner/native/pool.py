"""The memory of the KV pool: the engine's own, or a memfd in which the next engine finds it.

A block's layers lie together, so that large pages are filled block by block. Memory is taken as blocks are first used:
one by one by the kernel, in a memfd by `reach`, piece by piece.
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.plan import PlanEntry
from app.runner.native.arena import Arena
from app.runner.native.mapping import LARGE_PAGE, NO_LARGE_PAGES, Mapping

_PIECE = 16 * LARGE_PAGE
"""Made ready at once, the first one while loading: about 22 blocks of the default model, of whose computing it takes
about a hundredth."""


class KVPool:
    """(num_blocks, num_layers, 2, elements of K or V) in `array`; zero where nothing was written."""

    def __init__(self, num_blocks: int, *, num_layers: int, num_elements: int, descriptor: int | None = None) -> None:
        """`num_elements`: of K, or of V, in a block of one layer. See `reason` for what became of `descriptor`."""
        self._block_bytes = num_layers * 2 * num_elements * 2
        self._ready_bytes = 0
        self.reason = ""
        """Why the pool is the engine's own although there is a memfd."""
        self._mapping = None if descriptor is None else self._map(descriptor, num_blocks * self._block_bytes)
        if self._mapping is None:
            arena = Arena(num_blocks * self._block_bytes, huge_pages=True)
        else:
            arena = Arena.within(self._mapping.bytes)
        flat = arena.take(num_blocks * num_layers * 2 * num_elements, np.uint16)
        self.array: NDArray[Any] = flat.reshape(num_blocks, num_layers, 2, num_elements)

    @property
    def is_kept(self) -> bool:
        """The next engine finds what is written here."""
        return self._mapping is not None

    def reach(self, entries: Iterable[PlanEntry]) -> None:
        """Blocks that these entries begin to write are about to be used."""
        if self._mapping is None:
            return
        end = 0
        for entry in entries:
            num_new = len(entry.block_table) if entry.start_row is not None else entry.num_new_blocks
            if num_new:
                end = max(end, max(entry.block_table[-num_new:]) + 1)
        if (num_bytes := end * self._block_bytes) > self._ready_bytes:
            self._make_ready(num_bytes)

    def _map(self, descriptor: int, num_bytes: int) -> Mapping | None:
        try:
            stat = os.fstat(descriptor)
            mapping = Mapping(descriptor, num_bytes, is_writable=True)
        except OSError as error:
            self.reason = f"the KV pool is the engine's own: {error.strerror}"
            return None
        # Block ids are handed out from 0 upwards, so what has memory is a beginning of the file.
        end = min(max(stat.st_blocks * 512, _PIECE), mapping.num_bytes)
        if not mapping.enlarge_pages(0, end):
            self.reason = f"the KV pool is the engine's own: {NO_LARGE_PAGES}"
            return None
        self._ready_bytes = end
        return mapping

    def _make_ready(self, num_bytes: int) -> None:
        assert self._mapping is not None
        end = min(-(-num_bytes // _PIECE) * _PIECE, self._mapping.num_bytes)
        self._mapping.enlarge_pages(self._ready_bytes, end)
        self._ready_bytes = end


def held_bytes(descriptor: int | None) -> int:
    """Memory that a memfd has already: counted as used, and there for the pool to take."""
    return 0 if descriptor is None else os.fstat(descriptor).st_blocks * 512
