"""Page-aligned memory that is handed out in cache-line-aligned pieces and given back as a whole."""

import mmap

import numpy as np
from numpy.typing import DTypeLike, NDArray

_LINE = 64
_HUGE = 2 << 20


class Arena:
    """One anonymous mapping of `num_bytes`, zero until written. Pieces keep it alive."""

    def __init__(self, num_bytes: int, *, huge_pages: bool) -> None:
        self.num_bytes = num_bytes
        mapping = mmap.mmap(-1, max(_LINE, num_bytes) + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)
        self._used = -self._bytes.ctypes.data % _HUGE if num_bytes >= _HUGE else 0
        self._end = self._used + num_bytes

    @classmethod
    def within(cls, memory: NDArray[np.uint8]) -> "Arena":
        """Over memory that is there: zero, and beginning at a cache line."""
        arena = cls.__new__(cls)
        arena.num_bytes = arena._end = len(memory)
        arena._bytes, arena._used = memory, 0
        return arena

    @property
    def address(self) -> int:
        """Where the memory begins of which pieces are taken."""
        return self._bytes.ctypes.data + self._end - self.num_bytes

    def take(self, count: int, dtype: DTypeLike) -> NDArray[np.generic]:
        """`count` zeroed elements, aligned to a cache line. Raises MemoryError beyond the arena's size."""
        size = aligned(count * np.dtype(dtype).itemsize)
        if self._used + size > self._end:
            raise MemoryError(f"the arena of {self.num_bytes} bytes is full")
        piece = self._bytes[self._used : self._used + count * np.dtype(dtype).itemsize].view(dtype)
        self._used += size
        return piece


def own_arena(num_bytes: int) -> Arena:
    """Memory of this process alone, in large pages where the kernel has them."""
    return Arena(num_bytes, huge_pages=True)


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole cache lines."""
    return -(-num_bytes // _LINE) * _LINE
