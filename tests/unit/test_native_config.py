"""The loader's table: what it serves, and that anything unknown is named and refused."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.core.errors import ConfigurationError
from app.runner.base import TierUnavailable
from app.runner.native.families import read_shape, shape_of
from app.runner.native.safetensors import read_tensors
from tests.native_models import GPT2, LLAMA, OTHER_FAMILIES


def test_a_plain_llama_is_understood() -> None:
    shape = shape_of({**LLAMA, "transformers_version": "5.0", "torch_dtype": "bfloat16", "rope_scaling": None})
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (6, 2, 64)
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 64 * 2
    assert not shape.qkv_bias and not shape.qk_norm and shape.is_tied


def test_defaults_follow_transformers() -> None:
    config = {name: value for name, value in LLAMA.items() if name not in ("head_dim", "num_key_value_heads")}
    shape = shape_of({**config, "hidden_size": 384})
    assert (shape.head_dim, shape.num_kv_heads) == (64, 6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma4"}, "model_type = 'gemma4'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window = 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "surprise": 1}}, "surprise"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"head_dim": 72}, "head_dim = 72"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4"),
        ({"hidden_size": 200}, "hidden_size = 200"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None"),
    ],
)
def test_what_it_does_not_know_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(TierUnavailable, match="native kernels do not know") as refused:
        shape_of({**LLAMA, **changes})
    assert named in refused.value.reason


def windows(changes: dict[str, Any]) -> tuple[int, ...]:
    return shape_of({**LLAMA, "num_hidden_layers": 6, **changes}).windows


def test_windows_follow_transformers() -> None:
    gemma2 = {**OTHER_FAMILIES["gemma2"], "layer_types": None}
    gemma3 = {**OTHER_FAMILIES["gemma3"], "layer_types": None}
    assert windows({}) == (0,) * 6
    assert windows({"model_type": "mistral", "sliding_window": 4}) == (4,) * 6
    assert windows({"model_type": "qwen2", "sliding_window": 4}) == (0,) * 6
    switched = {"model_type": "qwen3", "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 4}
    assert windows(switched) == (0, 0, 0, 0, 4, 4)
    assert windows(gemma2) == (40, 0) * 3
    assert windows(gemma3) == (40,) * 5 + (0,)
    assert windows({**gemma3, "sliding_window_pattern": 3}) == (40, 40, 0) * 2


def test_gpt2_has_names_of_its_own() -> None:
    shape = shape_of(GPT2)
    assert (shape.hidden, shape.num_heads, shape.head_dim, shape.intermediate) == (192, 3, 64, 768)
    assert (shape.max_positions, shape.is_tied, shape.ropes[0].rotary_dim) == (512, True, 0)


def test_a_window_that_is_switched_off_is_harmless() -> None:
    config = {**LLAMA, "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}
    assert shape_of({**config, "max_window_layers": 28}).qkv_bias


def test_rope_parameters_carry_theta() -> None:
    old = shape_of({**LLAMA, "rope_theta": 5e5})
    config = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    new = shape_of({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert np.array_equal(old.inverse_frequencies, new.inverse_frequencies)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_config_that_is_no_json_object_ends_the_start(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"config\.json .* fetch the model again"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": None},
        {"rms_norm_eps": "small"},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
        {"layer_types": 3},
    ],
)
def test_a_value_of_the_wrong_kind_is_for_the_next_tier(changes: dict[str, Any]) -> None:
    with pytest.raises(TierUnavailable, match=r"config\.json"):
        shape_of({**LLAMA, **changes})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": []}']
)
def test_a_broken_index_ends_the_start(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"index\.json"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("header", [b"3", b"[]", b"{", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": "x"}}'])
def test_a_broken_header_ends_the_start(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigurationError, match="fetch it again"):
        read_tensors(tmp_path)
