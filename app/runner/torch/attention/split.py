"""Attention of single tokens over paged KV in splits of a fixed length, merged one after another.

Flash decoding (Dao et al. 2023) with the online softmax of Milakov and Gimelshein (2018). How long a
row's splits are, and in which order they are added, depends on nothing: a split beyond the row's context adds exactly
zero. So a row's result has the same bits however long the contexts beside it are; and every product has the
same shape where the number of rows is fixed.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from app.runner.torch.attention.attend import AttentionStyle

Pool = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, as `KVCache.layer` gives them."""
SPLIT_TOKENS = 128
_LOWEST = -1e30
"""Below every score and finite: a row that has seen nothing yet is multiplied by 0, not by NaN."""


def blocks_per_split(block_size: int) -> int:
    """Whole blocks, one at least."""
    return max(1, SPLIT_TOKENS // block_size)


@dataclass(frozen=True)
class Rows:
    """What each row reads."""

    block_tables: torch.Tensor
    """(num_rows, num_splits x blocks_per_split) block ids."""
    seq_lens: torch.Tensor
    """(num_rows,) tokens in its context, its own included."""
    blocks_per_split: int


class RowAttention(Protocol):
    """`attend_rows`, or a kernel that does the same."""

    def __call__(
        self, query: torch.Tensor, pool: Pool, rows: Rows, window: int | None, style: AttentionStyle
    ) -> torch.Tensor: ...


def hidden_positions(seq_lens: torch.Tensor, window: int | None, num_positions: int) -> torch.Tensor:
    """(num_rows, num_positions) what lies beyond a row's seq_lens (num_rows,) tokens, or before its window."""
    lens = seq_lens[:, None]
    positions = torch.arange(num_positions, device=lens.device)
    hidden = positions >= lens
    return hidden if window is None else hidden | (positions < lens - window)


def attend_rows(query: torch.Tensor, pool: Pool, rows: Rows, window: int | None, style: AttentionStyle) -> torch.Tensor:
    """query (num_rows, num_heads, key_dim) -> (num_rows, num_heads, value_dim).

    Products in the model's dtype, softmax and sums in float32.
    """
    num_rows, num_heads, key_dim = query.shape
    _, block_size, kv_heads, value_dim = pool[1].shape
    grouped = query.reshape(num_rows, kv_heads, num_heads // kv_heads, key_dim)
    best, total = _start(grouped, style)
    out = torch.zeros((*grouped.shape[:3], value_dim), dtype=torch.float32, device=query.device)
    hidden = hidden_positions(rows.seq_lens, window, rows.block_tables.shape[1] * block_size)
    for block_ids, outside in zip(
        rows.block_tables.split(rows.blocks_per_split, dim=1),
        hidden.split(rows.blocks_per_split * block_size, dim=1),
        strict=True,
    ):
        keys, values = (_gather(tensor, block_ids) for tensor in pool)
        scores = _scores(grouped, keys, style).masked_fill(outside[:, None, None], float("-inf"))
        higher = torch.maximum(best, scores.amax(-1, keepdim=True))
        shrink, weights = (best - higher).exp(), (scores - higher).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + (weights.to(values.dtype) @ values).float()
        best = higher
    return (out / total).to(query.dtype).view(num_rows, num_heads, value_dim)


def _start(grouped: torch.Tensor, style: AttentionStyle) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest score and sum of weights before any key, (num_rows, kv_heads, group, 1): a sink has its say here."""
    shape = (*grouped.shape[:3], 1)
    if style.sinks is None:
        best = torch.full(shape, _LOWEST, dtype=torch.float32, device=grouped.device)
        return best, torch.zeros_like(best)
    best = style.sinks.float().view(1, *shape[1:]).expand(shape)
    return best, torch.ones(shape, dtype=torch.float32, device=grouped.device)


def _scores(grouped: torch.Tensor, keys: torch.Tensor, style: AttentionStyle) -> torch.Tensor:
    """(num_rows, kv_heads, group, positions) in float32."""
    scale = grouped.shape[-1] ** -0.5 if style.scale is None else style.scale
    scores = (grouped @ keys.transpose(-1, -2)).float() * scale
    return scores if style.softcap is None else torch.tanh(scores / style.softcap) * style.softcap


def _gather(tensor: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """(num_rows, kv_heads, positions, dim) of the blocks (num_rows, num_blocks)."""
    num_rows, num_blocks = block_ids.shape
    blocks = tensor.index_select(0, block_ids.reshape(-1))
    return blocks.view(num_rows, num_blocks * tensor.shape[1], *tensor.shape[2:]).transpose(1, 2)
