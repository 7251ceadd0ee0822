"""The arithmetic of attention: queries of one layer against gathered keys and values.

Everything is (batch, heads, tokens, head_dim). A mask is additive and broadcasts to (batch, 1, queries,
keys); None with `is_causal` means that query i sees keys 0..i.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class AttentionStyle:
    """What a family asks of its attention beyond softmax(q k / scale) v."""

    scale: float | None
    softcap: float | None = None
    """Scores become softcap x tanh(score / softcap)."""
    sinks: torch.Tensor | None = None
    """(num_heads,) a score a head that takes part in the softmax and has no value."""

    @property
    def is_plain(self) -> bool:
        """SDPA computes it."""
        return self.softcap is None and self.sinks is None


def attend_one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, style: AttentionStyle
) -> torch.Tensor:
    """One new token a sequence: query (batch, heads, head_dim) -> (batch, heads, value_dim).

    The heads that share a KV head become the tokens of one query: SDPA on the CPU is seven times slower
    for a query of one token, so a lone head is doubled.
    """
    batch, heads, head_dim = query.shape
    if not style.is_plain:
        return _attend_by_hand(query[:, :, None], keys, values, mask, style)[:, :, 0]
    group = heads // keys.shape[1]
    packed = query.reshape(batch, keys.shape[1], group, head_dim)
    if group == 1 and query.device.type == "cpu":
        packed = packed.expand(-1, -1, 2, -1)
    out = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=style.scale)
    return out[:, :, :group].reshape(batch, heads, values.shape[-1])


def attend_many(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, style: AttentionStyle
) -> torch.Tensor:
    """A chunk of one sequence: query (1, heads, tokens, head_dim) -> (1, heads, tokens, value_dim)."""
    if style.is_plain:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=style.scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )  # fmt: skip
    if mask is None:
        num_tokens = query.shape[2]
        mask = torch.full((num_tokens, num_tokens), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    return _attend_by_hand(query, keys, values, mask, style)


def _attend_by_hand(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, style: AttentionStyle
) -> torch.Tensor:
    """As transformers' eager attention does it: softmax in float32, products in the model's dtype."""
    batch, heads, num_tokens, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, num_tokens, head_dim)
    scale = head_dim**-0.5 if style.scale is None else style.scale
    scores = (grouped @ keys.transpose(-1, -2)[:, :, None]) * scale  # (batch, kv_heads, group, tokens, keys)
    if style.softcap is not None:
        scores = torch.tanh(scores / style.softcap) * style.softcap
    scores = scores + (mask if mask.ndim == 2 else mask[:, :, None])
    if style.sinks is not None:
        sinks = style.sinks.reshape(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, num_tokens, -1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : keys.shape[2]]
    return (weights @ values[:, :, None]).reshape(batch, heads, num_tokens, values.shape[-1])
