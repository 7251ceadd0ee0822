"""The KV blocks of one pool: which are free, which are held how often, which can be found by hash.

Invariants:
- every block is held (reference count > 0), free and blank, or free and sealed: exactly one of them;
- a hash names at most one block, and a sealed block keeps its hash until it is evicted;
- only sealed blocks can be held more than once;
- the record, where there is one, names a block under its hash from its seal to its eviction, and never longer;
- all operations take constant time per block.
"""

from collections import OrderedDict
from collections.abc import Sequence

from app.kv.record import BlockRecord


class BlockPool:
    """Hands out block ids 0 .. num_blocks - 1. Blank blocks go first, then the least recently used sealed one."""

    def __init__(self, num_blocks: int, *, record: BlockRecord | None = None) -> None:
        """What `record` names is sealed and free from the start."""
        self.num_blocks = num_blocks
        self._record = record
        self._ref_counts = [0] * num_blocks
        # An OrderedDict, because next(iter(a dict)) crawls over the holes that removals leave at its front.
        self._free_sealed: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._num_shared = 0
        for block_id, block_hash in () if record is None else record.entries():
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash
            self._free_sealed[block_id] = None
        self.num_adopted = len(self._hash_of)
        self._blank = [block_id for block_id in range(num_blocks - 1, -1, -1) if block_id not in self._hash_of]

    @property
    def num_free(self) -> int:
        """Blocks that `take` can hand out, sealed ones included."""
        return len(self._blank) + len(self._free_sealed)

    @property
    def num_held(self) -> int:
        """Blocks that at least one block table names."""
        return self.num_blocks - self.num_free

    @property
    def num_shared(self) -> int:
        """Held blocks that more than one block table names."""
        return self._num_shared

    @property
    def num_cached(self) -> int:
        """Free blocks that can still be found by hash."""
        return len(self._free_sealed)

    def ref_count(self, block_id: int) -> int:
        """How many block tables name this block."""
        return self._ref_counts[block_id]

    def hash_of(self, block_id: int) -> bytes | None:
        """The hash under which a block is sealed, or None."""
        return self._hash_of.get(block_id)

    def find(self, block_hash: bytes) -> int | None:
        """The sealed block with this hash, held or free, or None."""
        return self._block_of.get(block_hash)

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks with void contents. Raises ValueError where fewer are free."""
        if count > self.num_free:
            raise ValueError(f"{count} KV blocks asked for and {self.num_free} free: check num_free before taking")
        return [self._take_one() for _ in range(count)]

    def retain(self, block_id: int) -> None:
        """Hold a sealed block once more, or again if it was free."""
        if self._ref_counts[block_id] == 0:
            del self._free_sealed[block_id]
            if self._record is not None:
                self._record.hold(block_id)
        self._ref_counts[block_id] += 1
        self._num_shared += self._ref_counts[block_id] == 2

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up a block table. Its tail is evicted before its head, which more prefixes share."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                self._num_shared -= self._ref_counts[block_id] == 1
                continue
            if block_id in self._hash_of:
                self._free_sealed[block_id] = None
                if self._record is not None:
                    self._record.let_go(block_id)
            else:
                self._blank.append(block_id)

    def seal(self, block_id: int, block_hash: bytes) -> None:
        """Make a held, full block findable. Where its contents are sealed already, the older block stays the one."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash
            if self._record is not None:
                self._record.seal(block_id, block_hash)

    def _take_one(self) -> int:
        block_id = self._blank.pop() if self._blank else self._evict()
        self._ref_counts[block_id] = 1
        return block_id

    def _evict(self) -> int:
        block_id, _ = self._free_sealed.popitem(last=False)
        if self._record is not None:
            self._record.forget(block_id)
        del self._block_of[self._hash_of.pop(block_id)]
        return block_id
