"""Weights in blocks: kernels against the dequantised product in float64, and GGUF files against their bfloat16 form."""

import ctypes
import json
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_int32, c_void_p
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from app.runner.native.blocks import BlockKind, SourceType, kind_of, packed_bytes
from app.runner.native.build import find_or_build
from app.runner.native.levels import LEVELS
from app.runner.native.library import CLayer, CLinear, Library, address
from app.store import GgufForm, resolve
from tests.gguf_maker import float_tensor, small_model_fields, small_model_tensors, tokenizer_fields, write_gguf
from tests.native_models import Hand, levels_here, load_native, prompt_ids

TINY: dict[str, list[str]] = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_tiny.json").read_text())
N, K = 96, 160
"""The last 32 of 128 columns stay empty."""
MIXTURES: Sequence[tuple[SourceType, ...]] = (
    (SourceType.Q4_0,),
    (SourceType.Q4_1,),
    (SourceType.Q8_0,),
    (SourceType.Q4_0, SourceType.Q4_1),
    (SourceType.Q4_0, SourceType.Q8_0),
    (SourceType.Q8_0, SourceType.Q4_1, SourceType.Q4_0),
)
BLOCK_SCALE = np.dtype([("scale", "<f4"), ("scaled_sum", "<f4"), ("sum", "<i4"), ("reserved", "<i4")])


@pytest.fixture(params=levels_here())
def library(request: pytest.FixtureRequest) -> Library:
    return Library(find_or_build(next(level for level in LEVELS if level.name == request.param)))


@pytest.fixture
def context(library: Library) -> Iterator[int]:
    opened: int = library.open(1)
    yield opened
    library.close(opened)


