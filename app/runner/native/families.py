"""Which config.json the kernels serve: one table of families, every field checked.

A field is used, harmless (it cannot change logits), or its value must be one that the kernels compute
anyway. Anything else means the next tier, with the field named: nothing is guessed.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.errors import ConfigurationError
from app.runner.base import TierUnavailable

HEAD_DIMS = (32, 64, 96, 128)


@dataclass(frozen=True)
class Family:
    """A model_type of the llama shape and its switches."""

    qkv_bias: bool = False
    """Always there, whatever attention_bias says (qwen2)."""
    qk_norm: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}

_HARMLESS = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype", "eos_token_id",
        "id2label", "initializer_range", "is_llama_config", "label2id", "max_window_layers", "model_type",
        "pad_token_id", "pretraining_tp", "return_dict", "torch_dtype", "transformers.js_config",
        "transformers_version", "use_cache",
    }
)  # fmt: skip
_USED = frozenset(
    {
        "attention_bias", "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "mlp_bias",
        "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
        "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "vocab_size",
    }
)  # fmt: skip
_ONE_VALUE: Mapping[str, Callable[[Any], bool]] = {
    "add_cross_attention": lambda value: value is False,
    "chunk_size_feed_forward": lambda value: value == 0,
    "hidden_act": lambda value: value in ("silu", "swish"),
    "is_decoder": lambda value: isinstance(value, bool),
    "is_encoder_decoder": lambda value: value is False,
    "layer_types": lambda value: value is None or set(value) == {"full_attention"},
    "output_attentions": lambda value: value is False,
    "output_hidden_states": lambda value: value is False,
    "partial_rotary_factor": lambda value: value in (None, 1, 1.0),
    "quantization_config": lambda value: value is None,
    "rope_interleaved": lambda value: value is False,
    "use_sliding_window": lambda value: value is False,
}


@dataclass(frozen=True)
class ModelShape:
    """What the kernels need to know of a model."""

    model_type: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    norm_eps: float
    max_positions: int
    inverse_frequencies: NDArray[np.float32]
    """(head_dim / 2,): radians a position."""
    is_tied: bool
    """The head is the embedding."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of all layers in bf16."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * 2


def read_shape(model_dir: Path) -> ModelShape:
    """Read and check config.json.

    Raises TierUnavailable with the field that the kernels do not know, ConfigurationError where it is no JSON object.
    """
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigurationError(f"{path} is no JSON ({error}): fetch the model again") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} is no JSON object: fetch the model again")
    return shape_of(config)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """`read_shape` for a parsed config.json."""
    try:
        return _shape_of(config)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"config.json has a value that the native kernels do not understand ({type(error).__name__}: {error})"
        raise TierUnavailable(reason) from error


def _shape_of(config: Mapping[str, Any]) -> ModelShape:
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise _unknown("model_type", model_type)
    _check_fields(config)
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    head_dim = config.get("head_dim")
    attention_bias = bool(config.get("attention_bias"))
    shape = ModelShape(
        model_type=str(model_type),
        num_layers=_count(config, "num_hidden_layers"),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads"),
        head_dim=hidden // heads if head_dim is None else _count(config, "head_dim"),
        intermediate=_count(config, "intermediate_size"),
        vocab_size=_count(config, "vocab_size"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=_count(config, "max_position_embeddings"),
        inverse_frequencies=_inverse_frequencies(config, hidden // heads if head_dim is None else int(head_dim)),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias and not family.qkv_bias,
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=family.qk_norm,
    )
    _check_sizes(shape)
    return shape


def _unknown(field: str, value: object) -> TierUnavailable:
    return TierUnavailable(f"config.json has {field} = {value!r}, which the native kernels do not know")


def _check_fields(config: Mapping[str, Any]) -> None:
    for field, value in config.items():
        if field in _ONE_VALUE:
            if not _ONE_VALUE[field](value):
                raise _unknown(field, value)
        elif field not in _HARMLESS and field not in _USED:
            raise _unknown(field, value)
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window") is not False:
        raise _unknown("sliding_window", window)


def _count(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unknown(field, value)
    return value


def _check_sizes(shape: ModelShape) -> None:
    """Sizes that no kernel takes."""
    if shape.head_dim not in HEAD_DIMS:
        raise _unknown("head_dim", shape.head_dim)
    if shape.num_heads % shape.num_kv_heads or shape.num_heads // shape.num_kv_heads > 64:
        raise _unknown("num_key_value_heads", shape.num_kv_heads)
    if shape.hidden % 16:
        raise _unknown("hidden_size", shape.hidden)
    if shape.intermediate % 16:
        raise _unknown("intermediate_size", shape.intermediate)


def _inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """Radians a position for each pair of dimensions, in float32 as transformers computes them."""
    rope = dict(config.get("rope_scaling") or {})
    rope.update(config.get("rope_parameters") or {})
    theta = float(rope.pop("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise _unknown("rope_parameters", config.get("rope_parameters"))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)
    if kind == "default" and not rope.keys() - {"factor"}:
        return plain
    if kind == "linear" and rope.keys() == {"factor"}:
        return (plain / np.float32(rope["factor"])).astype(np.float32)
    if kind == "llama3" and rope.keys() == _LLAMA3_FIELDS:
        return _llama3(plain, **{name: float(value) for name, value in rope.items()})
    raise _unknown("rope_parameters" if config.get("rope_parameters") else "rope_scaling", {"rope_type": kind, **rope})


_LLAMA3_FIELDS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


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
