"""The Triton kernels against their definitions in torch: on a card, or under Triton's interpreter.

torch for the CPU comes without Triton, which takes a gigabyte: where it is missing this is not run. To run it:
`pip install triton`, in an environment of its own if you like.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="NOT RUN: triton is not installed")

from app.runner.memory import KVPlan  # noqa: E402
from app.runner.torch.attention.attend import AttentionStyle  # noqa: E402
from app.runner.torch.attention.split import Rows, attend_rows, blocks_per_split  # noqa: E402
from app.runner.torch.build import make_executor  # noqa: E402
from app.runner.torch.check import probe_model, run_chunks  # noqa: E402
from app.runner.torch.kernels import attention, fused  # noqa: E402
from app.runner.torch.loading import load_model  # noqa: E402
from tests.numerics.families import VOCAB, make_model  # noqa: E402
from tests.numerics.test_torch_deterministic import config  # noqa: E402

PRODUCT_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
"""The interpreter multiplies the bits of bfloat16 as if they were integers, and cuts them off where a card rounds."""
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LENGTHS = [1, 7, 128, 129, 300]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    error = (got.float() - expected.float()).abs().max().item()
    assert error < TOLERANCES[got.dtype] * max(1.0, expected.float().abs().max().item())


# Attention of rows


def case(
    dtype: torch.dtype, *, block_size: int, heads: tuple[int, int], dims: tuple[int, int]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], Rows]:
    """Queries, a pool and rows of LENGTHS, whose blocks lie anywhere; what no row may read is NaN."""
    num_heads, kv_heads = heads
    split = blocks_per_split(block_size)
    width = -(-max(LENGTHS) // (split * block_size)) * split
    num_blocks = len(LENGTHS) * width + 1
    pool = tuple(numbers(num_blocks, block_size, kv_heads, dim, dtype=dtype, seed=dim) for dim in dims)
    order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(5)).view(len(LENGTHS), width)
    for row, length in zip(order.tolist(), LENGTHS, strict=True):
        for tensor in pool:
            flat = tensor[row].flatten(0, 1)
            flat[length:] = 0.0
            tensor[row] = flat.view(-1, block_size, kv_heads, tensor.shape[3])
    rows = Rows(order.to(DEVICE), torch.tensor(LENGTHS, device=DEVICE), split)
    return numbers(len(LENGTHS), num_heads, dims[0], dtype=dtype, seed=9), (pool[0], pool[1]), rows


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
@pytest.mark.parametrize(
    ("block_size", "heads", "dims"), [(16, (4, 2), (64, 64)), (64, (3, 1), (16, 24)), (48, (2, 2), (80, 80))]
)
def test_attention_is_the_definition_s(
    dtype: torch.dtype, block_size: int, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    query, pool, rows = case(dtype, block_size=block_size, heads=heads, dims=dims)
    style = AttentionStyle(None)
    assert_close(attention.attend_rows(query, pool, rows, None, style), attend_rows(query, pool, rows, None, style))


@pytest.mark.parametrize("window", [None, 5, 140])
@pytest.mark.parametrize("style", ["scale", "softcap", "sinks"])
def test_styles_and_windows_of_attention(style: str, window: int | None) -> None:
    query, pool, rows = case(torch.float32, block_size=16, heads=(4, 2), dims=(32, 32))
    asked = {
        "scale": AttentionStyle(0.3),
        "softcap": AttentionStyle(None, softcap=2.0),
        "sinks": AttentionStyle(None, sinks=torch.tensor([0.5, -3.0, 4.0, 0.0], device=DEVICE)),
    }[style]
    assert_close(attention.attend_rows(query, pool, rows, window, asked), attend_rows(query, pool, rows, window, asked))


def test_a_row_of_attention_has_the_same_bits_in_any_company() -> None:
    query, pool, rows = case(torch.float32, block_size=16, heads=(4, 2), dims=(32, 32))
    whole = attention.attend_rows(query, pool, rows, None, AttentionStyle(None))
    for row, length in enumerate(LENGTHS):
        width = -(-length // 128) * rows.blocks_per_split
        alone = Rows(rows.block_tables[row : row + 1, :width], rows.seq_lens[row : row + 1], rows.blocks_per_split)
        got = attention.attend_rows(query[row : row + 1], pool, alone, None, AttentionStyle(None))
        assert torch.equal(got, whole[row : row + 1])


def test_a_model_runs_over_the_kernel(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    settings = config(tmp_path)
    loaded = load_model(settings, DEVICE)
    plan = KVPlan(num_blocks=64, block_size=8, num_bytes=0, max_model_len=256)
    definition, kernel = (
        make_executor(settings, loaded, probe_model(loaded.model, DEVICE), plan, attend_rows=one)
        for one in (attend_rows, attention.attend_rows)
    )
    ids = torch.randint(3, VOCAB, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = run_chunks(kernel, ids, (20,))
    assert torch.allclose(whole, run_chunks(definition, ids, (20,)), atol=1e-4)
    assert torch.equal(whole, run_chunks(kernel, ids, (13, 7)))


# The small operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 576])
def test_add_and_norm(dtype: torch.dtype, size: int) -> None:
    x, residual = numbers(5, size, dtype=dtype), numbers(5, size, dtype=dtype, seed=1)
    weight = numbers(size, dtype=dtype, seed=2)
    normed, summed = fused.add_rms_norm(x, residual, weight, 1e-5)
    expected = x + residual
    wide = expected.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert_close(summed, expected)
    assert_close(normed, weight * wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80])
def test_rotation_and_kv_write(dtype: torch.dtype, dim: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = numbers(5, 4, dim, dtype=dtype), numbers(5, 2, dim, dtype=dtype, seed=1)
    value = numbers(5, 2, 48, dtype=dtype, seed=2)
    angles = numbers(5, dim, seed=3)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pool: Any = tuple(torch.zeros((3, 8, 2, width), dtype=dtype, device=DEVICE) for width in (dim, 48))
    slots = torch.tensor([3, 17, 0, 23, 8], device=DEVICE)
    rotated = fused.rotate_and_write(query, key, value, cos, sin, slots=slots, pool=pool)
    expected_query, expected_key = apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None]
    )
    assert_close(rotated, expected_query[0].transpose(0, 1))
    keys, values = (tensor.flatten(0, 1) for tensor in pool)
    assert_close(keys[slots], expected_key[0].transpose(0, 1))
    assert torch.equal(values[slots], value)
    others = [slot for slot in range(24) if slot not in slots.tolist()]
    assert not keys[others].any()
    assert not values[others].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_and_product(dtype: torch.dtype) -> None:
    gate, up = numbers(7, 300, dtype=dtype), numbers(7, 300, dtype=dtype, seed=1)
    assert_close(fused.silu_mul(gate, up), silu(gate) * up)
