"""Which config.json the kernels serve: one table of families, every field checked.

A field is used, harmless (it cannot change logits), or its value must be one that the kernels compute
anyway. Anything else means the next tier, with the field named: nothing is guessed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.errors import ConfigurationError
from app.runner.base import TierUnavailable
from app.runner.native.rope import NO_ROPE, Rope, UnknownRope, make_rope
from app.runner.native.tensor_names import FUSED, GPT2, SPLIT, SURROUNDED, TensorNames

HEAD_DIMS = tuple(range(16, 257, 16))


class Activation(IntEnum):
    """Of the MLP: the values of hw_model.activation."""

    SILU_GATED = 0
    GELU_GATED = 1
    """The approximation by tanh."""
    GELU = 2
    """Without a gate."""


@dataclass(frozen=True)
class Family:
    """A model_type and its switches."""

    names: TensorNames = SPLIT
    qkv_bias: bool = False
    """Always there, whatever attention_bias says (qwen2)."""
    all_biases: bool = False
    """Of every linear but the head (gpt2)."""
    qk_norm: bool = False
    is_gemma: bool = False
    """Norms multiply by 1 + weight, embeddings are scaled, gelu is the default."""
    is_gpt2: bool = False
    """LayerNorm with a bias, learned positions, no rotation, no gate, matrices stored the other way round."""
    has_window: bool = False
    """Knows sliding_window."""
    has_partial_rope: bool = False
    """Knows partial_rotary_factor."""
    norm_eps: float = 1e-6
    """Where config.json says none."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(has_window=True),
    "qwen2": Family(qkv_bias=True, has_window=True),
    "qwen3": Family(qk_norm=True, has_window=True),
    "phi3": Family(names=FUSED, has_window=True, has_partial_rope=True, norm_eps=1e-5),
    "gemma": Family(is_gemma=True),
    "gemma2": Family(names=SURROUNDED, is_gemma=True, has_window=True),
    "gemma3_text": Family(names=SURROUNDED, is_gemma=True, qk_norm=True, has_window=True),
    "gpt2": Family(names=GPT2, all_biases=True, is_gpt2=True, norm_eps=1e-5),
}

