"""Names for the contents of KV blocks: a hash chain over salt and tokens.

The hash of block i covers the salt and every token up to the end of block i, so that equal hashes mean
equal prefixes under the same salt. The hash resists collisions: tokens come from clients, and a
collision would serve one client the context of another.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_HASH_BYTES = 32


def root_hash(salt: str) -> bytes:
    """The parent of the first block: sequences with different salts share nothing."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES, person=b"headwater-root").digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block, given the one before it. Token ids must fit 32 unsigned bits."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=_HASH_BYTES).digest()


class HashChain:
    """The block hashes of one growing token list, computed when first asked for and kept."""

    __slots__ = ("_block_size", "_hashes", "_root")

    def __init__(self, block_size: int, *, salt: str) -> None:
        self._block_size = block_size
        self._root = root_hash(salt)
        self._hashes: list[bytes] = []

    def at(self, index: int, token_ids: Sequence[int]) -> bytes:
        """The hash of block `index`, which must be full. `token_ids` may only ever grow at its end."""
        hashes = self._hashes
        while len(hashes) <= index:
            start = len(hashes) * self._block_size
            parent = hashes[-1] if hashes else self._root
            hashes.append(block_hash(parent, token_ids[start : start + self._block_size]))
        return hashes[index]
