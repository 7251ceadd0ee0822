"""Reading safetensors, packing, and what is wrong with a model folder."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from app.core.errors import ConfigurationError
from app.runner.base import TierUnavailable
from app.runner.native.arena import Arena
from app.runner.native.build import find_or_build
from app.runner.native.families import read_shape
from app.runner.native.levels import choose_level
from app.runner.native.library import Library
from app.runner.native.precision import QUANTIZATIONS, Form, precision_of
from app.runner.native.safetensors import read_tensors
from app.runner.native.weights import ModelWeights, load_weights
from tests.native_models import write_model


def packed(folder: Path, *, quantization: str | None = None) -> ModelWeights:
    library = Library(find_or_build(choose_level()))
    return load_weights(folder, read_shape(folder), library, precision=precision_of(quantization), num_threads=2)


def change_tensors(folder: Path, changes: dict[str, Any]) -> None:
    """Replace, add or (None) drop tensors."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


def widen(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_a_packed_linear_holds_every_weight_once(tmp_path: Path) -> None:
    weights = packed(write_model(tmp_path))
    source = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]  # (192, 272)
    down = weights.layers[1].down
    rows = widen(down.weight).reshape(down.n_pad // 64, 272 // 2, 64, 2).transpose(0, 2, 1, 3).reshape(down.n_pad, 272)
    assert np.abs(rows[:192] - source).max() < 0.002
    gate_up = weights.layers[1].gate_up
    gate = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]  # (272, 192)
    columns = widen(gate_up.weight).reshape(-1, 96, 64, 2).transpose(0, 2, 1, 3).reshape(-1, 16, 192)
    assert np.abs(columns[0::2][:17].reshape(272, 192) - gate).max() < 0.002


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    weights = packed(write_model(tmp_path))
    assert np.shares_memory(weights.head.weight, weights.embedding.weight)


def test_int8_weights_are_within_half_a_step(tmp_path: Path) -> None:
    weights = packed(write_model(tmp_path), quantization="int8")
    source = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]  # (192, 384)
    output = weights.layers[0].output
    assert output.scale is not None and output.zero is not None
    rows = output.weight.reshape(-1, 96, 64, 4).transpose(0, 2, 1, 3).reshape(output.n_pad, 384)[:192]
    scale = output.scale[:192, None]
    assert np.all(np.abs(rows * scale - widen(np.ascontiguousarray(bf16(source)))) <= scale * 0.5001)
    assert np.array_equal(output.zero[:192], 128 * rows.astype(np.int32).sum(axis=1))


def test_each_linear_has_the_form_that_the_precision_names(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    for name, precision in QUANTIZATIONS.items():
        weights = packed(folder, quantization=name)
        layer = weights.layers[0]
        forms = (layer.qkv.form, layer.output.form, layer.gate_up.form, layer.down.form, weights.head.form)
        assert forms == (precision.qkv, precision.output, precision.gate_up, precision.down, precision.head), name
        dtypes = {Form.BF16: np.uint16, Form.INT8: np.int8, Form.INT8_WIDE: np.int8, Form.BLOCKS: np.uint8}
        assert weights.head.weight.dtype == dtypes[weights.head.form]


def bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def test_the_digest_names_the_weights(tmp_path: Path) -> None:
    first = packed(write_model(tmp_path / "a")).digest
    assert packed(write_model(tmp_path / "b")).digest == first
    assert packed(write_model(tmp_path / "c", seed=1)).digest != first


def test_a_tensor_nobody_uses_is_refused(tmp_path: Path) -> None:
    change_tensors(write_model(tmp_path), {"model.layers.0.self_attn.sinks": np.zeros(6, np.float32)})
    with pytest.raises(TierUnavailable, match="sinks"):
        packed(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, "no tensor 'model.norm.weight'"),
        ({"model.norm.weight": np.zeros(7, np.float32)}, "has shape"),
    ],
)
def test_a_wrong_tensor_is_the_folders_fault(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    change_tensors(write_model(tmp_path), changes)
    with pytest.raises(ConfigurationError, match=message):
        packed(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        struct.pack("<Q", 4) + b"oops",
        *(
            struct.pack("<Q", len(header)) + header + bytes(16)
            for header in (
                json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode(),
                json.dumps({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode(),
                json.dumps({"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}}).encode(),
            )
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is not a readable"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("quantization", [None, "int8", "int8-safe"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, quantization: str | None, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(write_model(tmp_path) / "model.safetensors")[name]
    weight[271, 3] = value
    change_tensors(tmp_path, {name: weight})
    with pytest.raises(ConfigurationError, match=rf"'{name}' holds {value} at element {271 * 192 + 3};"):
        packed(tmp_path, quantization=quantization)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    write_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[:5]}, tmp_path / "one.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, tmp_path / "two.safetensors")
    index = {"weight_map": {name: "one.safetensors" if i < 5 else "two.safetensors" for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(read_tensors(tmp_path)) == names


def test_an_arena_hands_out_aligned_zeroes() -> None:
    arena = Arena(1000, huge_pages=False)
    first, second = arena.take(3, np.float32), arena.take(100, np.uint16)
    assert first.ctypes.data % 64 == second.ctypes.data % 64 == 0
    assert not first.any() and not second.any()
    with pytest.raises(MemoryError):
        arena.take(1000, np.uint8)
