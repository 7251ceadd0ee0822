"""Reading and converting GGUF files: exact weights, and one clear error for each way to be broken."""

import json
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from app.core.errors import ConfigurationError
from app.store.gguf_config import config_json, generation_config_json, read_model
from app.store.gguf_convert import convert_gguf
from app.store.gguf_file import read_gguf
from app.store.gguf_weights import to_bfloat16
from tests.gguf_maker import (
    Tensor,
    float_tensor,
    gguf_bytes,
    small_model_fields,
    small_model_tensors,
    tokenizer_fields,
    write_gguf,
)

TINY: dict[str, list[str]] = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_tiny.json").read_text())
VOCAB_SIZE = 960
FIELDS = small_model_fields("llama", vocab_size=VOCAB_SIZE) | tokenizer_fields(TINY, pre="smollm")


def small_file(
    path: Path, changes: Mapping[str, object] | None = None, tensors: dict[str, Tensor] | None = None
) -> Path:
    """A sound small file, with metadata changed (None takes a key away) or other tensors."""
    fields = {key: value for key, value in {**FIELDS, **(changes or {})}.items() if value is not None}
    write_gguf(path, fields, small_model_tensors(vocab_size=VOCAB_SIZE) if tensors is None else tensors)
    return path


def read_safetensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of a bfloat16 file, as float32."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16"
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(content[start:end], dtype=np.uint16).astype(np.uint32) << 16
        tensors[name] = bits.view(np.float32).reshape(entry["shape"])
    return tensors


def dequantized(path: Path, name: str) -> npt.NDArray[np.float32]:
    """A tensor as the gguf package reads it."""
    from gguf import GGUFReader, dequantize

    (tensor,) = [tensor for tensor in GGUFReader(path).tensors if tensor.name == name]
    values: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    return values


def rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """To bfloat16 and back."""
    bits = to_bfloat16(values, path=Path("x"), name="x").astype(np.uint32) << 16
    return bits.view(np.float32).reshape(values.shape)


def test_weights_are_those_that_gguf_reads_bit_for_bit(tmp_path: Path) -> None:
    source = small_file(tmp_path / "small.gguf")
    convert_gguf(source, tmp_path)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    assert len(tensors) == 2 + 2 * 9
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for ours, theirs in pairs.items():
        np.testing.assert_array_equal(tensors[ours], rounded(dequantized(source, theirs)), err_msg=ours)


@pytest.mark.parametrize(("part", "num_heads"), [("q", 4), ("k", 2)])
def test_rows_of_q_and_k_are_put_back_in_order(tmp_path: Path, part: str, num_heads: int) -> None:
    """Against llama.cpp's own permutation, applied to rows that number themselves."""
    ordered = np.repeat(np.arange(num_heads * 16, dtype=np.float32)[:, None], 64, axis=1)
    permuted = ordered.reshape(num_heads, 2, 8, 64).swapaxes(1, 2).reshape(ordered.shape)
    tensors = small_model_tensors(vocab_size=VOCAB_SIZE)
    tensors[f"blk.1.attn_{part}.weight"] = float_tensor(permuted)
    convert_gguf(small_file(tmp_path / "small.gguf", tensors=tensors), tmp_path)
    converted = read_safetensors(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(converted[f"model.layers.1.self_attn.{part}_proj.weight"], ordered)


def test_qwen_rows_stay_as_they_are(tmp_path: Path) -> None:
    fields = small_model_fields("qwen3", vocab_size=VOCAB_SIZE, **{"attention.key_length": 16})
    tensors = small_model_tensors(vocab_size=VOCAB_SIZE, qk_norm=True, tied=False)
    write_gguf(tmp_path / "small.gguf", fields | tokenizer_fields(TINY, pre="qwen2"), tensors)
    convert_gguf(tmp_path / "small.gguf", tmp_path)
    converted = read_safetensors(tmp_path / "model.safetensors")
    expected = rounded(dequantized(tmp_path / "small.gguf", "blk.0.attn_q.weight"))
    np.testing.assert_array_equal(converted["model.layers.0.self_attn.q_proj.weight"], expected)
    assert converted["model.layers.0.self_attn.q_norm.weight"].shape == (16,)
    assert "lm_head.weight" in converted
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


def test_bfloat16_rounds_to_nearest_even() -> None:
    halfway_to_even, halfway_to_odd, above = 0x3F808000, 0x3F818000, 0x3F808001
    values = np.array([halfway_to_even, halfway_to_odd, above, 0x80000000], dtype=np.uint32).view(np.float32)
    bits = to_bfloat16(values, path=Path("x"), name="x")
    assert bits.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x8000]


def test_the_configuration_is_what_transformers_expects(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.padding_token_id": 0}
    model = read_model(read_gguf(small_file(tmp_path / "small.gguf", changes)))
    config = config_json(model)
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert generation_config_json(model) == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}


def test_rotary_scaling_is_taken_over(tmp_path: Path) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope_scaling(tmp_path, linear) == {"rope_type": "linear", "factor": 4.0}
    yarn = linear | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 64}
    assert rope_scaling(tmp_path, yarn) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(ConfigurationError, match=r"rope\.scaling\.type = 'longrope'"):
        rope_scaling(tmp_path, {"llama.rope.scaling.type": "longrope"})


def rope_scaling(tmp_path: Path, changes: dict[str, object]) -> object:
    return config_json(read_model(read_gguf(small_file(tmp_path / "small.gguf", changes))))["rope_scaling"]


