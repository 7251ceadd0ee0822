"""The loaded model as the kernels see it: weights, rotation tables, the KV pool and the C structs over them."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.runner.native.families import Activation, ModelShape
from app.runner.native.library import CLayer, CLinear, CModel, address
from app.runner.native.pool import KVPool
from app.runner.native.rope import Rope
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
        ropes = {id(rope): rope for rope in shape.ropes}  # most models have one for all layers
        tables = {key: rotation_tables(rope, max_model_len) for key, rope in ropes.items()}
        self._tables = [tables[id(rope)] for rope in shape.ropes]
        num_elements = shape.num_kv_heads * BLOCK_SIZE * shape.head_dim
        self.pool = KVPool(num_blocks, num_layers=shape.num_layers, num_elements=num_elements, descriptor=kv_descriptor)
        self.kv = self.pool.array
        self._layers = (CLayer * shape.num_layers)(
            *(
                _layer_struct(layer, self._tables[index], shape.windows[index], self.kv[0, index])
                for index, layer in enumerate(weights.layers)
            )
        )
        self.struct = CModel(
            num_layers=shape.num_layers,
            hidden=shape.hidden,
            hidden_pad=padded(shape.hidden),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            act_pad=weights.layers[0].gate_up.n_pad // (1 if shape.activation is Activation.GELU else 2),
            vocab=shape.vocab_size,
            byte_rows=weights.precision.byte_rows,
            has_blocks=weights.precision.has_blocks,
            rotary_dim=shape.ropes[0].rotary_dim,
            activation=shape.activation,
            has_post_norms=shape.names.has_post_norms,
            norm_eps=shape.norm_eps,
            attention_scale=shape.attention_scale,
            embed_scale=shape.embed_scale,
            attention_cap=shape.attention_cap,
            logit_cap=shape.logit_cap,
            block_stride=self.kv[0].size,
            layers=self._layers,
            head=weights.head.as_struct(),
            embedding=weights.embedding.as_struct(),
            position_embedding=address(weights.positions),
            final_norm=address(weights.final_norm),
            final_norm_bias=address(weights.final_norm_bias),
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


def rotation_tables(rope: Rope, num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of position x frequency, (num_positions, rotary_dim / 2): float32 angles, as transformers'."""
    positions = np.arange(num_positions, dtype=np.float32)
    angles = (positions[:, None] * rope.inverse_frequencies[None, :]).astype(np.float64)
    return (np.cos(angles) * rope.factor).astype(np.float32), (np.sin(angles) * rope.factor).astype(np.float32)


def _layer_struct(
    layer: LayerWeights,
    tables: tuple[NDArray[np.float32], NDArray[np.float32]],
    window: int,
    first_kv: NDArray[Any],
) -> CLayer:
    linears: dict[str, CLinear] = {
        name: getattr(layer, name).as_struct() for name in ("qkv", "output", "gate_up", "down")
    }
    return CLayer(
        **linears,
        attention_norm=address(layer.attention_norm),
        mlp_norm=address(layer.mlp_norm),
        attention_norm_bias=address(layer.attention_norm_bias),
        mlp_norm_bias=address(layer.mlp_norm_bias),
        post_attention_norm=address(layer.post_attention_norm),
        post_mlp_norm=address(layer.post_mlp_norm),
        q_norm=address(layer.q_norm),
        k_norm=address(layer.k_norm),
        rope_cos=address(tables[0]),
        rope_sin=address(tables[1]),
        window=window,
        k_cache=address(first_kv[0]),
        v_cache=address(first_kv[1]),
    )
