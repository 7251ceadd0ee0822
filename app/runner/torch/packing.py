"""A step plan as tensors: packed tokens, where their KV goes, and who attends to what.

Tokens of all sequences stand in one row, without padding between them: first the entries of one token
(decode, shortest context first), then the longer ones (prefill chunks), then, where shapes are static,
padding up to a bucket. Static shapes (CUDA) come from buffers allocated once, so that graphs can be
captured over them; one step's buffers are reused by the next, after its result was read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from app.core.plan import LogitsNeed, PlanEntry, StepPlan
from app.runner.torch.kv_cache import KVCache


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of one token each whose contexts are padded to the same number of blocks."""

    first_token: int
    """Their tokens are first_token .. first_token + num_sequences - 1 of the packed row."""
    block_tables: torch.Tensor
    """(num_sequences, num_blocks) block ids, padded with the zero block."""
    seq_lens: torch.Tensor
    """(num_sequences,) tokens in the context, the new one included."""


@dataclass(frozen=True)
class PrefillChunk:
    """Several new tokens of one sequence."""

    first_token: int
    num_tokens: int
    start: int
    """Position of the first token."""
    block_table: torch.Tensor
    """(num_blocks,) block ids that cover start + num_tokens positions and no more blocks than that."""


@dataclass(frozen=True)
class StepBatch:
    """One step's inputs on the device."""

    input_ids: torch.Tensor
    """(1, num_tokens), padding included."""
    position_ids: torch.Tensor
    """(1, num_tokens)."""
    slots: torch.Tensor
    """(num_tokens,) where each token's KV is written."""
    logits_indices: torch.Tensor
    """(num_logits,) tokens whose logits are needed, in the plan's order of entries."""
    logits_spans: tuple[slice, ...]
    """For each entry of the plan, its rows of the logits."""
    new_blocks: torch.Tensor
    """(num_new_blocks,) blocks that this step writes first."""
    decode_groups: tuple[DecodeGroup, ...]
    prefill_chunks: tuple[PrefillChunk, ...]


