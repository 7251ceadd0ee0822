"""From the metadata of a GGUF file to config.json and generation_config.json as transformers spells them.

One row of `_FAMILIES` per architecture. Every metadata key of the architecture must be known here: one
that is not could change the computation, so the file is refused by naming it.
"""

import math
from collections.abc import Mapping

import msgspec

from app.core.errors import ConfigurationError
from app.store.gguf_file import GgufFile, GgufValue

Json = dict[str, object]


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What an architecture's files look like and what transformers calls it."""

    architecture: str
    """`architectures` of config.json."""
    permuted_rope: bool
    """llama.cpp interleaves the rows of q and k for its rotary kernel."""
    qkv_bias: bool | None
    """None: where the file has them."""
    qk_norm: bool = False
    model_type: str | None = None
    """Of config.json, where it is another than the file's architecture."""
    has_post_norms: bool = False
    """A norm behind each branch too."""
    added_to_norms: float = 0.0
    """What llama.cpp added to the weights of norms."""
    extra: Mapping[str, object] = {}
    """Constant fields of config.json."""


_FAMILIES: Mapping[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", permuted_rope=True, qkv_bias=None),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM", permuted_rope=False, qkv_bias=True, extra={"use_sliding_window": False}
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        permuted_rope=False,
        qkv_bias=False,
        qk_norm=True,
        extra={"use_sliding_window": False},
    ),
    "gemma3": Family(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        permuted_rope=False,
        qkv_bias=False,
        qk_norm=True,
        has_post_norms=True,
        added_to_norms=1.0,
        extra={"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0},
    ),
}
_GEMMA3_PERIOD = 6
"""Every sixth layer sees all tokens: llama.cpp has it in its code, not in the file."""
_GEMMA3_27B_LAYERS = 62
"""The one size whose scores are scaled by another number than the head size; as in llama.cpp."""

_KNOWN_FIELDS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    }
)
_KNOWN_OF: Mapping[str, frozenset[str]] = {"gemma3": frozenset({"attention.sliding_window"})}
_OFF_WHEN_ZERO = frozenset({"expert_count", "expert_used_count"})
"""Written by some converters for dense models too, with the value 0."""


class GgufModel(msgspec.Struct, frozen=True, kw_only=True):
    """A GGUF file understood as a decoder: everything the tensors and config.json depend on."""

    file: GgufFile
    model_type: str
    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Json | None
    tied: bool
    """The file has no output matrix of its own."""
    attention_bias: bool
    """Of q, k and v."""
    output_bias: bool
    """Of the attention's output. transformers' llama has one switch for all four."""


