"""`attention.split.attend_rows` in Triton: one program for each split of each row's KV head, then a merge in order.

A split has the same length in every batch and the merge the same order, so a row's result depends on nothing beside
it. Programs of splits beyond a row's context end at once, so the grid may be as wide as the longest (a graph's).
"""

import torch
import triton
import triton.language as tl

from app.runner.torch.attention.attend import AttentionStyle
from app.runner.torch.attention.split import Rows

_SMALLEST_DOT = 16
"""Rows that a matrix unit takes at least: fewer heads a KV head are padded."""


def attend_rows(
    query: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor], rows: Rows, window: int | None, style: AttentionStyle
) -> torch.Tensor:
    """query (num_rows, num_heads, key_dim) -> (num_rows, num_heads, value_dim). See `attention.split.attend_rows`."""
    num_rows, num_heads, key_dim = query.shape
    _, block_size, kv_heads, value_dim = pool[1].shape
    group = num_heads // kv_heads
    split = rows.blocks_per_split * block_size
    num_splits = rows.block_tables.shape[1] // rows.blocks_per_split
    partial = query.new_empty((num_rows, num_heads, num_splits, value_dim), dtype=torch.float32)
    best, total = (query.new_empty((num_rows, num_heads, num_splits), dtype=torch.float32) for _ in range(2))
    query = query.contiguous()
    _one_split[(num_rows, kv_heads, num_splits)](
        query, *pool, rows.block_tables, rows.seq_lens, partial, best, total,
        key_dim**-0.5 if style.scale is None else style.scale,
        style.softcap or 0.0,
        window or 0,
        rows.block_tables.stride(0),
        BLOCK_SIZE=block_size,
        KEY_DIM=key_dim,
        KEY_PAD=_pad(key_dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=_pad(value_dim),
        GROUP=group,
        GROUP_PAD=_pad(group),
        SPLIT=split,
        SPLIT_PAD=_pad(split),
    )  # fmt: skip
    out = query.new_empty((num_rows, num_heads, value_dim))
    sinks = best if style.sinks is None else style.sinks.float()
    _merge[(num_rows, num_heads)](
        partial, best, total, sinks, rows.seq_lens, out, num_splits,
        SPLIT=split, VALUE_DIM=value_dim, VALUE_PAD=_pad(value_dim),
        HAS_SINKS=style.sinks is not None,
    )  # fmt: skip
    return out


def _pad(size: int) -> int:
    return max(_SMALLEST_DOT, int(triton.next_power_of_2(size)))


@triton.jit
def _one_split(
    query, keys, values, tables, seq_lens, partial, best, total, scale, softcap, window, table_stride,
    BLOCK_SIZE: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, SPLIT: tl.constexpr, SPLIT_PAD: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights and weighted values of one split, for the heads of one KV head."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, num_splits = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(seq_lens + row)
    if split * SPLIT >= length:
        return
    inside = tl.arange(0, SPLIT_PAD)
    positions = split * SPLIT + inside
    is_seen = (inside < SPLIT) & (positions < length)
    if window > 0:
        is_seen = is_seen & (positions >= length - window)
    blocks = tl.load(tables + row * table_stride + positions // BLOCK_SIZE, mask=is_seen, other=0)
    slots = (blocks * BLOCK_SIZE + positions % BLOCK_SIZE) * kv_heads + kv_head
    heads, key_dims, value_dims = tl.arange(0, GROUP_PAD), tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    places = row * kv_heads * GROUP + kv_head * GROUP + heads
    q = tl.load(
        query + places[:, None] * KEY_DIM + key_dims[None, :],
        mask=(heads < GROUP)[:, None] & (key_dims < KEY_DIM)[None, :], other=0.0,
    )  # fmt: skip
    k = tl.load(
        keys + slots[:, None] * KEY_DIM + key_dims[None, :],
        mask=is_seen[:, None] & (key_dims < KEY_DIM)[None, :], other=0.0,
    )  # fmt: skip
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (GROUP_PAD, SPLIT_PAD) in float32
    if softcap > 0.0:
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
    scores = tl.where(is_seen[None, :], scores, -1e30)
    largest = tl.max(scores, axis=1)
    weights = tl.where(is_seen[None, :], tl.exp(scores - largest[:, None]), 0.0)
    v = tl.load(
        values + slots[:, None] * VALUE_DIM + value_dims[None, :],
        mask=is_seen[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0,
    )  # fmt: skip
    summed = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    at = places * num_splits + split
    tl.store(best + at, largest, mask=heads < GROUP)
    tl.store(total + at, tl.sum(weights, axis=1), mask=heads < GROUP)
    tl.store(
        partial + at[:, None] * VALUE_DIM + value_dims[None, :], summed,
        mask=(heads < GROUP)[:, None] & (value_dims < VALUE_DIM)[None, :],
    )  # fmt: skip


@triton.jit
def _merge(
    partial, best, total, sinks, seq_lens, out, num_splits,
    SPLIT: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One head's splits, one after another. A split that saw nothing has weight zero."""
    row, head = tl.program_id(0), tl.program_id(1)
    place = row * tl.num_programs(1) + head
    dims = tl.arange(0, VALUE_PAD)
    highest, weight = -1e30, 0.0
    if HAS_SINKS:
        highest, weight = tl.load(sinks + head), 1.0
    summed = tl.zeros((VALUE_PAD,), dtype=tl.float32)
    length, split = tl.load(seq_lens + row), 0
    while split * SPLIT < length:  # a range up to a loaded number fails in the interpreter of Triton 3.6
        at = place * num_splits + split
        one = tl.load(best + at)
        higher = tl.maximum(highest, one)
        shrink, share = tl.exp(highest - higher), tl.exp(one - higher)
        values = tl.load(partial + at * VALUE_DIM + dims, mask=dims < VALUE_DIM, other=0.0)
        summed = summed * shrink + values * share
        weight = weight * shrink + tl.load(total + at) * share
        highest = higher
        split += 1
    tl.store(out + place * VALUE_DIM + dims, (summed / weight).to(out.dtype.element_ty), mask=dims < VALUE_DIM)