def test_the_rotary_factors_of_llama_3_are_recognised(tmp_path: Path) -> None:
    """The factors as llama.cpp's converter computes them from factor 8, frequencies 1 and 4, context 8192."""
    theta, factors = 500000.0, []
    for index in range(0, 16, 2):
        wavelength = 2 * np.pi * theta ** (index / 16)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    tensors = small_model_tensors(vocab_size=VOCAB_SIZE)
    tensors["rope_freqs.weight"] = float_tensor(np.array(factors, dtype=np.float32))
    source = small_file(tmp_path / "small.gguf", {"llama.rope.freq_base": theta}, tensors)
    scaling = config_json(read_model(read_gguf(source)))["rope_scaling"]
    assert isinstance(scaling, dict)
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    convert_gguf(source, tmp_path)
    tensors["rope_freqs.weight"] = float_tensor(np.linspace(1, 8, 8, dtype=np.float32))
    small_file(source, {"llama.rope.freq_base": theta}, tensors)
    with pytest.raises(ConfigurationError, match="not those of Llama 3"):
        read_model(read_gguf(source))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, r"holds a 'mamba' model.*llama"),
        ({"general.architecture": None}, "general.architecture is missing"),
        ({"llama.logit_scale": 0.5}, r"sets llama\.logit_scale = 0\.5"),
        ({"llama.expert_count": 8}, r"sets llama\.expert_count = 8"),
        ({"llama.block_count": 4_000_000_00}, "announces 400000000 layers"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.block_count": "two"}, "block_count is 'two'"),
        ({"llama.block_count": 3}, r"lacks the tensor 'blk\.2\."),
        ({"llama.block_count": 1}, r"has the tensor 'blk\.1\."),
        ({"llama.attention.head_count": [4, 4]}, "head_count is a list of 2"),
        ({"llama.attention.head_count_kv": 3}, "4 heads cannot share 3"),
        ({"llama.attention.head_count": 2}, r"shape \(32, 64\), expected \(64, 64\)"),
        ({"llama.rope.dimension_count": 8}, r"dimension_count = 8 beside a head size of 16"),
        ({"llama.rope.freq_base": float("nan")}, "expected a positive number"),
        ({"llama.context_length": 0}, "context_length is 0"),
        ({"split.count": 3}, "one part of several"),
        ({"tokenizer.ggml.eos_token_id": 5000}, "outside the vocabulary"),
        ({"general.alignment": 0}, "alignment is 0"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    source = small_file(tmp_path / "small.gguf", changes)
    with pytest.raises(ConfigurationError, match=message):
        convert_gguf(source, tmp_path)


def test_a_bias_of_q_without_one_of_the_output_is_refused(tmp_path: Path) -> None:
    """transformers' llama cannot hold it: one switch for all four."""
    tensors = small_model_tensors(vocab_size=VOCAB_SIZE, qkv_bias=True)
    with pytest.raises(ConfigurationError, match=r"lacks the tensor 'blk\.0\.attn_output\.bias'"):
        convert_gguf(small_file(tmp_path / "small.gguf", tensors=tensors), tmp_path)


def test_a_dense_model_may_say_that_it_has_no_experts(tmp_path: Path) -> None:
    convert_gguf(small_file(tmp_path / "small.gguf", {"llama.expert_count": 0}), tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = small_model_tensors(vocab_size=VOCAB_SIZE)
    tensors["output_norm.weight"] = float_tensor(np.full(64, np.nan, dtype=np.float32))
    with pytest.raises(ConfigurationError, match=r"'output_norm\.weight' holds values that are not finite"):
        convert_gguf(small_file(tmp_path / "small.gguf", tensors=tensors), tmp_path)


def test_a_file_cut_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    early = range(0, 2000, 37)
    for length in (*early, *range(2000, len(whole) - 64, len(whole) // 60)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ConfigurationError, match=r"cut\.gguf"):
            read_gguf(cut)


def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    """Each of many random changes gives a file that is read or refused."""
    fields = small_model_fields("llama", vocab_size=8) | tokenizer_fields({"tokens": ["a"], "merges": []}, pre="gpt-2")
    whole = gguf_bytes(fields, {"token_embd.weight": float_tensor(np.zeros((8, 64), dtype=np.float32))})
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    num_refused = 0
    for _ in range(500):
        content = bytearray(whole)
        for position in random.integers(0, 1200, size=3):
            content[position] = random.integers(0, 256)
        path.write_bytes(content)
        try:
            convert_gguf(path, tmp_path)
        except ConfigurationError:
            num_refused += 1
    assert num_refused == 500  # it lacks tensors even where the damage did no harm


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_wild_counts_allocate_nothing(tmp_path: Path, count: int) -> None:
    key = struct.pack("<Q", 1) + b"k"
    bodies = {
        "entries": b"GGUF" + struct.pack("<IQQ", 3, 0, count),
        "tensors": b"GGUF" + struct.pack("<IQQ", 3, count, 0),
        "key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, count),
        "string": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IQ", 8, count),
        "array": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 4, count),
        "strings": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 8, count),
        "shape": b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + key + struct.pack("<IQQQQIQ", 4, *[count] * 4, 0, 0),
    }
    for name, body in bodies.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(body + bytes(4096))
        tracemalloc.start()
        with pytest.raises(ConfigurationError, match=rf"{name}\.gguf is not a usable GGUF file"):
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04" + bytes(100), "does not begin with the letters GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version is 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 77), "type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(64), "UTF-8"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        read_gguf(path)


def test_repeated_names_are_refused(tmp_path: Path) -> None:
    entry = struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 5)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry * 2 + bytes(64))
    with pytest.raises(ConfigurationError, match="'k' stands there twice"):
        read_gguf(tmp_path / "x.gguf")