def extreme_weights(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Rows of normal numbers; every third block holds its two extremes alone, the first nearly one of them."""
    weights = rng.standard_normal((count, K // 32, 32), dtype=np.float32)
    weights[:, ::3] = np.where(weights[:, ::3] > 0, np.float32(1.0), np.float32(-1.0))
    weights[:, 0] = 1.0
    weights[:, 0, 5] = -1.0
    return weights.reshape(count, K)


def packed(library: Library, types: Sequence[SourceType]) -> tuple[NDArray[np.uint8], BlockKind, NDArray[np.float64]]:
    """A linear of N columns whose rows are of `types` in turns, a third each, and its weights, (128, K)."""
    rng = np.random.Generator(np.random.PCG64(1))
    kind = kind_of(types)
    weight, exact = np.zeros(packed_bytes(kind, 128, K), dtype=np.uint8), np.zeros((128, K))
    for type_, (first, end) in zip(types, pairwise(np.linspace(0, N, len(types) + 1).astype(int)), strict=True):
        stored = quantize(extreme_weights(rng, end - first), GGMLQuantizationType(type_))
        columns = np.arange(first, end, dtype=np.int32)[::-1].copy()
        exact[columns] = dequantize(stored, GGMLQuantizationType(type_))
        library.pack_blocks(address(weight), kind, address(stored), type_, end - first, K, address(columns))
    return weight, kind, exact


def run(
    library: Library, context: int, linear: CLinear, inputs: NDArray[np.int8], scales: NDArray[np.void]
) -> NDArray[np.float32]:
    """Rows of bytes times a linear, (rows, 128)."""
    linears = library.function(
        "hw_run_linears", None, c_void_p, POINTER(CLayer), c_int32, c_int32, c_int32, c_void_p, c_void_p, c_void_p
    )
    out = np.zeros((len(inputs), 128), dtype=np.float32)
    layer = CLayer(qkv=linear)
    linears(context, ctypes.byref(layer), 1, 0, len(inputs), address(inputs), address(scales), address(out))
    return out


@pytest.mark.parametrize("types", MIXTURES, ids=lambda types: "+".join(type_.name for type_ in types))
def test_a_linear_is_the_dequantised_product(library: Library, context: int, types: Sequence[SourceType]) -> None:
    weight, kind, exact = packed(library, types)
    bias = np.arange(128, dtype=np.float32)
    linear = CLinear(weight=address(weight), bias=address(bias), n_pad=128, k=K, byte_rows=1, blocks=kind)
    rng = np.random.Generator(np.random.PCG64(2))
    alone: NDArray[np.float32] | None = None
    for rows in (1, 2, 3, 5, 6, 7, 13):
        inputs = np.where(rng.random((rows, K)) < 0.5, 127, rng.integers(-127, 128, (rows, K))).astype(np.int8)
        inputs[0] = -127
        scales = np.zeros((rows, K // 32), dtype=BLOCK_SCALE)
        scales["scale"] = rng.random((rows, K // 32), dtype=np.float32)
        scales["scale"][0] = 1.0
        scales["sum"] = inputs.reshape(rows, K // 32, 32).sum(axis=2, dtype=np.int32)
        scales["scaled_sum"] = scales["scale"] * scales["sum"].astype(np.float32)
        values = (inputs.reshape(rows, -1, 32) * scales["scale"].astype(np.float64)[:, :, None]).reshape(rows, K)
        out = run(library, context, linear, inputs, scales)
        assert np.abs(out - (values @ exact.T + bias)).max() <= 2e-6 * (np.abs(values) @ np.abs(exact.T)).max(), rows
        alone = out[0] if alone is None else alone
        assert np.array_equal(out[0].view(np.uint32), alone.view(np.uint32)), rows


@pytest.mark.parametrize("type_", [SourceType.Q4_1, SourceType.Q8_0])
def test_floats_become_the_blocks_that_fit_best(library: Library, type_: SourceType) -> None:
    values = np.random.Generator(np.random.PCG64(3)).standard_normal((5, 48), dtype=np.float32)
    stored = np.zeros((5, 2 * type_.num_bytes), dtype=np.uint8)
    library.quantise_rows(address(stored), type_, address(values), 5, 48)
    back = dequantize(stored, GGMLQuantizationType(type_))
    wide = np.pad(values, ((0, 0), (0, 16))).reshape(5, 2, 32)
    steps = (wide.max(2) - wide.min(2)) / 15 if type_ is SourceType.Q4_1 else np.abs(wide).max(2) / 127
    assert (np.abs(back.reshape(5, 2, 32) - wide) <= 0.51 * steps[:, :, None] + 2e-3).all()


@pytest.mark.parametrize(
    "types", [("Q4_1",), ("Q4_0",), ("Q8_0", "Q4_1", "Q4_0"), ("Q5_0", "F16", "Q4_0", "Q8_0")], ids="-".join
)
def test_a_gguf_as_it_is_speaks_as_its_bfloat16_form(types: tuple[str, ...], tmp_path: Path) -> None:
    """A llama, whose query and key rows lie in turns; what is no block of ours becomes int8, and is named."""
    heads = {"attention.head_count": 2, "attention.head_count_kv": 1}
    fields = small_model_fields("llama", vocab_size=960, **heads) | tokenizer_fields(TINY, pre="smollm")
    options = {"tied": False, "qkv_bias": True, "output_bias": True}
    tensors = small_model_tensors(vocab_size=960, matrix_types=types, spread=0.15, **options)
    write_gguf(tmp_path / "small.gguf", fields, tensors)
    lines = check_forms(tmp_path)
    named = [line for line in lines if line.endswith("became int8, in blocks of 32")]
    assert len(named) == ("Q5_0" in types)
    assert all("F16" in line and "Q5_0" in line and "Q4_0" not in line for line in named)


def test_a_gemma_as_it_is_speaks_as_its_bfloat16_form(tmp_path: Path) -> None:
    """Its norms are written with 1 added to each weight."""
    heads = {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.sliding_window": 8}
    fields = small_model_fields("gemma3", vocab_size=960, **heads) | tokenizer_fields(TINY, pre="smollm")
    tensors = small_model_tensors(vocab_size=960, post_norms=True, spread=0.15, matrix_types=("Q4_1", "Q8_0"))
    for block in ("blk.0", "blk.1"):
        for part in ("q", "k"):
            weights = np.linspace(0.5, 1.5, 32, dtype=np.float32)
            tensors[f"{block}.attn_{part}_norm.weight"] = float_tensor(weights)
    write_gguf(tmp_path / "small.gguf", fields, tensors)
    assert not [line for line in check_forms(tmp_path) if "became int8" in line]


def check_forms(tmp_path: Path) -> list[str]:
    """Serve small.gguf in both forms and compare; returns what was reported."""
    lines: list[str] = []
    logits = []
    for form in (GgufForm(), GgufForm(as_it_is=True)):
        folder = resolve(str(tmp_path / "small.gguf"), cache_dir=tmp_path, gguf_form=form, report=lines.append)
        native = load_native(folder.path)
        assert native.info.dtype == ("int4" if form.as_it_is else "bfloat16")
        logits.append(Hand(native).prompt_logits(0, prompt_ids(20, vocab_size=960), (0,)))
        native.close()
    assert np.abs(logits[1] - logits[0]).mean() < 0.03 * logits[0].std()
    return lines
