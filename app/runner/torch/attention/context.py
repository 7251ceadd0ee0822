"""What the attention of every layer shares in one step: the batch, the pool and the masks.

Masks depend on the step and on the layer's window, not on the layer: each is built once a step.
Additive masks (0 or -inf) in the model's dtype, because SDPA would convert a boolean one in each layer.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from app.runner.torch.attention.attend import AttentionStyle, attend_many, attend_one
from app.runner.torch.attention.split import Pool, RowAttention
from app.runner.torch.kv_cache import KVCache
from app.runner.torch.packing import ChunkBatch, DecodeGroup, PrefillChunk, StepBatch
from app.runner.torch.rows import RowBatch


class AttentionContext(Protocol):
    """Goes through the model's forward as the keyword `paged`."""

    @property
    def batch(self) -> StepBatch: ...

    @property
    def kv_cache(self) -> KVCache: ...

    def attend(self, query: torch.Tensor, pool: Pool, window: int | None, style: AttentionStyle) -> torch.Tensor:
        """query (1, num_heads, num_tokens, key_dim) -> (num_tokens, num_heads, value_dim), over KV that is written."""
        ...


def attention_context(
    batch: StepBatch, kv_cache: KVCache, dtype: torch.dtype, *, attend_rows: RowAttention
) -> AttentionContext:
    """The attention that a batch was packed for."""
    if isinstance(batch, RowBatch):
        return RowContext(batch, kv_cache, attend_rows)
    assert isinstance(batch, ChunkBatch)
    return ChunkContext(batch, kv_cache, dtype)


@dataclass(frozen=True)
class RowContext:
    """Every token attends for itself, in splits (`attention.split`)."""

    batch: RowBatch
    kv_cache: KVCache
    attend_rows: RowAttention

    def attend(self, query: torch.Tensor, pool: Pool, window: int | None, style: AttentionStyle) -> torch.Tensor:
        """See `AttentionContext.attend`."""
        return self.attend_rows(query[0].transpose(0, 1), pool, self.batch.rows, window, style)


@dataclass(frozen=True)
class Gathered:
    """Which KV a group or a chunk reads, for one window: whole blocks, the needless ones left out."""

    block_ids: torch.Tensor
    """(num_sequences, num_blocks)."""
    mask: torch.Tensor | None
    """Decode (num_sequences, 1, 1, context), prefill (num_tokens, context); None: plain causal from 0."""


@dataclass(frozen=True)
class ChunkContext:
    """Tokens of one sequence attend together, by SDPA where the family's attention is plain."""

    batch: ChunkBatch
    kv_cache: KVCache
    dtype: torch.dtype
    _decode: dict[tuple[int, int | None], Gathered] = field(default_factory=dict)
    _prefill: dict[tuple[int, int | None], Gathered] = field(default_factory=dict)

    def attend(self, query: torch.Tensor, pool: Pool, window: int | None, style: AttentionStyle) -> torch.Tensor:
        """See `AttentionContext.attend`."""
        out = query.new_empty((query.shape[2], query.shape[1], pool[1].shape[-1]))
        for index, group in enumerate(self.batch.decode_groups):
            span = slice(group.first_token, group.first_token + len(group.seq_lens))
            gathered = self.decode(index, window)
            keys, values = (_gather(tensor, gathered.block_ids) for tensor in pool)
            assert gathered.mask is not None
            out[span] = attend_one(query[0, :, span].transpose(0, 1), keys, values, gathered.mask, style)
        for index, chunk in enumerate(self.batch.prefill_chunks):
            span = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            gathered = self.prefill(index, window)
            context_len = chunk.num_tokens if gathered.mask is None else gathered.mask.shape[1]
            keys, values = (_gather(tensor, gathered.block_ids)[:, :, :context_len] for tensor in pool)
            out[span] = attend_many(query[:, :, span], keys, values, gathered.mask, style)[0].transpose(0, 1)
        return out

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


def _gather(tensor: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Blocks (num_sequences, num_blocks) of a pool as (num_sequences, num_kv_heads, context, dim)."""
    num_sequences, num_blocks = block_ids.shape
    blocks = tensor.index_select(0, block_ids.reshape(-1))
    return blocks.view(num_sequences, num_blocks * tensor.shape[1], *tensor.shape[2:]).transpose(1, 2)
