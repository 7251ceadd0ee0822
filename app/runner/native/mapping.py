"""Memfds in large pages: mapped where large pages fit, and made of them.

Memfds get small pages unless the administrator says otherwise, and weights in small pages take 9 to 27 % longer
to read. MADV_COLLAPSE (Linux 6.1) makes large ones all the same; one call for many, because each call
first waits for every core.
"""

import ctypes
import errno
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

LARGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
NO_LARGE_PAGES = "this kernel makes no large pages of shared memory"


class Mapping:
    """A memfd of `num_bytes`, rounded up to whole large pages. Unmapped when the last view of `bytes` goes."""

    def __init__(self, descriptor: int, num_bytes: int, *, is_writable: bool) -> None:
        """A writable one makes the file as long as it must be. Raises OSError."""
        self.num_bytes = -(-num_bytes // LARGE_PAGE) * LARGE_PAGE
        if is_writable and os.fstat(descriptor).st_size != self.num_bytes:
            os.ftruncate(descriptor, self.num_bytes)
        self._address = _map(descriptor, self.num_bytes, is_writable=is_writable)
        memory = (ctypes.c_ubyte * self.num_bytes).from_address(self._address)
        weakref.finalize(memory, _libc().munmap, self._address, self.num_bytes)
        self.bytes: NDArray[np.uint8] = np.frombuffer(memoryview(memory), dtype=np.uint8)
        if not is_writable:
            self.bytes.flags.writeable = False

    def enlarge_pages(self, begin: int, end: int) -> bool:
        """Give the bytes from `begin` to `end` memory, in large pages; False where this kernel cannot do that.

        Where memory is too scattered, or too little, they stay small.
        """
        first, last = begin // LARGE_PAGE * LARGE_PAGE, min(-(-end // LARGE_PAGE) * LARGE_PAGE, self.num_bytes)
        if self.bytes.flags.writeable:
            pages = self.bytes[first:last:LARGE_PAGE]
            pages |= 0  # a page with nothing in it is not enlarged
        is_done: bool = _libc().madvise(self._address + first, last - first, _MADV_COLLAPSE) == 0
        return is_done or ctypes.get_errno() != errno.EINVAL


def _map(descriptor: int, num_bytes: int, *, is_writable: bool) -> int:
    """An address that large pages can begin at."""
    libc = _libc()
    room: int | None = libc.mmap(None, num_bytes + LARGE_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if room is None or room == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"no room for {num_bytes} bytes")
    address = -(-room // LARGE_PAGE) * LARGE_PAGE
    # Of a sealed file the kernel gives, before 6.7, only private mappings. Nobody writes, so it is the same memory.
    kind = mmap.MAP_SHARED if is_writable else mmap.MAP_PRIVATE
    rights = mmap.PROT_READ | mmap.PROT_WRITE if is_writable else mmap.PROT_READ
    mapped = libc.mmap(address, num_bytes, rights, kind | _MAP_FIXED, descriptor, 0)
    number = ctypes.get_errno()
    end = address + num_bytes
    _unmap(room, address - room)
    _unmap(end, room + num_bytes + LARGE_PAGE - end)
    if mapped != address:
        _unmap(address, num_bytes)
        raise OSError(number, f"{num_bytes} bytes of shared memory cannot be mapped: {os.strerror(number)}")
    return address


def _unmap(address: int, num_bytes: int) -> None:
    if num_bytes:
        _libc().munmap(address, num_bytes)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
