"""A step being put together: the budget left, and the entries so far beside the sequences they are of."""

from app.core.plan import PlanEntry
from app.scheduler.sequence import Sequence


class Step:
    """Collects the work of one step. Each sequence enters once; entries never exceed the budget."""

    __slots__ = ("budget", "entries", "sequences")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Tokens that may still be added."""
        self.entries: list[PlanEntry] = []
        self.sequences: list[Sequence] = []

    def num_tokens_for(self, sequence: Sequence) -> int:
        """How many of a sequence's missing tokens fit."""
        return min(len(sequence.token_ids) - sequence.num_computed_tokens, self.budget)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Compute the next `num_tokens` of a sequence whose block table covers them."""
        start = sequence.num_computed_tokens
        end = start + num_tokens
        blocks = sequence.blocks
        sample = end == len(sequence.token_ids) and not sequence.is_scoring
        start_row = None
        if sequence.is_new_row:
            start_row = sequence.row_start()
            sequence.is_new_row = False
        self.entries.append(
            PlanEntry(
                sequence.row,
                start,
                tuple(sequence.token_ids[start:end]),
                0,
                blocks.view,
                blocks.announce(),
                sequence.logits_need(end, sample=sample),
                sample,
                start_row,
            )
        )
        self.sequences.append(sequence)
        sequence.is_in_flight = True
        self.budget -= num_tokens
