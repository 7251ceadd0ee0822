"""The small operations of a decoder's layer, each one pass over memory: add and norm, rotation and KV write, SiLU.

Arithmetic in float32, rounded to the tensors' dtype where torch rounds. Each program sums its own row alone.
Definitions in torch stand in tests/numerics/test_triton_kernels.py.
"""

import torch
import triton
import triton.language as tl


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and the sum; both (num_tokens, hidden_size). Squares are summed in float32."""
    normed, summed = torch.empty_like(x), torch.empty_like(x)
    num_tokens, size = x.shape
    _add_rms_norm[(num_tokens,)](
        x, residual, weight, normed, summed, epsilon, SIZE=size, PAD=triton.next_power_of_2(size)
    )
    return normed, summed


def rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    slots: torch.Tensor,
    pool: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Rotate halves (llama's RoPE) of queries and keys, write keys and values into the pool; the rotated queries.

    query (num_tokens, num_heads, dim), key and value (num_tokens, num_kv_heads, dim), contiguous; cos and sin
    (num_tokens, dim); slots (num_tokens,); pool as `KVCache.layer` gives it.
    """
    num_tokens, num_heads, dim = query.shape
    kv_heads = key.shape[1]
    rotated = torch.empty_like(query)
    _rotate_and_write[(num_tokens, num_heads + kv_heads)](
        query, key, value, cos, sin, slots, *pool, rotated,
        HEADS=num_heads, KV_HEADS=kv_heads, HALF=dim // 2, PAD=triton.next_power_of_2(dim // 2),
        VALUE_DIM=value.shape[2], VALUE_PAD=triton.next_power_of_2(value.shape[2]),
    )  # fmt: skip
    return rotated


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) x up, all (num_tokens, intermediate_size)."""
    out = torch.empty_like(gate)
    size = gate.numel()
    _silu_mul[(triton.cdiv(size, 1024),)](gate, up, out, size, BLOCK=1024)
    return out


@triton.jit
def _wide(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_rms_norm(
    x, residual, weight, normed, summed, epsilon, SIZE: tl.constexpr, PAD: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * SIZE
    at = tl.arange(0, PAD)
    mask = at < SIZE
    dtype = x.dtype.element_ty
    both = _wide(x + row + at, mask) + _wide(residual + row + at, mask)
    tl.store(summed + row + at, both.to(dtype), mask=mask)
    both = both.to(dtype).to(tl.float32)
    both = both * tl.rsqrt(tl.sum(both * both, axis=0) / SIZE + epsilon)
    scaled = both.to(dtype).to(tl.float32) * _wide(weight + at, mask)
    tl.store(normed + row + at, scaled.to(dtype), mask=mask)


@triton.jit
def _rotate_and_write(
    query, key, value, cos, sin, slots, key_pool, value_pool, rotated,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, PAD)
    mask = at < HALF
    low, high = token * 2 * HALF + at, token * 2 * HALF + HALF + at
    cos_low, cos_high = _wide(cos + low, mask), _wide(cos + high, mask)
    sin_low, sin_high = _wide(sin + low, mask), _wide(sin + high, mask)
    dtype = query.dtype.element_ty
    if head < HEADS:
        start = (token * HEADS + head) * 2 * HALF
        first, second = _wide(query + start + at, mask), _wide(query + start + HALF + at, mask)
        tl.store(rotated + start + at, (first * cos_low - second * sin_low).to(dtype), mask=mask)
        tl.store(rotated + start + HALF + at, (second * cos_high + first * sin_high).to(dtype), mask=mask)
    else:
        kv_head = head - HEADS
        start = (token * KV_HEADS + kv_head) * 2 * HALF
        place = tl.load(slots + token) * KV_HEADS + kv_head
        first, second = _wide(key + start + at, mask), _wide(key + start + HALF + at, mask)
        target = key_pool + place * 2 * HALF
        tl.store(target + at, (first * cos_low - second * sin_low).to(dtype), mask=mask)
        tl.store(target + HALF + at, (second * cos_high + first * sin_high).to(dtype), mask=mask)
        dims = tl.arange(0, VALUE_PAD)
        is_value = dims < VALUE_DIM
        values = tl.load(value + (token * KV_HEADS + kv_head) * VALUE_DIM + dims, mask=is_value)
        tl.store(value_pool + place * VALUE_DIM + dims, values, mask=is_value)


@triton.jit
def _silu_mul(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    dtype = out.dtype.element_ty
    wide = _wide(gate + at, mask)
    activated = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
    tl.store(out + at, (activated * _wide(up + at, mask)).to(dtype), mask=mask)
