"""The function that transformers models call in place of their own attention.

Registered under a name for which transformers knows no mask, so that it builds none: masks are ours.
The function keeps no state; what it needs comes as the keyword `paged` of the model's forward.
"""

from typing import Any

import torch
from transformers import AttentionInterface

from app.runner.torch.attention.attend import AttentionStyle
from app.runner.torch.attention.context import AttentionContext
from app.runner.torch.kv_cache import LayerShape, write_kv

PAGED = "headwater_paged"


class UnsupportedAttention(Exception):
    """The model asks for something that this attention does not do. The message is one clause."""


class ShapeProbe:
    """Takes the context's place in one forward pass and notes what each layer would keep."""

    def __init__(self) -> None:
        self.layers: list[LayerShape] = []


def register() -> None:
    """Make the name PAGED known to transformers; again is harmless."""
    AttentionInterface.register(PAGED, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    paged: AttentionContext | ShapeProbe | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write the step's KV of this layer, attend, return (1, num_tokens, num_heads, value_dim).

    query is (1, num_heads, num_tokens, key_dim), key and value (1, num_kv_heads, num_tokens, ...), rotated.
    """
    if isinstance(paged, ShapeProbe):
        _check(attention_mask, kwargs)
        paged.layers.append(LayerShape(_layer_index(module), key.shape[1], key.shape[3], value.shape[3]))
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3])), None
    if paged is not None:
        style = AttentionStyle(scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)  # (num_tokens, num_kv_heads, dim)
        pool = paged.kv_cache.layer(_layer_index(module))
        write_kv(pool, paged.batch.slots, keys, values)
        return paged.attend(query, pool, kwargs.get("sliding_window"), style)[None], None
    raise UnsupportedAttention("its layers do not pass the caller's keywords on to their attention")


def _layer_index(module: torch.nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise UnsupportedAttention("its attention layers do not know their index")
    return index


def _check(attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise UnsupportedAttention("it builds an attention mask of its own")
    if kwargs.get("position_bias") is not None:
        raise UnsupportedAttention("its attention adds a position bias")
    if kwargs.get("is_causal") is False:
        raise UnsupportedAttention("its attention is not causal")
