"""What the attention of every layer shares in one step: the batch, the pool and the masks.

Masks depend on the step and on the layer's window, not on the layer: each is built once a step.
Additive masks (0 or -inf) in the model's dtype, because SDPA would convert a boolean one in each layer.
"""

from dataclasses import dataclass, field

import torch

from app.runner.torch.kv_cache import KVCache
from app.runner.torch.packing import DecodeGroup, PrefillChunk, StepBatch


@dataclass(frozen=True)
class Gathered:
    """Which KV a group or a chunk reads, for one window: whole blocks, the needless ones left out."""

    block_ids: torch.Tensor
    """(num_sequences, num_blocks)."""
    mask: torch.Tensor | None
    """Decode (num_sequences, 1, 1, context), prefill (num_tokens, context); None: plain causal from 0."""


@dataclass(frozen=True)
class AttentionContext:
    """Goes through the model's forward as the keyword `paged`."""

    batch: StepBatch
    kv_cache: KVCache
    dtype: torch.dtype
    _decode: dict[tuple[int, int | None], Gathered] = field(default_factory=dict)
    _prefill: dict[tuple[int, int | None], Gathered] = field(default_factory=dict)

    def decode(self, index: int, window: int | None) -> Gathered:
        """For `batch.decode_groups[index]`, in layers with this sliding window."""
        key = (index, window)
        if key not in self._decode:
            self._decode[key] = self._decode_gather(self.batch.decode_groups[index], window)
        return self._decode[key]

    def prefill(self, index: int, window: int | None) -> Gathered:
        """For `batch.prefill_chunks[index]`, in layers with this sliding window."""
        key = (index, window)
        if key not in self._prefill:
            self._prefill[key] = self._prefill_gather(self.batch.prefill_chunks[index], window)
        return self._prefill[key]

    def _decode_gather(self, group: DecodeGroup, window: int | None) -> Gathered:
        block_size = self.kv_cache.block_size
        lens = group.seq_lens[:, None]  # (num_sequences, 1)
        tables = group.block_tables
        first_block = torch.zeros_like(lens)
        if window is not None and (width := -(-window // block_size) + 1) < tables.shape[1]:
            # The last `width` blocks hold the window wherever it begins inside its first block.
            first_block = (-(-lens // block_size) - width).clamp(min=0)
            tables = tables.gather(1, first_block + torch.arange(width, device=tables.device))
        positions = first_block * block_size + torch.arange(tables.shape[1] * block_size, device=lens.device)
        hidden = positions >= lens
        if window is not None:
            hidden |= positions < lens - window
        return Gathered(tables, self._additive(hidden)[:, None, None])

    def _prefill_gather(self, chunk: PrefillChunk, window: int | None) -> Gathered:
        block_size = self.kv_cache.block_size
        first_block = 0 if window is None else max(0, chunk.start + 1 - window) // block_size
        block_ids = chunk.block_table[first_block:]
        device = block_ids.device
        if chunk.start == 0 and (window is None or window >= chunk.num_tokens):
            return Gathered(block_ids[None], None)
        queries = chunk.start + torch.arange(chunk.num_tokens, device=device)[:, None]
        end = chunk.start + chunk.num_tokens
        keys = torch.arange(first_block * block_size, end, device=device)[None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return Gathered(block_ids[None], self._additive(hidden))

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))