_HARMLESS = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id",
        "cache_implementation", "dtype", "embd_pdrop", "eos_token_id", "gradient_checkpointing", "id2label",
        "initializer_range", "is_llama_config", "label2id", "model_type", "n_ctx", "pad_token_id", "pretraining_tp",
        "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
        "torch_dtype", "transformers.js_config", "transformers_version", "use_cache",
    }
)  # fmt: skip
_USED = frozenset(
    {
        "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
        "max_position_embeddings", "max_window_layers", "mlp_bias", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "rope_scaling",
        "rope_theta", "sliding_window", "tie_word_embeddings", "use_sliding_window", "vocab_size",
    }
)  # fmt: skip
_USED_BY: Mapping[str, frozenset[str]] = {
    "phi3": frozenset({"original_max_position_embeddings"}),
    "gemma": frozenset({"hidden_activation"}),
    "gemma2": frozenset(
        {"attn_logit_softcapping", "final_logit_softcapping", "hidden_activation", "query_pre_attn_scalar"}
    ),
    "gemma3_text": frozenset(
        {
            "_sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping", "hidden_activation",
            "query_pre_attn_scalar", "rope_local_base_freq", "sliding_window_pattern",
        }
    ),
}  # fmt: skip
"""Fields that change nothing but in these families, where they are read."""
_ONE_VALUE: Mapping[str, Callable[[Any], bool]] = {
    "add_cross_attention": lambda value: value is False,
    "chunk_size_feed_forward": lambda value: value == 0,
    "is_decoder": lambda value: isinstance(value, bool),
    "is_encoder_decoder": lambda value: value is False,
    "output_attentions": lambda value: value is False,
    "output_hidden_states": lambda value: value is False,
    "quantization_config": lambda value: value is None,
    "rope_interleaved": lambda value: value is False,
    "scale_attn_by_inverse_layer_idx": lambda value: value is False,
    "scale_attn_weights": lambda value: value is True,
    "use_bidirectional_attention": lambda value: value in (None, False),
}
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation.SILU_GATED,
    "swish": Activation.SILU_GATED,
    "gelu_pytorch_tanh": Activation.GELU_GATED,
    "gelu_new": Activation.GELU_GATED,
}
_GPT2_NAMES: Mapping[str, str] = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings", "n_inner": "intermediate_size", "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}  # fmt: skip


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
    ropes: tuple[Rope, ...]
    """How each layer turns its heads."""
    windows: tuple[int, ...]
    """Tokens that a token of each layer sees, itself among them; 0: all before it."""
    is_tied: bool
    """The head is the embedding."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    names: TensorNames
    activation: Activation
    norm_offset: float
    """Added to the weights of norms."""
    embed_scale: float
    attention_scale: float
    attention_cap: float
    """Of scores; 0: none."""
    logit_cap: float
    """Of logits; 0: none."""

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of all layers in bf16."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * 2

    @property
    def inverse_frequencies(self) -> NDArray[np.float32]:
        """Of the last layer."""
        return self.ropes[-1].inverse_frequencies


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
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        raise _unknown("model_type", config.get("model_type"))
    if family.is_gpt2:
        config = {_GPT2_NAMES.get(field, field): value for field, value in config.items()}
        if config.get("intermediate_size") is None:
            config = {**config, "intermediate_size": 4 * _count(config, "hidden_size")}
    _check_fields(config, _USED_BY.get(model_type, frozenset()))
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    head_dim = _head_dim(config, family, hidden // heads)
    num_layers = _count(config, "num_hidden_layers")
    attention_bias = bool(config.get("attention_bias"))
    layer_types = _layer_types(config, family, num_layers)
    ropes = {kind: NO_ROPE if family.is_gpt2 else _rope(config, kind, head_dim) for kind in set(layer_types)}
    shape = ModelShape(
        model_type=model_type,
        num_layers=num_layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads"),
        head_dim=head_dim,
        intermediate=_count(config, "intermediate_size"),
        vocab_size=_count(config, "vocab_size"),
        norm_eps=float(config.get("rms_norm_eps", family.norm_eps)),
        max_positions=_count(config, "max_position_embeddings"),
        ropes=tuple(ropes[kind] for kind in layer_types),
        windows=tuple(_count(config, "sliding_window") if kind == _SLIDING else 0 for kind in layer_types),
        is_tied=bool(config.get("tie_word_embeddings", family.is_gemma or family.is_gpt2)),
        qkv_bias=family.qkv_bias or family.all_biases or attention_bias,
        output_bias=family.all_biases or (attention_bias and not family.qkv_bias),
        mlp_bias=family.all_biases or bool(config.get("mlp_bias")),
        qk_norm=family.qk_norm,
        names=family.names,
        activation=_activation(config, family),
        norm_offset=1.0 if family.is_gemma else 0.0,
        embed_scale=hidden**0.5 if family.is_gemma else 1.0,
        attention_scale=float(config.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        attention_cap=float(config.get("attn_logit_softcapping") or 0.0),
        logit_cap=float(config.get("final_logit_softcapping") or 0.0),
    )
    _check_sizes(shape)
    return shape


def _unknown(field: str, value: object) -> TierUnavailable:
    return TierUnavailable(f"config.json has {field} = {value!r}, which the native kernels do not know")


def _check_fields(config: Mapping[str, Any], used_by_family: frozenset[str]) -> None:
    for field, value in config.items():
        if field in _ONE_VALUE:
            if not _ONE_VALUE[field](value):
                raise _unknown(field, value)
        elif field not in _HARMLESS and field not in _USED and field not in used_by_family:
            raise _unknown(field, value)


def _count(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unknown(field, value)
    return value


def _head_dim(config: Mapping[str, Any], family: Family, default: int) -> int:
    if config.get("head_dim") is not None:
        return _count(config, "head_dim")
    return 256 if family.is_gemma else default


def _activation(config: Mapping[str, Any], family: Family) -> Activation:
    field = "hidden_activation" if config.get("hidden_activation") is not None else "hidden_act"
    name = config.get(field, "gelu_pytorch_tanh" if family.is_gemma else "gelu_new" if family.is_gpt2 else "silu")
    if name not in _ACTIVATIONS or (family.is_gpt2 and _ACTIVATIONS[name] is not Activation.GELU_GATED):
        raise _unknown(field, name)
    return Activation.GELU if family.is_gpt2 else _ACTIVATIONS[name]


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _layer_types(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[str, ...]:
    """Whether each layer sees all tokens or a window of them."""
    window, asked = config.get("sliding_window"), config.get("layer_types")
    if asked is not None:
        if len(asked) != num_layers or set(asked) - {_FULL, _SLIDING} or (_SLIDING in asked and not family.has_window):
            raise _unknown("layer_types", asked)
        types = tuple(str(kind) for kind in asked)
        if family.qkv_bias or family.qk_norm or family.is_gemma:
            return types
        return types if window is not None else (_FULL,) * num_layers
    if window is None or config.get("use_sliding_window", not _is_switched(config)) is False:
        return (_FULL,) * num_layers
    if not family.has_window:
        raise _unknown("sliding_window", window)
    first, period = 0, 0
    if config["model_type"] in ("qwen2", "qwen3"):
        first = int(config.get("max_window_layers", 28))
    elif family.is_gemma:
        default = 2 if config["model_type"] == "gemma2" else 6
        period = int(config.get("sliding_window_pattern", config.get("_sliding_window_pattern", default)))
    return tuple(
        _FULL if index < first or (period and (index + 1) % period == 0) else _SLIDING for index in range(num_layers)
    )


def _is_switched(config: Mapping[str, Any]) -> bool:
    """Families whose window is off unless use_sliding_window says so."""
    return config["model_type"] in ("qwen2", "qwen3")


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


def _rope(config: Mapping[str, Any], layer_type: str, head_dim: int) -> Rope:
    """The rotation of a layer of this type."""
    parameters = dict(config.get("rope_scaling") or {})
    given = config.get("rope_parameters") or {}
    per_type = any(isinstance(value, Mapping) for value in given.values())
    parameters.update(given[layer_type] if per_type else given)
    theta = float(config.get("rope_theta", 10000.0 if config["model_type"] != "gemma3_text" else 1e6))
    if layer_type == _SLIDING and config["model_type"] == "gemma3_text" and not per_type:
        parameters, theta = {}, float(config.get("rope_local_base_freq", 10000.0))
    if config.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if parameters.get("partial_rotary_factor") not in (None, 1) and not FAMILIES[config["model_type"]].has_partial_rope:
        raise _unknown("partial_rotary_factor", parameters["partial_rotary_factor"])
    if config.get("original_max_position_embeddings") and parameters.get("rope_type", parameters.get("type")) == "yarn":
        parameters.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    try:
        return make_rope(
            parameters, theta=theta, head_dim=head_dim, max_positions=_count(config, "max_position_embeddings")
        )
    except UnknownRope as error:
        raise _unknown("rope_parameters" if given else "rope_scaling", str(error)) from error
