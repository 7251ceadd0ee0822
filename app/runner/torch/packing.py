"""A step plan as tensors: packed tokens, where their KV goes, and who attends to what.

Tokens of all sequences stand in one row, without padding between them: first the entries of one token
(decode, shortest context first), then the longer ones (prefill chunks). Shapes follow the plan;
`app.runner.torch.rows` packs into shapes that do not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """The inputs of one pass through the model, on the device, whatever its attention."""

    input_ids: torch.Tensor
    """(1, num_tokens), padding included."""
    position_ids: torch.Tensor
    """(1, num_tokens)."""
    slots: torch.Tensor
    """(num_tokens,) where each token's KV is written."""
    logits_indices: torch.Tensor
    """(num_logits,) tokens whose logits are needed, in the plan's order of entries."""
    new_blocks: torch.Tensor
    """(num_new_blocks,) blocks that are written for the first time, by this pass or by a later one of the step."""


@dataclass(frozen=True)
class ChunkBatch(StepBatch):
    """A whole step in one pass, its shapes the plan's own."""

    decode_groups: tuple[DecodeGroup, ...]
    prefill_chunks: tuple[PrefillChunk, ...]


class Packer(Protocol):
    """Turns plans into batches."""

    def batches(self, plan: StepPlan) -> Iterator[StepBatch]:
        """The passes of a step, in order; each is run before the next is asked for.

        Their logits together are those that the plan needs, in its order (`logits_spans`).
        """
        ...


def context_bucket(num_blocks: int) -> int:
    """Blocks to which a context is padded: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... so a third of it at most is padding."""
    power = 1 << max(0, num_blocks - 1).bit_length()
    return 3 * power // 4 if power >= 4 and num_blocks <= 3 * power // 4 else power


def num_blocks(entry: PlanEntry, block_size: int) -> int:
    """Blocks that hold the entry's context, its new tokens included."""
    return -(-(entry.start + len(entry.token_ids)) // block_size)


def num_logits(entry: PlanEntry) -> int:
    """How many of the entry's tokens, from the end, need logits."""
    return {LogitsNeed.NONE: 0, LogitsNeed.LAST: 1, LogitsNeed.ALL: len(entry.token_ids)}[entry.logits]


def logits_spans(entries: Sequence[PlanEntry]) -> tuple[slice, ...]:
    """For each entry of a plan, its rows of the logits."""
    ends = np.cumsum([num_logits(entry) for entry in entries]).tolist()
    return tuple(slice(end - num_logits(entry), end) for entry, end in zip(entries, ends, strict=True))


def token_rows(entry: PlanEntry, block_size: int) -> NDArray[np.int64]:
    """Ids, positions and slots of an entry's tokens, (3, num_tokens)."""
    positions = np.arange(entry.start, entry.start + len(entry.token_ids), dtype=np.int64)
    table = np.array(entry.block_table[: num_blocks(entry, block_size)], dtype=np.int64)
    slots = table[positions // block_size] * block_size + positions % block_size
    return np.stack([np.array(entry.token_ids, dtype=np.int64), positions, slots])


def new_blocks(entries: Sequence[PlanEntry], block_size: int) -> NDArray[np.int64]:
    """Blocks whose first position is among the tokens of this step."""
    blocks = [
        block
        for entry in entries
        for block in entry.block_table[-(-entry.start // block_size) : num_blocks(entry, block_size)]
    ]
    return np.array(blocks, dtype=np.int64)


class ChunkPacker:
    """One pass a step: no token is padding, no context longer than a bucket of its own length."""

    def __init__(self, kv_cache: KVCache, *, device: torch.device) -> None:
        self._block_size = kv_cache.block_size
        self._zero_block = kv_cache.zero_block
        self._device = device

    def batches(self, plan: StepPlan) -> Iterator[ChunkBatch]:
        """See `Packer.batches`."""
        entries = plan.entries
        decodes, chunks = self._order(entries)
        order = [*decodes, *chunks]
        first_tokens = _first_tokens(entries, order)
        rows = np.concatenate([token_rows(entries[index], self._block_size) for index in order], axis=1)
        input_ids, position_ids, slots = self._upload(rows)
        yield ChunkBatch(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            slots=slots,
            logits_indices=self._upload(_logits_indices(entries, first_tokens)),
            new_blocks=self._upload(new_blocks(entries, self._block_size)),
            decode_groups=tuple(self._decode_groups(entries, decodes)),
            prefill_chunks=tuple(self._prefill_chunk(entries[index], first_tokens[index]) for index in chunks),
        )

    def _order(self, entries: Sequence[PlanEntry]) -> tuple[list[int], list[int]]:
        """Indices of entries with one token, by length of their context, and of the others."""
        decodes = [index for index, entry in enumerate(entries) if len(entry.token_ids) == 1]
        chunks = [index for index, entry in enumerate(entries) if len(entry.token_ids) > 1]
        decodes.sort(key=lambda index: entries[index].start)
        return decodes, chunks

    def _decode_groups(self, entries: Sequence[PlanEntry], decodes: Sequence[int]) -> list[DecodeGroup]:
        """Neighbours whose contexts round up to the same number of blocks share a group.

        The padding of a sequence's context thus depends on its own length, not on the others'.
        """
        groups: list[list[PlanEntry]] = []
        width = 0
        for index in decodes:
            needed = context_bucket(num_blocks(entries[index], self._block_size))
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
        width = context_bucket(num_blocks(group[-1], self._block_size))
        tables = np.full((len(group), width), self._zero_block, dtype=np.int64)
        for row, entry in enumerate(group):
            used = num_blocks(entry, self._block_size)
            tables[row, :used] = entry.block_table[:used]
        seq_lens = np.array([entry.start + 1 for entry in group], dtype=np.int64)
        return DecodeGroup(first_token, self._upload(tables), self._upload(seq_lens))

    def _prefill_chunk(self, entry: PlanEntry, first_token: int) -> PrefillChunk:
        table = np.array(entry.block_table[: num_blocks(entry, self._block_size)], dtype=np.int64)
        return PrefillChunk(first_token, len(entry.token_ids), entry.start, self._upload(table))

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


def _logits_indices(entries: Sequence[PlanEntry], first_tokens: dict[int, int]) -> NDArray[np.int64]:
    """Packed tokens whose logits are needed, in the plan's order."""
    ends = [first_tokens[index] + len(entry.token_ids) for index, entry in enumerate(entries)]
    parts = [np.arange(end - num_logits(entry), end) for entry, end in zip(entries, ends, strict=True)]
    return np.concatenate(parts).astype(np.int64)
