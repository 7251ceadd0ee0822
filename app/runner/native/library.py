"""The C interface as ctypes: structs as in src/headwater.h, functions of one loaded library.

Pointers are numpy addresses: whoever fills a struct keeps its arrays alive.
"""

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.runner.base import TierUnavailable


class CLinear(Structure):
    """hw_linear."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("n_pad", c_int32),
        ("k", c_int32),
        ("byte_rows", c_int32),
        ("blocks", c_int32),
    )


class CLayer(Structure):
    """hw_layer."""

    _fields_ = (
        ("qkv", CLinear),
        ("output", CLinear),
        ("gate_up", CLinear),
        ("down", CLinear),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("attention_norm_bias", c_void_p),
        ("mlp_norm_bias", c_void_p),
        ("post_attention_norm", c_void_p),
        ("post_mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("rope_cos", c_void_p),
        ("rope_sin", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("window", c_int64),
    )


class CModel(Structure):
    """hw_model."""

    _fields_ = (
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("hidden_pad", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("act_pad", c_int32),
        ("vocab", c_int32),
        ("byte_rows", c_int32),
        ("has_blocks", c_int32),
        ("rotary_dim", c_int32),
        ("activation", c_int32),
        ("has_post_norms", c_int32),
        ("norm_eps", c_float),
        ("attention_scale", c_float),
        ("embed_scale", c_float),
        ("attention_cap", c_float),
        ("logit_cap", c_float),
        ("block_stride", c_int64),
        ("layers", POINTER(CLayer)),
        ("head", CLinear),
        ("embedding", CLinear),
        ("position_embedding", c_void_p),
        ("final_norm", c_void_p),
        ("final_norm_bias", c_void_p),
    )


class CStep(Structure):
    """hw_step."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("num_entries", c_int32),
        ("num_logits", c_int32),
        ("reserved", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("entry_starts", c_void_p),
        ("block_tables", c_void_p),
        ("table_starts", c_void_p),
        ("logits_tokens", c_void_p),
        ("logits_slots", c_void_p),
        ("logits", c_void_p),
        ("best_ids", c_void_p),
        ("is_finite", c_void_p),
    )


class CRow(Structure):
    """hw_row."""

    _fields_ = (
        ("logits", c_void_p),
        ("mask", c_void_p),
        ("repeated_ids", c_void_p),
        ("output_ids", c_void_p),
        ("bias_ids", c_void_p),
        ("banned_ids", c_void_p),
        ("allowed_ids", c_void_p),
        ("output_counts", c_void_p),
        ("bias_values", c_void_p),
        ("seed", c_uint64),
        ("position", c_uint64),
        ("top_p", c_double),
        ("repetition_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("temperature", c_float),
        ("lowest_score", c_float),
        ("top_k", c_int32),
        ("num_repeated", c_int32),
        ("num_output", c_int32),
        ("num_bias", c_int32),
        ("num_banned", c_int32),
        ("num_allowed", c_int32),
        ("best_id", c_int32),
        ("token_id", c_int32),
        ("reserved", c_int32),
    )


class Library:
    """One loaded shared library. Calls release the GIL."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise TierUnavailable(f"the native kernels do not load ({error})", remedy=f"delete {path}") from error
        step_arguments = (c_void_p, POINTER(CModel), POINTER(CStep))
        pack = (c_void_p, c_int32, c_int32, c_int32, c_int32, c_int32)
        self.open = self._function("hw_open", c_void_p, c_int32)
        self.close = self._function("hw_close", None, c_void_p)
        self.forward = self._function("hw_forward", c_int32, *step_arguments)
        self.score = self._function("hw_score", c_int32, *step_arguments)
        self.draw = self._function("hw_draw", c_int32, c_void_p, c_int32, c_int32, c_void_p)
        self.pack_bf16 = self._function("hw_pack_bf16", None, c_void_p, *pack)
        self.pack_int8 = self._function("hw_pack_int8", None, c_void_p, c_void_p, c_void_p, *pack)
        self.pack_blocks = self._function(
            "hw_pack_blocks", None, c_void_p, c_int32, c_void_p, c_int32, c_int32, c_int32, c_void_p
        )
        self.quantise_rows = self._function("hw_quantise_rows", None, c_void_p, c_int32, c_void_p, c_int32, c_int32)
        self.round_bf16 = self._function("hw_round_bf16", None, c_void_p, c_void_p, c_int64)
        self.first_not_finite = self._function("hw_first_not_finite", c_int64, c_void_p, c_int64)
        self._check_sizes()

    def function(self, name: str, result: type | None, *arguments: type) -> "ctypes._NamedFuncPointer":
        """Another exported function, typed: benchmarks and tests of single kernels."""
        return self._function(name, result, *arguments)

    def _function(self, name: str, result: type | None, *arguments: type) -> "ctypes._NamedFuncPointer":
        function = self._library[name]
        function.restype = result
        function.argtypes = list(arguments)
        return function

    def _check_sizes(self) -> None:
        sizes = np.zeros(5, dtype=np.int32)
        self._function("hw_sizes", None, c_void_p)(sizes.ctypes.data)
        ours = [ctypes.sizeof(struct) for struct in (CLinear, CLayer, CModel, CStep, CRow)]
        if sizes.tolist() != ours:
            raise TierUnavailable(f"the native kernels have structs of {sizes.tolist()} bytes, not {ours}")


def address(array: NDArray[np.generic] | None) -> int | None:
    """Where a contiguous array's data begins; None stays None (a null pointer)."""
    return None if array is None else array.ctypes.data