def read_model(file: GgufFile) -> GgufModel:
    """Check the metadata and say what model it describes.

    Raises:
        ConfigurationError: an architecture, field or value that is not supported, by name.
    """
    model_type = _text(file, "general.architecture")
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ConfigurationError(
            f"{file.path} holds a {model_type!r} model; .gguf files of these architectures are read: {known}. "
            "Serve the model's safetensors folder instead"
        )
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ConfigurationError(f"{file.path} is one part of several; merge them with llama.cpp's gguf-split --merge")
    _refuse_unknown_fields(file, model_type)
    hidden_size = _count(file, model_type, "embedding_length")
    num_heads = _count(file, model_type, "attention.head_count")
    num_kv_heads = _count(file, model_type, "attention.head_count_kv", default=num_heads)
    if num_heads % num_kv_heads:
        raise ConfigurationError(f"{file.path}: {num_heads} heads cannot share {num_kv_heads} key and value heads")
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise ConfigurationError(f"{file.path} has no token embeddings (token_embd.weight); it holds no whole model")
    family = _FAMILIES[model_type]
    has_bias = "blk.0.attn_q.bias" in file.tensors
    return GgufModel(
        file=file,
        model_type=model_type,
        family=family,
        num_layers=_num_layers(file, model_type),
        hidden_size=hidden_size,
        intermediate_size=_count(file, model_type, "feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(file, model_type, default=hidden_size // num_heads),
        vocab_size=embeddings.shape[0],
        max_position_embeddings=_count(file, model_type, "context_length"),
        rms_norm_eps=_number(file, f"{model_type}.attention.layer_norm_rms_epsilon"),
        rope_theta=_number(file, f"{model_type}.rope.freq_base", default=10000.0),
        rope_scaling=_rope_scaling(file, model_type),
        tied="output.weight" not in file.tensors,
        attention_bias=has_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=has_bias and family.qkv_bias is None,
    )


def config_json(model: GgufModel) -> Json:
    """The content of config.json."""
    config: Json = {
        "architectures": [model.family.architecture],
        "model_type": model.family.model_type or model.model_type,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": model.rope_scaling,
        "tie_word_embeddings": model.tied,
        "vocab_size": model.vocab_size,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **model.family.extra,
    }
    if model.family.qkv_bias is not True:  # qwen2 has no such field: its q, k and v always carry a bias
        config["attention_bias"] = model.attention_bias
    if model.model_type == "llama":
        config["mlp_bias"] = False
    if model.model_type == "gemma3":
        del config["hidden_act"]
        config.update(_gemma3_fields(model))
    config.update(_special_ids(model))
    return config


def _gemma3_fields(model: GgufModel) -> Json:
    is_27b = model.num_layers == _GEMMA3_27B_LAYERS
    return {
        "query_pre_attn_scalar": model.hidden_size // model.num_heads if is_27b else model.head_dim,
        "sliding_window": _count(model.file, model.model_type, "attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (index + 1) % _GEMMA3_PERIOD else "full_attention"
            for index in range(model.num_layers)
        ],
    }


def generation_config_json(model: GgufModel) -> Json:
    """The content of generation_config.json: every id that ends an answer."""
    config: Json = dict(_special_ids(model))
    eos_ids = [config["eos_token_id"]] if "eos_token_id" in config else []
    for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
        token_id = _token_id(model, key)
        if token_id is not None and token_id not in eos_ids:
            eos_ids.append(token_id)
    if eos_ids:
        config["eos_token_id"] = eos_ids[0] if len(eos_ids) == 1 else eos_ids
    return config


def _special_ids(model: GgufModel) -> dict[str, int]:
    fields = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {field: _token_id(model, f"tokenizer.ggml.{name}_token_id") for field, name in fields.items()}
    return {field: token_id for field, token_id in ids.items() if token_id is not None}


def _token_id(model: GgufModel, key: str) -> int | None:
    value = model.file.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < model.vocab_size:
        raise ConfigurationError(f"{model.file.path}: {key} is {value!r}, outside the vocabulary")
    return value


def _refuse_unknown_fields(file: GgufFile, model_type: str) -> None:
    for key, value in file.metadata.items():
        prefix, _, field = key.partition(".")
        known = _KNOWN_FIELDS | _KNOWN_OF.get(model_type, frozenset())
        if prefix != model_type or field in known or (field in _OFF_WHEN_ZERO and value == 0):
            continue
        raise ConfigurationError(
            f"{file.path} sets {key} = {_shown(value)}, which changes the computation in a way that is not "
            "supported for .gguf files; serve the model's safetensors folder instead"
        )


def _num_layers(file: GgufFile, model_type: str) -> int:
    num_layers = _count(file, model_type, "block_count")
    if num_layers > len(file.tensors):
        raise ConfigurationError(f"{file.path} announces {num_layers} layers and has {len(file.tensors)} tensors")
    return num_layers


def _head_dim(file: GgufFile, model_type: str, *, default: int) -> int:
    head_dim = _count(file, model_type, "attention.key_length", default=default)
    for field in ("attention.value_length", "rope.dimension_count"):
        size = _count(file, model_type, field, default=head_dim)
        if size != head_dim:
            raise ConfigurationError(
                f"{file.path} sets {model_type}.{field} = {size} beside a head size of {head_dim}; "
                "only equal sizes are supported"
            )
    if head_dim % 2:
        raise ConfigurationError(f"{file.path} has an odd head size, {head_dim}")
    return head_dim


def _rope_scaling(file: GgufFile, model_type: str) -> Json | None:
    prefix = f"{model_type}.rope.scaling"
    kind = file.metadata.get(f"{prefix}.type", "none")
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:
        if kind != "none":
            raise ConfigurationError(f"{file.path} has both rotary factors and {prefix}.type = {kind!r}")
        return _llama3_scaling(file, model_type)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _number(file, f"{prefix}.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": _number(file, f"{prefix}.factor"),
            "original_max_position_embeddings": _count(file, model_type, "rope.scaling.original_context_length"),
        }
    raise ConfigurationError(f"{file.path} sets {prefix}.type = {kind!r}; none, linear and yarn are supported")


def _llama3_scaling(file: GgufFile, model_type: str) -> Json:
    """Find the parameters that give the stored rotary factors: GGUF keeps the factors alone."""
    import numpy as np

    tensor = file.tensors["rope_freqs.weight"]
    if tensor.type_name != "F32":
        raise ConfigurationError(f"{file.path}: rope_freqs.weight is {tensor.type_name}, expected F32")
    stored = np.array(file.raw(tensor).view(np.float32).reshape(-1), dtype=np.float64)  # (head_dim / 2,)
    theta = _number(file, f"{model_type}.rope.freq_base", default=10000.0)
    low, high, original, factor = 1.0, 4.0, 8192, float(stored.max(initial=0.0))
    wavelengths = 2 * math.pi * theta ** (np.arange(len(stored)) / len(stored))
    if math.isfinite(factor) and factor >= 1.0:
        smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
        expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if np.allclose(stored, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ConfigurationError(
        f"{file.path} stores rotary factors (rope_freqs.weight) that are not those of Llama 3; "
        "serve the model's safetensors folder instead"
    )


def _text(file: GgufFile, key: str) -> str:
    value = file.metadata.get(key)
    if not isinstance(value, str):
        raise ConfigurationError(f"{file.path}: {key} is {_shown(value)}, expected a string")
    return value


def _count(file: GgufFile, model_type: str, field: str, *, default: int | None = None) -> int:
    value = file.metadata.get(f"{model_type}.{field}", default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise ConfigurationError(f"{file.path}: {model_type}.{field} is {_shown(value)}, expected one positive number")
    return value


def _number(file: GgufFile, key: str, *, default: float | None = None) -> float:
    """A float32 as the shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    value = file.metadata.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ConfigurationError(f"{file.path}: {key} is {_shown(value)}, expected a positive number")
    return float(str(np.float32(value)))


def _shown(value: GgufValue | None) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "missing" if value is None else repr(value)[:80]
