"""Which checkpoints this runner takes, decided from config.json before weights are read.

A family outside VERIFIED passes too, if it uses transformers' attention interface: its logits are then
compared with transformers' own attention at load (`app.runner.torch.check`).
"""

from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from app.runner.base import TierUnavailable

VERIFIED = frozenset(
    {
        "cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "mistral",
        "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
    }
)  # fmt: skip
"""Families that tests/numerics holds token for token against transformers."""

_MASK_ONLY_WINDOW = frozenset({"blt", "doge", "phimoe", "qwen2_moe"})
"""They say their sliding window in the mask alone, which this runner never asks for."""
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
_LENGTH_ROPE = frozenset({"dynamic", "longrope"})
"""Rotations that change with the longest sequence of the batch."""


def check_family(config: PreTrainedConfig) -> None:
    """Raise TierUnavailable, with the reason, for what cannot work here."""
    family = config.model_type
    if config.is_encoder_decoder:
        raise TierUnavailable(f"{family} is an encoder-decoder; this server runs decoders alone")
    if getattr(config, "quantization_config", None) is not None:
        raise TierUnavailable(
            f"the checkpoint is quantized ({_quantization_method(config)})", remedy="use the unquantized checkpoint"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise TierUnavailable(f"transformers {transformers.__version__} has no causal language model for {family!r}")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not model_class.is_backend_compatible():
        raise TierUnavailable(
            f"transformers {transformers.__version__} lets nobody bring an attention for {family!r} "
            "(state-space and hybrid models, position biases)"
        )
    text = config.get_text_config()
    unknown = set(getattr(text, "layer_types", None) or ()) - _KNOWN_LAYERS
    if unknown:
        raise TierUnavailable(f"{family} has layers of kinds that no KV pool is there for: {sorted(unknown)}")
    if getattr(text, "attention_chunk_size", None):
        raise TierUnavailable(f"{family} attends within chunks of {text.attention_chunk_size} tokens")
    if family in _MASK_ONLY_WINDOW and _has_window(text):
        raise TierUnavailable(f"{family} does not tell its attention its sliding window of {text.sliding_window}")


def context_length(config: PreTrainedConfig) -> int:
    """Positions that the model was made for, as far as a row's tokens depend on nothing but the row."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not isinstance(length, int):
        raise TierUnavailable(
            f"config.json of this {config.model_type} does not say how long its context is",
            remedy="set max_position_embeddings in config.json",
        )
    for rope in _rope_parameters(text):
        if rope.get("rope_type") in _LENGTH_ROPE:
            original = rope.get("original_max_position_embeddings") or length
            length = min(length, int(original))
    return length


def _rope_parameters(text: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotation's settings, one or one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def _has_window(text: PreTrainedConfig) -> bool:
    return getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)


def _quantization_method(config: PreTrainedConfig) -> str:
    settings = config.quantization_config
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(method or "unknown method")
