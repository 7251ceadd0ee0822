"""Reasons to let a waiting sequence wait although there is room for it.

A gate is told of events and says who may go on: nothing is polled while a sequence is held.
"""

from app.core.types import EngineRequest
from app.scheduler.sequence import Sequence


class PrefixGate:
    """Holds sequences whose first missing block a running sequence, the producer, is about to compute.

    So a shared prefix is computed once. A sequence is held until its producer has sealed the prefix that
    both have, or stops running for whatever reason; a held sequence always has a running producer.
    """

    def __init__(self) -> None:
        self._producers: dict[bytes, Sequence] = {}
        self._next_hash: dict[Sequence, bytes] = {}
        self._held: dict[Sequence, dict[Sequence, int]] = {}
        self._producer_of_held: dict[Sequence, Sequence] = {}

    def __len__(self) -> int:
        return len(self._producer_of_held)

    def producer_of(self, block_hash: bytes | None) -> Sequence | None:
        """Who computes this block next, or None."""
        return None if block_hash is None else self._producers.get(block_hash)

    def hold(self, sequence: Sequence, producer: Sequence, *, num_blocks: int) -> None:
        """Keep `sequence` until `producer` has sealed `num_blocks` blocks."""
        self._held.setdefault(producer, {})[sequence] = num_blocks
        self._producer_of_held[sequence] = producer

    def advance(self, producer: Sequence, *, next_hash: bytes | None) -> list[Sequence]:
        """Note which block `producer` computes next; returns the sequences that need not wait for more."""
        self._forget_hash(producer)
        if next_hash is not None and next_hash not in self._producers:
            self._producers[next_hash] = producer
            self._next_hash[producer] = next_hash
        num_sealed = producer.blocks.num_sealed
        held = self._held.get(producer, {})
        return [self._let_go(sequence) for sequence, wanted in list(held.items()) if wanted <= num_sealed]

    def end(self, producer: Sequence) -> list[Sequence]:
        """`producer` runs no more; returns the sequences that waited for it."""
        self._forget_hash(producer)
        return [self._let_go(sequence) for sequence in list(self._held.get(producer, {}))]

    def discard(self, sequence: Sequence) -> bool:
        """Drop a held sequence; False where it is not held."""
        if sequence not in self._producer_of_held:
            return False
        self._let_go(sequence)
        return True

    def _let_go(self, sequence: Sequence) -> Sequence:
        producer = self._producer_of_held.pop(sequence)
        held = self._held[producer]
        del held[sequence]
        if not held:
            del self._held[producer]
        return sequence

    def _forget_hash(self, producer: Sequence) -> None:
        block_hash = self._next_hash.pop(producer, None)
        if block_hash is not None:
            del self._producers[block_hash]


class PreparationGate:
    """Holds sequences for which something is being prepared outside of the scheduler: a grammar to be compiled.

    Whoever prepares it says when a sequence may go on.
    """

    def __init__(self) -> None:
        self._held: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._held)

    @staticmethod
    def concerns(request: EngineRequest) -> bool:
        """Whether a sequence of this request has to wait here first."""
        return request.params.grammar is not None

    def hold(self, sequence: Sequence) -> None:
        """Keep it until `let_go`."""
        self._held[sequence.request_id] = sequence

    def let_go(self, request_id: str) -> Sequence | None:
        """Hold it no longer; None where it is not held."""
        return self._held.pop(request_id, None)


def num_common_blocks(one: Sequence, other: Sequence, *, known: int, limit: int, block_size: int) -> int:
    """Full blocks, from the start and up to `limit`, with the same tokens; `known` < `limit` of them are known."""
    for index in range(known, limit):
        start, end = index * block_size, (index + 1) * block_size
        if end > len(other.token_ids) or one.token_ids[start:end] != other.token_ids[start:end]:
            return index
    return limit
