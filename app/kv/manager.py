"""Block tables: which KV blocks each sequence holds, and what of them others may share.

Invariants:
- a block's reference count is the number of block tables that name it;
- a block is sealed only when the KV of all its tokens has been computed, and never written again;
- a table is changed as a whole or not at all: a refusal leaves pool and table as they were.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from app.kv.block_pool import BlockPool
from app.kv.prefix import HashChain
from app.kv.record import BlockRecord

_NEVER = sys.maxsize


class PrefixMatch(NamedTuple):
    """What the cache holds of a token list, counted in whole blocks from its start."""

    num_blocks: int
    missing: bytes | None
    """Hash of the first block that the cache lacks, or None where no further one was wanted."""


class BlockTable:
    """The blocks of one sequence, in order. Only `KVManager` changes one; it outlives preemption, empty."""

    __slots__ = ("block_ids", "chain", "next_seal", "num_announced", "num_sealed", "view", "view_tokens")

    def __init__(self, chain: HashChain) -> None:
        self.chain = chain
        self.block_ids: list[int] = []
        """Held blocks; reserved ones that no step has reached yet included."""
        self.view: tuple[int, ...] = ()
        """The blocks that steps have reached so far: rebuilt only when one is added."""
        self.view_tokens = 0
        """Token positions that `view` covers."""
        self.num_announced = 0
        """Blocks of `view` that plans have named."""
        self.num_sealed = 0
        """Blocks, from the start, whose contents are computed and sealed."""
        self.next_seal = _NEVER
        """Computed tokens at which the next block is to be sealed."""

    def announce(self) -> int:
        """How many blocks `view` has gained since the last call."""
        gained = len(self.view) - self.num_announced
        self.num_announced += gained
        return gained


class KVManager:
    """Gives blocks to sequences, takes them back, and finds prefixes that are computed already."""

    def __init__(
        self, num_blocks: int, *, block_size: int, enable_prefix_caching: bool, record: BlockRecord | None = None
    ) -> None:
        """Without prefix caching no block is sealed, and the record stays as it is."""
        self.pool = BlockPool(num_blocks, record=record if enable_prefix_caching else None)
        self.block_size = block_size
        self._is_caching = enable_prefix_caching

    def new_table(self, salt: str) -> BlockTable:
        """An empty table for a sequence whose blocks are shared only under `salt`."""
        return BlockTable(HashChain(self.block_size, salt=salt))

    def match(self, table: BlockTable, token_ids: Sequence[int], *, limit: int) -> PrefixMatch:
        """How many blocks of the first `limit` tokens are sealed. Holds nothing."""
        if not self._is_caching:
            return PrefixMatch(0, None)
        for index in range(limit // self.block_size):
            block_hash = table.chain.at(index, token_ids)
            if self.pool.find(block_hash) is None:
                return PrefixMatch(index, block_hash)
        return PrefixMatch(limit // self.block_size, None)

    def admit(self, table: BlockTable, token_ids: Sequence[int], *, num_matched: int) -> bool:
        """Fill an empty table with the matched blocks and reserve the others of `token_ids`, or refuse.

        Everything known is reserved at once, so that no prefill is begun that cannot be finished.
        """
        matched = [self._sealed_block(table, token_ids, index) for index in range(num_matched)]
        num_revived = sum(self.pool.ref_count(block_id) == 0 for block_id in matched)
        num_missing = self._num_blocks(len(token_ids)) - num_matched
        if num_missing > self.pool.num_free - num_revived:
            return False
        for block_id in matched:
            self.pool.retain(block_id)
        table.block_ids = matched + self.pool.take(num_missing)
        self._set_sealed(table, num_matched)
        return True

    def cover(self, table: BlockTable, num_tokens: int) -> bool:
        """Let `view` cover `num_tokens` positions, with new blocks where none are reserved, or refuse."""
        num_blocks = self._num_blocks(num_tokens)
        num_missing = num_blocks - len(table.block_ids)
        if num_missing > self.pool.num_free:
            return False
        if num_missing > 0:
            table.block_ids += self.pool.take(num_missing)
        if num_blocks > len(table.view):
            table.view = tuple(table.block_ids[:num_blocks])
            table.view_tokens = num_blocks * self.block_size
        return True

    def seal(self, table: BlockTable, token_ids: Sequence[int], *, num_computed_tokens: int) -> None:
        """Make the blocks that are full of computed KV findable."""
        num_full = num_computed_tokens // self.block_size
        for index in range(table.num_sealed, num_full):
            self.pool.seal(table.block_ids[index], table.chain.at(index, token_ids))
        self._set_sealed(table, num_full)

    def next_hash(self, table: BlockTable, token_ids: Sequence[int]) -> bytes | None:
        """The hash of the first block still to be computed, where all its tokens are known."""
        if not self._is_caching or len(token_ids) < table.next_seal:
            return None
        return table.chain.at(table.num_sealed, token_ids)

    def free(self, table: BlockTable) -> None:
        """Take all blocks of a table back; the sealed ones stay findable until they are needed."""
        self.pool.release(table.block_ids)
        table.block_ids = []
        table.view = ()
        table.view_tokens = 0
        table.num_announced = 0
        table.num_sealed = 0
        table.next_seal = _NEVER

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _sealed_block(self, table: BlockTable, token_ids: Sequence[int], index: int) -> int:
        block_id = self.pool.find(table.chain.at(index, token_ids))
        if block_id is None:
            raise ValueError(f"block {index} is not in the prefix cache any more: match again before admitting")
        return block_id

    def _set_sealed(self, table: BlockTable, num_sealed: int) -> None:
        table.num_sealed = num_sealed
        table.next_seal = (num_sealed + 1) * self.block_size if self._is_caching else _NEVER
