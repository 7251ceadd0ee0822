"""Packed weights in a memfd that outlives the engine: the first engine packs and seals, later ones map.

    header   magic, version, completion flag, place and checksum of the index, key     4096 bytes
    arena    the packed linears
    loose    arrays that lie outside of the arena: norms, biases, scales
    index    `ModelWeights` as msgpack, an array being (offset, elements, dtype)

The flag is written last and then the kernel's seal is put on, after which nobody can write, not by mistake
either. What has no flag, no seal, another key or an index that does not fit counts as nothing.
"""

import fcntl
import gc
import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from app.core.memory import KeptMemory
from app.runner.native.arena import Arena, aligned, own_arena
from app.runner.native.mapping import NO_LARGE_PAGES, Mapping
from app.runner.native.weights import ModelWeights

LAYOUT_VERSION = 1
"""Raised when the same kernels and settings lay weights out in another way."""
_MAGIC = b"HWpacked"
_HEADER = struct.Struct("<8sII32sQQ32s")
_COMPLETE_AT = 12
"""Where the completion flag stands in the header."""
_ARENA_AT = 4096
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_ARRAY_KINDS = "iuf"
_NOTHING = (OSError, ValueError, TypeError, struct.error, msgspec.MsgspecError)
"""What reading raises where a memfd does not hold what it should."""


def pack_key(model_dir: Path, library: Path, quantization: str | None) -> bytes:
    """Names what packed weights depend on: the model's files, the kernels' sources and level, the quantisation."""
    digest = hashlib.sha256(f"{LAYOUT_VERSION} {library.name} {quantization}\n".encode())
    for path in sorted(path for path in model_dir.iterdir() if path.is_file()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n".encode())
    return digest.digest()


def find_or_pack(
    descriptor: int | None, key: bytes, pack: Callable[[Callable[[int], Arena]], ModelWeights]
) -> tuple[ModelWeights, KeptMemory]:
    """Weights from the memfd, or what `pack` makes with the arena that it is given, kept there if that can be."""
    if descriptor is None:
        return pack(own_arena), KeptMemory(reason="this machine gives no memory that outlives a process")
    memory = KeptWeights(descriptor, key)
    if (weights := memory.find()) is not None:
        return weights, KeptMemory(has_weights=True, has_adopted_weights=True)
    weights = memory.pack(pack)
    return weights, KeptMemory(has_weights=memory.is_kept, reason=memory.reason)


class KeptWeights:
    """The memfd as one engine uses it: `find`, or else `pack`."""

    def __init__(self, descriptor: int, key: bytes) -> None:
        self._descriptor = descriptor
        self._key = key
        self._arena: Arena | None = None
        self.is_kept = False
        """The next engine will find them."""
        self.reason = ""
        """Why not, where that is no matter of course."""

    def find(self) -> ModelWeights | None:
        """What an earlier engine packed, or None."""
        try:
            weights = self._read()
        except _NOTHING:
            return None
        self.is_kept = True
        return weights

    def pack(self, pack: Callable[[Callable[[int], Arena]], ModelWeights]) -> ModelWeights:
        """What `pack` makes with the arena that it is given: completed, sealed, and found again where it now is."""
        weights = pack(self._make_arena)
        if self._arena is None:
            return weights
        self._write(weights)
        self._arena = None
        del weights
        gc.collect()  # the seal is refused while the memory is mapped for writing
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            self.reason = f"packed weights could not be sealed: {error.strerror}"
            return self._read(needs_seal=False)
        self.is_kept = True
        return self._read()

    def _make_arena(self, num_bytes: int) -> Arena:
        """In the memfd if large pages can be had there, else the engine's own memory."""
        try:
            os.ftruncate(self._descriptor, 0)  # whatever an engine left behind that did not finish
            mapping = Mapping(self._descriptor, _ARENA_AT + num_bytes, is_writable=True)
        except OSError as error:
            return self._own_arena(num_bytes, str(error.strerror))
        if not mapping.enlarge_pages(0, _ARENA_AT + num_bytes):
            return self._own_arena(num_bytes, NO_LARGE_PAGES)
        self._arena = Arena.within(mapping.bytes[_ARENA_AT : _ARENA_AT + num_bytes])
        return self._arena

    def _own_arena(self, num_bytes: int, why: str) -> Arena:
        self.reason = f"packed weights are the engine's own: {why}"
        return own_arena(num_bytes)

    def _write(self, weights: ModelWeights) -> None:
        assert self._arena is not None
        places = _Places(self._arena)
        index = msgspec.msgpack.encode(weights, enc_hook=places.place)
        begin = places.end
        size = begin + len(index)
        os.ftruncate(self._descriptor, size)
        header = [_MAGIC, LAYOUT_VERSION, 0, self._key, begin, len(index), hashlib.sha256(index).digest()]
        for offset, data in (*places.loose, (begin, index), (0, _HEADER.pack(*header))):
            _write_all(self._descriptor, data, offset)
        _write_all(self._descriptor, (1).to_bytes(4, "little"), _COMPLETE_AT)

    def _read(self, *, needs_seal: bool = True) -> ModelWeights:
        if needs_seal and fcntl.fcntl(self._descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ValueError("not sealed")
        header = _HEADER.unpack(os.pread(self._descriptor, _HEADER.size, 0))
        magic, version, is_complete, key, begin, length, checksum = header
        if (magic, version, is_complete, key) != (_MAGIC, LAYOUT_VERSION, 1, self._key):
            raise ValueError("other weights, or none")
        size = os.fstat(self._descriptor).st_size
        index = os.pread(self._descriptor, length, begin) if begin + length <= size else b""
        if hashlib.sha256(index).digest() != checksum:
            raise ValueError("the index is broken")
        mapping = Mapping(self._descriptor, size, is_writable=False)
        mapping.enlarge_pages(0, size)

        def view(_: type, place: Any) -> NDArray[Any]:
            offset, count, name = place
            dtype = np.dtype(name)
            if dtype.kind not in _ARRAY_KINDS or not 0 <= offset <= offset + count * dtype.itemsize <= size:
                raise ValueError(f"no array can be {place}")
            return mapping.bytes[offset : offset + count * dtype.itemsize].view(dtype)

        return msgspec.msgpack.decode(index, type=ModelWeights, dec_hook=view)


class _Places:
    """Where each array lies in the memfd; those outside of the arena get a place behind it."""

    def __init__(self, arena: Arena) -> None:
        self._first = arena.address
        self._num_bytes = arena.num_bytes
        self.end = aligned(_ARENA_AT + arena.num_bytes)
        self.loose: list[tuple[int, bytes]] = []

    def place(self, value: Any) -> tuple[int, int, str]:
        if not isinstance(value, np.ndarray) or value.ndim != 1:
            raise TypeError(f"packed weights hold a {type(value).__name__}, which has no place")
        offset = value.ctypes.data - self._first
        if 0 <= offset < self._num_bytes:
            return _ARENA_AT + offset, value.size, value.dtype.str
        offset, self.end = self.end, aligned(self.end + value.nbytes)
        self.loose.append((offset, value.tobytes()))
        return offset, value.size, value.dtype.str


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
