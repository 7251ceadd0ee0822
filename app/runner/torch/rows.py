"""A step plan as passes of few shapes: every token is a row that attends for itself.

Nothing tells a prompt's token from a decoded one here, so both come out the same. A pass has as many
rows as the smallest size that holds its tokens, the rest is padding; a plan of more tokens than the largest
size takes several passes. With one size alone (the deterministic mode) every product in the model has the
same shape, whatever is served.

Invariants:
- the tensors are allocated once, for the largest size, and every batch reads the same memory (a graph can be captured
  over it): one pass's inputs lie where the last one's lay;
- a token's row reads its own block table and length; padding reads the zero block and writes the scratch block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from app.core.plan import PlanEntry, StepPlan
from app.runner.torch.attention.split import Rows, blocks_per_split
from app.runner.torch.kv_cache import KVCache
from app.runner.torch.packing import Packer, StepBatch, new_blocks, num_blocks, num_logits, token_rows
from app.runner.torch.sizes import passes


@dataclass(frozen=True)
class RowBatch(StepBatch):
    """One pass of `size` rows."""

    rows: Rows


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
        self._rows = torch.zeros((4, self._sizes[-1]), dtype=torch.int64, device=device)
        self._tables = torch.zeros((self._sizes[-1], width), dtype=torch.int64, device=device)

    def batches(self, plan: StepPlan) -> Iterator[RowBatch]:
        """See `Packer.batches`. A sequence's tokens come in their order, so that each finds the KV of those before."""
        entries = plan.entries
        rows = np.concatenate([token_rows(entry, self._block_size) for entry in entries], axis=1)
        owners = np.repeat(np.arange(len(entries)), [len(entry.token_ids) for entry in entries])
        wanted = np.concatenate([_wanted(entry) for entry in entries])
        fresh = self._upload(new_blocks(entries, self._block_size))
        for part, size in passes(len(owners), self._sizes):
            owned = [entries[owner] for owner in owners[part]]
            input_ids, position_ids, slots, seq_lens = self._fill_rows(rows[:, part], size)
            yield RowBatch(
                input_ids=input_ids[None],
                position_ids=position_ids[None],
                slots=slots,
                logits_indices=self._upload(np.flatnonzero(wanted[part])),
                new_blocks=fresh,
                rows=Rows(self._fill_tables(owned, size, longest=int(rows[1, part].max()) + 1), seq_lens, self._split),
            )
            fresh = fresh[:0]

    def _fill_rows(self, rows: NDArray[np.int64], size: int) -> torch.Tensor:
        """(4, size) ids, positions, slots and lengths; `rows` are the first three, (3, num_tokens)."""
        num_tokens = rows.shape[1]
        padded = np.zeros((4, size), dtype=np.int64)
        padded[:3, :num_tokens] = rows
        padded[2, num_tokens:] = self._scratch_slot
        padded[3] = padded[1] + 1
        return self._rows[:, :size].copy_(torch.from_numpy(padded))

    def _fill_tables(self, owners: Sequence[PlanEntry], size: int, *, longest: int) -> torch.Tensor:
        """The tables of each row's entry, as far as the longest context reads."""
        num_splits = -(-longest // (self._split * self._block_size))
        tables = np.full((size, num_splits * self._split), self._zero_block, dtype=np.int64)
        for row, entry in enumerate(owners):
            used = min(tables.shape[1], num_blocks(entry, self._block_size))
            tables[row, :used] = entry.block_table[:used]
        used_tables = self._tables[:size, : tables.shape[1]]
        return used_tables.copy_(torch.from_numpy(tables))

    def _upload(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class DecodePacker:
    """Steps that only decode come in static shapes, others in their own: of those no two are alike."""

    def __init__(self, rows: Packer, chunks: Packer) -> None:
        self._rows = rows
        self._chunks = chunks

    def batches(self, plan: StepPlan) -> Iterator[StepBatch]:
        """See `Packer.batches`."""
        is_decode = all(len(entry.token_ids) == 1 for entry in plan.entries)
        return self._rows.batches(plan) if is_decode else self._chunks.batches(plan)


def _wanted(entry: PlanEntry) -> NDArray[np.bool_]:
    """Which of an entry's tokens need logits."""
    wanted = np.zeros(len(entry.token_ids), dtype=np.bool_)
    wanted[len(wanted) - num_logits(entry) :] = True
    return wanted
