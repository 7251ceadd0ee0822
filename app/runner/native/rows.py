"""Per-row state between steps: the sampler, the prompt, and the block tables as the kernels read them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.core.plan import PlanEntry, RowStart, StepPlan
from app.runner.native.draws import RowDraw
from app.runner.sampling import RowSampler
from app.runner.sampling.draw import is_greedy


class Row:
    """One running sequence."""

    def __init__(self, start: RowStart, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.sampler = RowSampler(start, vocab_size, eos_token_ids)
        self.draw = RowDraw(self.sampler)
        self.prompt_token_ids = start.prompt_token_ids
        self.params = start.params
        params = start.params
        is_changed = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        is_masked = bool(params.logit_bias or params.allowed_token_ids or params.bad_words or params.grammar)
        self._is_plain = not (is_changed or is_masked) and params.num_logprobs is None and self.sampler.refusal is None
        self._is_greedy = is_greedy(params)
        self.guesses_largest = params.grammar is not None and self._is_greedy and self.sampler.is_unchanged
        """The token is the largest raw logit where the grammar allows it."""
        self._first_plain_position = len(start.prompt_token_ids) + params.min_tokens

    def takes_largest(self, position: int) -> bool:
        """The token for `position` is the largest raw logit and nothing else is asked: no logits are needed."""
        return self._is_greedy and self._is_plain and position >= self._first_plain_position


class RowTable:
    """Rows by number. A block table grows in place: a step copies the new blocks alone."""

    def __init__(self, *, vocab_size: int, eos_token_ids: Sequence[int], blocks_per_row: int) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._rows: dict[int, Row] = {}
        self.block_tables: NDArray[np.int32] = np.zeros((0, blocks_per_row), dtype=np.int32)
        """(rows, blocks_per_row)"""

    def __getitem__(self, row: int) -> Row:
        return self._rows[row]

    def begin(self, plan: StepPlan) -> None:
        """Forget released rows, set up new ones, take over new blocks."""
        for row in plan.released_rows:
            self._rows.pop(row, None)
        for entry in plan.entries:
            if entry.start_row is not None:
                self._rows[entry.row] = Row(
                    entry.start_row, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids
                )
            self._take_blocks(entry)

    def _take_blocks(self, entry: PlanEntry) -> None:
        if entry.row >= len(self.block_tables):
            grown = np.zeros((max(entry.row + 1, 2 * len(self.block_tables)), self.block_tables.shape[1]), np.int32)
            grown[: len(self.block_tables)] = self.block_tables
            self.block_tables = grown
        count = len(entry.block_table)
        new = count if entry.start_row is not None else entry.num_new_blocks
        if new:
            self.block_tables[entry.row, count - new : count] = entry.block_table[count - new :]
