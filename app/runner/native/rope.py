"""Rotary embeddings: radians a position for each pair of dimensions, in float32 as transformers computes them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class UnknownRope(ValueError):
    """Parameters that no kernel serves."""


@dataclass(frozen=True)
class Rope:
    """How the heads of a layer turn."""

    inverse_frequencies: NDArray[np.float32]
    """(rotary_dim / 2,): radians a position; empty: they do not turn."""
    factor: float = 1.0
    """On cosines and sines."""

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn."""
        return 2 * len(self.inverse_frequencies)


NO_ROPE = Rope(np.zeros(0, dtype=np.float32))

_LLAMA3_FIELDS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_YARN_FIELDS = {
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate",
}  # fmt: skip


def make_rope(parameters: Mapping[str, Any], *, theta: float, head_dim: int, max_positions: int) -> Rope:
    """The rotation that `rope_parameters` (or `rope_scaling`) describes; `theta` where it names none.

    Raises UnknownRope for a kind or a field that is not known.
    """
    left = {name: value for name, value in parameters.items() if value is not None}
    base = float(left.pop("rope_theta", theta))
    kind = left.pop("rope_type", left.pop("type", "default"))
    left.pop("type", None)
    rotary_dim = int(head_dim * float(left.pop("partial_rotary_factor", 1.0)))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise UnknownRope(f"rotates {rotary_dim} of {head_dim} dimensions")
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    plain = (np.float32(1.0) / np.float32(base) ** exponents).astype(np.float32)
    if kind == "default" and not left.keys() - {"factor"}:
        return Rope(plain)
    if kind == "linear" and left.keys() == {"factor"}:
        return Rope((plain / np.float32(left["factor"])).astype(np.float32))
    if kind == "llama3" and left.keys() == _LLAMA3_FIELDS:
        return Rope(_llama3(plain, **{name: float(value) for name, value in left.items()}))
    if kind == "yarn" and "factor" in left and left.keys() <= _YARN_FIELDS:
        return _yarn(plain, base, left, max_positions=max_positions)
    raise UnknownRope(f"{ {'rope_type': kind, **left} }")


def _llama3(
    plain: NDArray[np.float32],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> NDArray[np.float32]:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    wavelength = np.float32(2 * math.pi) / plain
    low, high = original_max_position_embeddings / low_freq_factor, original_max_position_embeddings / high_freq_factor
    smooth = (np.float32(original_max_position_embeddings) / wavelength - np.float32(low_freq_factor)) / np.float32(
        high_freq_factor - low_freq_factor
    )
    stretched = plain / np.float32(factor)
    blended = (np.float32(1.0) - smooth) * stretched + smooth * plain
    result = np.where(wavelength > low, stretched, np.where(wavelength < high, plain, blended))
    return result.astype(np.float32)


def _yarn(plain: NDArray[np.float32], base: float, fields: Mapping[str, Any], *, max_positions: int) -> Rope:
    """YaRN (Peng et al., 2023): dimensions that turn often are kept, those that turn seldom are stretched."""
    factor, pairs = float(fields["factor"]), len(plain)
    original = float(fields.get("original_max_position_embeddings", max_positions))

    def dimension(rotations: float) -> float:
        return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(base)

    low, high = dimension(float(fields.get("beta_fast", 32))), dimension(float(fields.get("beta_slow", 1)))
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(pairs, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    mixed = plain / np.float32(factor) * ramp + plain * (np.float32(1.0) - ramp)
    return Rope(mixed.astype(np.float32), _yarn_factor(fields, factor))


def _yarn_factor(fields: Mapping[str, Any], factor: float) -> float:
    if "attention_factor" in fields:
        return float(fields["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)
