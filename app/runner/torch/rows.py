"""A step plan as passes of few shapes: every token is a row that attends for itself.

Nothing tells a prompt's token from a decoded one here, so both come out the same. A pass has as many
rows as the smallest size that holds its tokens, the rest is padding; a plan of more tokens than the largest
size takes several passes. With one size alone (the deterministic mode) every product in the model has the
same shape, whatever is served.

Invariants:
- the tensors of a size are allocated once, and every batch of it reads the same memory (a graph can be
  captured over them): one pass's buffers are the next one's;
- a token's row reads its own block table and length; padding reads the zero block and writes the scratch block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from app.core.plan import PlanEntry, StepPlan
from app.runner.torch.attention.split import Splits, blocks_per_split
from app.runner.torch.kv_cache import KVCache
from app.runner.torch.packing import StepBatch, new_blocks, num_blocks, num_logits, token_rows


@dataclass(frozen=True)
class RowBatch(StepBatch):
    """One pass of `size` rows."""

    seq_lens: torch.Tensor
    """(size,) tokens in each row's context, its own included."""
    splits: Splits


class RowPacker:
    """Owns the static buffers."""

    def __init__(self, kv_cache: KVCache, *, device: torch.device, sizes: Sequence[int], max_model_len: int) -> None:
        """`sizes` are numbers of rows, ascending."""
        self._block_size = kv_cache.block_size
        self._zero_block = kv_cache.zero_block
        self._scratch_slot = kv_cache.scratch_block * kv_cache.block_size
        self._device = device
        self._sizes = tuple(sizes)
        self._split = blocks_per_split(self._block_size)
        width = -(-max_model_len // (self._split * self._block_size)) * self._split
        self._buffers = {size: _Buffers(size, width, device) for size in self._sizes}

    def batches(self, plan: StepPlan) -> Iterator[RowBatch]:
        """See `Packer.batches`. A sequence's tokens come in their order, so that each finds the KV of those before."""
        entries = plan.entries
        rows = np.concatenate([token_rows(entry, self._block_size) for entry in entries], axis=1)
        owners = np.repeat(np.arange(len(entries)), [len(entry.token_ids) for entry in entries])
        wanted = np.concatenate([_wanted(entry) for entry in entries])
        fresh = self._upload(new_blocks(entries, self._block_size))
        for first in range(0, len(owners), self._sizes[-1]):
            part = slice(first, first + self._sizes[-1])
            tables = [entries[owner] for owner in owners[part]]
            yield self._batch(rows[:, part], tables, np.flatnonzero(wanted[part]), fresh)
            fresh = fresh[:0]

    def _batch(
        self, rows: NDArray[np.int64], owners: Sequence[PlanEntry], wanted: NDArray[np.int64], fresh: torch.Tensor
    ) -> RowBatch:
        num_tokens = len(owners)
        size = next(size for size in self._sizes if size >= num_tokens)
        padded = np.zeros((4, size), dtype=np.int64)
        padded[:3, :num_tokens] = rows
        padded[3] = padded[1] + 1
        padded[2, num_tokens:] = self._scratch_slot
        num_splits = -(-int(padded[3].max()) // (self._split * self._block_size))
        tables = np.full((size, num_splits * self._split), self._zero_block, dtype=np.int64)
        for row, entry in enumerate(owners):
            used = min(tables.shape[1], num_blocks(entry, self._block_size))
            tables[row, :used] = entry.block_table[:used]
        return self._buffers[size].fill(padded, tables, self._upload(wanted), fresh, self._split)

    def _upload(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class _Buffers:
    """The memory of one size."""

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        self._rows = torch.zeros((4, size), dtype=torch.int64, device=device)
        self._tables = torch.zeros((size, width), dtype=torch.int64, device=device)

    def fill(
        self,
        rows: NDArray[np.int64],
        tables: NDArray[np.int64],
        wanted: torch.Tensor,
        fresh: torch.Tensor,
        split: int,
    ) -> RowBatch:
        """`rows` are ids, positions, slots and lengths; of a table only the splits that are read are sent."""
        input_ids, position_ids, slots, seq_lens = self._rows.copy_(torch.from_numpy(rows))
        used = self._tables[:, : tables.shape[1]].copy_(torch.from_numpy(tables))
        return RowBatch(input_ids[None], position_ids[None], slots, wanted, fresh, seq_lens, Splits(used, split))


def _wanted(entry: PlanEntry) -> NDArray[np.bool_]:
    """Which of an entry's tokens need logits."""
    wanted = np.zeros(len(entry.token_ids), dtype=np.bool_)
    wanted[len(wanted) - num_logits(entry) :] = True
    return wanted
