"""Which blocks of a pool are sealed and under which hash, in memory that outlives the engine.

The engine may be killed between any two instructions, so what stands here is true at every instant: an entry
is written after its block is full and sealed, and taken out before the block is handed out again. An entry
counts where its checksum fits, so one that was being written counts for nothing.

    header   magic, number of blocks, key (32 bytes), checksum       64 bytes
    entry    checksum, stamp, hash (32 bytes); one for each block    48 bytes

The key names all that a block's contents depend on beside the hash: model, kernels, layout of the pool. The magic is
written last. A stamp orders free blocks by when they were let go; 0 is a block in use.
"""

import mmap
import os
import struct
from hashlib import blake2b

KEY_BYTES = 32
_HASH_BYTES = 32
_HEADER_BYTES = 64
_ENTRY = struct.Struct("<QQ32s")
_ENTRY_BYTES = _ENTRY.size
_ENTRY_WORDS = _ENTRY_BYTES // 8
_IN_USE = 1 << 64
"""Above every stamp."""
_MAGIC = int.from_bytes(b"HWblock1", "little")


class BlockRecord:
    """The entries of `num_blocks` blocks. One process writes at a time."""

    def __init__(self, buffer: mmap.mmap | bytearray, num_blocks: int, *, key: bytes) -> None:
        """Entries under another key are forgotten. `buffer` holds `size_of(num_blocks)` bytes or more.

        Raises ValueError where it does not, or where the key is not of KEY_BYTES.
        """
        if len(key) != KEY_BYTES or len(buffer) < size_of(num_blocks):
            raise ValueError(f"{num_blocks} blocks need {size_of(num_blocks)} bytes and a key of {KEY_BYTES}")
        self.num_blocks = num_blocks
        self._key = key
        self._bytes = memoryview(buffer)
        self._words = self._bytes[: size_of(num_blocks)].cast("Q")
        self._last_stamp = 0
        if not self._is_mine():
            self._begin()

    @classmethod
    def open(cls, descriptor: int, num_blocks: int, *, key: bytes) -> "BlockRecord":
        """Over a memfd, made as long as it must be. Raises OSError."""
        if os.fstat(descriptor).st_size < size_of(num_blocks):
            os.ftruncate(descriptor, size_of(num_blocks))
        return cls(mmap.mmap(descriptor, size_of(num_blocks)), num_blocks, key=key)

    def entries(self) -> list[tuple[int, bytes]]:
        """Block id and hash of each sealed block: the free ones as they were let go, then those that were in use.

        A hash that stands at several blocks names the first of them; the others are forgotten.
        """
        found: dict[bytes, tuple[int, int]] = {}
        entries = _ENTRY.iter_unpack(self._bytes[_HEADER_BYTES : size_of(self.num_blocks)])
        for block_id, (checksum, stamp, block_hash) in enumerate(entries):
            if not checksum or checksum != _checksum(block_id, block_hash):
                continue
            if block_hash in found:
                self.forget(block_id)
            else:
                found[block_hash] = (stamp or _IN_USE, block_id)
        ordered = sorted((stamp, block_id, block_hash) for block_hash, (stamp, block_id) in found.items())
        self._last_stamp = max((stamp for stamp, _, _ in ordered if stamp < _IN_USE), default=0)
        return [(block_id, block_hash) for _, block_id, block_hash in ordered]

    def seal(self, block_id: int, block_hash: bytes) -> None:
        """A block in use is full, and its contents stand in the pool."""
        word = self._word(block_id)
        self._words[word] = 0
        self._words[word + 1] = 0
        start = (word + 2) * 8
        self._bytes[start : start + _HASH_BYTES] = block_hash
        self._words[word] = _checksum(block_id, block_hash)

    def forget(self, block_id: int) -> None:
        """A block is about to get other contents."""
        self._words[self._word(block_id)] = 0

    def let_go(self, block_id: int) -> None:
        """A sealed block is in use no more."""
        self._last_stamp += 1
        self._words[self._word(block_id) + 1] = self._last_stamp

    def hold(self, block_id: int) -> None:
        """A sealed block is in use again."""
        self._words[self._word(block_id) + 1] = 0

    def _word(self, block_id: int) -> int:
        return _HEADER_BYTES // 8 + block_id * _ENTRY_WORDS

    def _is_mine(self) -> bool:
        return self._words[0] == _MAGIC and bytes(self._bytes[8:_HEADER_BYTES]) == self._header()

    def _begin(self) -> None:
        self._words[0] = 0
        self._bytes[_HEADER_BYTES : size_of(self.num_blocks)] = bytes(size_of(self.num_blocks) - _HEADER_BYTES)
        self._bytes[8:_HEADER_BYTES] = self._header()
        self._words[0] = _MAGIC

    def _header(self) -> bytes:
        """Behind the magic."""
        fields = self.num_blocks.to_bytes(8, "little") + self._key
        return fields + blake2b(fields, digest_size=_HEADER_BYTES - 8 - len(fields)).digest()


def _checksum(block_id: int, block_hash: bytes) -> int:
    digest = blake2b(block_hash + block_id.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1  # never 0, which is no entry


def size_of(num_blocks: int) -> int:
    """Bytes of a record."""
    return _HEADER_BYTES + num_blocks * _ENTRY_BYTES
