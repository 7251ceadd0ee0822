"""The loaded model as the kernels see it: weights, rotation tables, the KV pool and the C structs over them."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.runner.native.families import ModelShape
from app.runner.native.library import CLayer, CLinear, CModel, address
from app.runner.native.pool import KVPool
from app.runner.native.weights import LayerWeights, ModelWeights, padded

BLOCK_SIZE = 64


class NativeModel:
    """Owns every array that `struct` points to."""

    def __init__(
        self,
        shape: ModelShape,
        weights: ModelWeights,
        *,
        num_blocks: int,
        max_model_len: int,
        kv_descriptor: int | None = None,
    ) -> None:
        """`kv_descriptor`: a memfd for the KV pool, where it shall outlive this process."""
        self.shape = shape
        self.weights = weights
        self._cos, self._sin = rotation_tables(shape.inverse_frequencies, max_model_len)
        num_elements = shape.num_kv_heads * BLOCK_SIZE * shape.head_dim
        self.pool = KVPool(num_blocks, num_layers=shape.num_layers, num_elements=num_elements, descriptor=kv_descriptor)
        self.kv = self.pool.array
        self._layers = (CLayer * shape.num_layers)(
            *(_layer_struct(layer, self.kv[0, index]) for index, layer in enumerate(weights.layers))
        )
        self.struct = CModel(
            num_layers=shape.num_layers,
            hidden=shape.hidden,
            hidden_pad=padded(shape.hidden),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            act_pad=weights.layers[0].gate_up.n_pad // 2,
            vocab=shape.vocab_size,
            byte_rows=weights.precision.byte_rows,
            has_blocks=weights.precision.has_blocks,
            norm_eps=shape.norm_eps,
            attention_scale=shape.head_dim**-0.5,
            block_stride=self.kv[0].size,
            layers=self._layers,
            head=weights.head.as_struct(),
            embedding=weights.embedding.as_struct(),
            final_norm=address(weights.final_norm),
            rope_cos=address(self._cos),
            rope_sin=address(self._sin),
        )
        self.reference = ctypes.byref(self.struct)

    @property
    def logits_stride(self) -> int:
        """Columns of a row of logits; those beyond the vocabulary mean nothing."""
        return self.weights.head.n_pad

    @property
    def layers(self) -> "ctypes.Array[CLayer]":
        """The layers' structs, for benchmarks of single kernels."""
        return self._layers


def rotation_tables(
    inverse_frequencies: NDArray[np.float32], num_positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of position x frequency, (num_positions, head_dim / 2): float32 angles, as transformers has them."""
    positions = np.arange(num_positions, dtype=np.float32)
    angles = (positions[:, None] * inverse_frequencies[None, :]).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _layer_struct(layer: LayerWeights, first_kv: NDArray[Any]) -> CLayer:
    linears: dict[str, CLinear] = {
        name: getattr(layer, name).as_struct() for name in ("qkv", "output", "gate_up", "down")
    }
    return CLayer(
        **linears,
        attention_norm=address(layer.attention_norm),
        mlp_norm=address(layer.mlp_norm),
        q_norm=address(layer.q_norm),
        k_norm=address(layer.k_norm),
        k_cache=address(first_kv[0]),
        v_cache=address(first_kv[1]),
    )
