"""Draws of the native tier: what the C pass reads of each row, kept up from step to step.

A row's parameters are written once. A step adds where its logits lie, its position, and what its tokens so far change.
The tokens are those of `app.runner.sampling`, which also says what is wrong where C finds nothing to draw.
"""

import ctypes
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.runner.native.library import CRow, Library, address
from app.runner.sampling import RowSampler
from app.runner.sampling.draw import is_greedy

MOST_TOKENS = 1 << 20
"""DRAW_VOCAB: larger vocabularies are left to numpy."""


class RowDraw:
    """One row, as C reads it: `address` is where its struct lies as long as this lives."""

    def __init__(self, sampler: RowSampler) -> None:
        params = sampler.params
        self._sampler = sampler
        self._owners: dict[str, object] = {}
        """The arrays that the struct points into."""
        self._mask: NDArray[np.int32] | None = None
        self._row = CRow(
            seed=params.seed,
            top_p=params.top_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            temperature=0.0 if is_greedy(params) else params.temperature,
            lowest_score=math.log(min(params.min_p, 1.0)) if params.min_p > 0.0 else -math.inf,
            top_k=params.top_k,
        )
        self.address = ctypes.addressof(self._row)

    def aim(self, logits: int, position: int, *, best_id: int, mask: NDArray[np.int32] | None) -> None:
        """The next draw: from raw, finite logits at an address, the largest of which is `best_id`'s."""
        row = self._row
        row.logits, row.position, row.best_id = logits, position, best_id
        if mask is not None or self._mask is not None:
            self._mask = mask
            row.mask = address(mask)
        if not self._sampler.is_unchanged:
            self._note_changes()

    @property
    def token_id(self) -> int | None:
        """What was drawn; None: nothing can be."""
        token_id: int = self._row.token_id
        return None if token_id < 0 else token_id

    def _note_changes(self) -> None:
        row, changes = self._row, self._sampler.changes()
        row.num_repeated = self._point("repeated_ids", changes.repeated_ids)
        row.num_output = self._point("output_ids", changes.output_ids)
        self._point("output_counts", changes.output_counts)
        row.num_bias = self._point("bias_ids", changes.bias_ids)
        self._point("bias_values", changes.bias_values)
        row.num_allowed = self._point("allowed_ids", changes.allowed_ids)
        row.num_banned = self._point("banned_ids", changes.banned_ids)

    def _point(self, field: str, array: NDArray[np.generic]) -> int:
        """Let a field point at an array, whose length is returned. An address takes a microsecond to find out."""
        count = len(array)
        owner = array if array.base is None else array.base  # counts are views of the beginning of what grows
        if count and self._owners.get(field) is not owner:
            self._owners[field] = owner
            setattr(self._row, field, address(array))
        return count


def draw_rows(library: Library, context: int | None, vocab_size: int, draws: Sequence[RowDraw]) -> None:
    """Draw for all of them in one call; each then has its `token_id`. Raises MemoryError."""
    rows = (ctypes.c_void_p * len(draws))(*[draw.address for draw in draws])
    if library.draw(context, vocab_size, len(draws), rows) < 0:
        raise MemoryError(f"no memory to draw from {vocab_size} tokens; lower --max-num-seqs")
