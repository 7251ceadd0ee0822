"""The KV pool: for each attention layer one tensor of keys and one of values, in blocks.

Invariants:
- a layer's tensors are (num_blocks + 2, block_size, num_kv_heads, head_dim), tokens outermost: slot =
  block id x block_size + offset indexes the flattened first two dimensions;
- no plan names the last two blocks: one stays zero and pads block tables, padding tokens write to the other;
- a slot is zero or holds finite values of its present owner before it is ever multiplied: blocks are
  cleared when a sequence begins to write them, so nothing that another sequence left (NaN, at worst)
  can come through a masked position.
"""

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray


class LayerShape(msgspec.Struct, frozen=True):
    """What one attention layer keeps for a token. Keys and values may differ in size."""

    layer_index: int
    num_kv_heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """Owns the memory of all layers."""

    def __init__(
        self,
        layers: tuple[LayerShape, ...],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._layers = {
            layer.layer_index: (
                _zeros((num_blocks + 2, block_size, layer.num_kv_heads, layer.key_dim), dtype, device),
                _zeros((num_blocks + 2, block_size, layer.num_kv_heads, layer.value_dim), dtype, device),
            )
            for layer in layers
        }

    @property
    def zero_block(self) -> int:
        """Block id that fills up block tables: read, masked, never written."""
        return self.num_blocks

    @property
    def scratch_block(self) -> int:
        """Block id for padding tokens: written, never read."""
        return self.num_blocks + 1

    def layer(self, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each (num_blocks + 2, block_size, num_kv_heads, head_dim)."""
        return self._layers[layer_index]

    def clear(self, block_ids: torch.Tensor) -> None:
        """Zero whole blocks in every layer; `block_ids` is (num_blocks_to_clear,)."""
        if len(block_ids):
            for keys, values in self._layers.values():
                keys.index_fill_(0, block_ids, 0)
                values.index_fill_(0, block_ids, 0)


def bytes_per_token(layers: tuple[LayerShape, ...], dtype: torch.dtype) -> int:
    """KV bytes that one token takes in all layers together."""
    return sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in layers) * dtype.itemsize


def write_kv(
    pool: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Store keys and values (num_tokens, num_kv_heads, head_dim) of one layer at `slots` (num_tokens,)."""
    for tensor, new in zip(pool, (keys, values), strict=True):
        tensor.view(-1, *tensor.shape[2:]).index_copy_(0, slots, new)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros are the operating system's untouched pages: a large pool costs nothing until it is used.
    raw: NDArray[np.uint8] = np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype)