def bucket(size: int) -> int:
    """The next number of tokens for which static shapes exist: powers of two to 64, then multiples of 64."""
    return 1 << max(0, size - 1).bit_length() if size <= 64 else -(-size // 64) * 64


def context_bucket(num_blocks: int) -> int:
    """Blocks to which a context is padded: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... so a third of it at most is padding."""
    power = 1 << max(0, num_blocks - 1).bit_length()
    return 3 * power // 4 if power >= 4 and num_blocks <= 3 * power // 4 else power


class Packer:
    """Turns plans into batches. Owns the static buffers where there are any."""

    def __init__(self, kv_cache: KVCache, *, device: torch.device, is_static: bool) -> None:
        self._block_size = kv_cache.block_size
        self._zero_block = kv_cache.zero_block
        self._scratch_block = kv_cache.scratch_block
        self._device = device
        self._is_static = is_static
        self._buffers: dict[int, torch.Tensor] = {}
        """For each bucket (3, bucket): ids, positions, slots."""

    def pack(self, plan: StepPlan) -> StepBatch:
        """Lay out a plan's tokens and upload them."""
        entries = plan.entries
        decodes, chunks = self._order(entries)
        order = [*decodes, *chunks]
        first_tokens = _first_tokens(entries, order)
        rows = np.concatenate([self._token_rows(entries[index]) for index in order], axis=1)  # (3, num_tokens)
        input_ids, position_ids, slots = self._upload_rows(rows)
        indices, spans = _logits_layout(entries, first_tokens)
        return StepBatch(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            slots=slots,
            logits_indices=self._upload(np.array(indices, dtype=np.int64)),
            logits_spans=tuple(spans),
            new_blocks=self._upload(self._new_blocks(entries)),
            decode_groups=tuple(self._decode_groups(entries, decodes)),
            prefill_chunks=tuple(self._prefill_chunk(entries[index], first_tokens[index]) for index in chunks),
        )

    def _order(self, entries: Sequence[PlanEntry]) -> tuple[list[int], list[int]]:
        """Indices of entries with one token, by length of their context, and of the others."""
        decodes = [index for index, entry in enumerate(entries) if len(entry.token_ids) == 1]
        chunks = [index for index, entry in enumerate(entries) if len(entry.token_ids) > 1]
        decodes.sort(key=lambda index: entries[index].start)
        return decodes, chunks

    def _num_blocks(self, entry: PlanEntry) -> int:
        return -(-(entry.start + len(entry.token_ids)) // self._block_size)

    def _token_rows(self, entry: PlanEntry) -> NDArray[np.int64]:
        """Ids, positions and slots of an entry's tokens, (3, num_tokens)."""
        positions = np.arange(entry.start, entry.start + len(entry.token_ids), dtype=np.int64)
        table = np.array(entry.block_table[: self._num_blocks(entry)], dtype=np.int64)
        slots = table[positions // self._block_size] * self._block_size + positions % self._block_size
        return np.stack([np.array(entry.token_ids, dtype=np.int64), positions, slots])

    def _new_blocks(self, entries: Sequence[PlanEntry]) -> NDArray[np.int64]:
        """Blocks whose first position is among the tokens of this step."""
        return np.array(
            [
                block
                for entry in entries
                for block in entry.block_table[-(-entry.start // self._block_size) : self._num_blocks(entry)]
            ],
            dtype=np.int64,
        )

    def _decode_groups(self, entries: Sequence[PlanEntry], decodes: Sequence[int]) -> list[DecodeGroup]:
        """Neighbours whose contexts round up to the same number of blocks share a group.

        The padding of a sequence's context thus depends on its own length, not on the others'.
        """
        groups: list[list[PlanEntry]] = []
        width = 0
        for index in decodes:
            needed = context_bucket(self._num_blocks(entries[index]))
            if needed != width:
                groups.append([])
                width = needed
            groups[-1].append(entries[index])
        first_token = 0
        result = []
        for group in groups:
            result.append(self._decode_group(group, first_token))
            first_token += len(group)
        return result

    def _decode_group(self, group: Sequence[PlanEntry], first_token: int) -> DecodeGroup:
        width = context_bucket(self._num_blocks(group[-1]))
        tables = np.full((len(group), width), self._zero_block, dtype=np.int64)
        for row, entry in enumerate(group):
            num_blocks = self._num_blocks(entry)
            tables[row, :num_blocks] = entry.block_table[:num_blocks]
        seq_lens = np.array([entry.start + 1 for entry in group], dtype=np.int64)
        return DecodeGroup(first_token, self._upload(tables), self._upload(seq_lens))

    def _prefill_chunk(self, entry: PlanEntry, first_token: int) -> PrefillChunk:
        table = np.array(entry.block_table[: self._num_blocks(entry)], dtype=np.int64)
        return PrefillChunk(first_token, len(entry.token_ids), entry.start, self._upload(table))

    def _upload_rows(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """(3, num_tokens) on the device; where shapes are static, in its bucket's buffer, padded."""
        if not self._is_static:
            return self._upload(rows)
        num_tokens = rows.shape[1]
        size = bucket(num_tokens)
        padded = np.zeros((3, size), dtype=np.int64)
        padded[:, :num_tokens] = rows
        padded[2, num_tokens:] = self._scratch_block * self._block_size
        if size not in self._buffers:
            self._buffers[size] = torch.zeros((3, size), dtype=torch.int64, device=self._device)
        return self._buffers[size].copy_(torch.from_numpy(padded))

    def _upload(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _first_tokens(entries: Sequence[PlanEntry], order: Sequence[int]) -> dict[int, int]:
    """Index of each entry's first token in the packed row."""
    first_tokens: dict[int, int] = {}
    next_token = 0
    for index in order:
        first_tokens[index] = next_token
        next_token += len(entries[index].token_ids)
    return first_tokens


def _logits_layout(entries: Sequence[PlanEntry], first_tokens: dict[int, int]) -> tuple[list[int], list[slice]]:
    """Packed tokens whose logits are needed, and each entry's span among them."""
    indices: list[int] = []
    spans: list[slice] = []
    for index, entry in enumerate(entries):
        end = first_tokens[index] + len(entry.token_ids)
        begin = {LogitsNeed.NONE: end, LogitsNeed.LAST: end - 1, LogitsNeed.ALL: first_tokens[index]}[entry.logits]
        spans.append(slice(len(indices), len(indices) + end - begin))
        indices.extend(range(begin, end))
    return indices, spans
