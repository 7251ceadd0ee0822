"""The scheduler's order for a step and the runner's answer: frozen, no tensors, no requests.

A running sequence has a permanent *row* in the runner's state from `PlanEntry.start_row` to
`StepPlan.released_rows`. A step gathers its inputs from the rows.
"""

from enum import StrEnum

import msgspec

from app.core.types import SamplingParams, TokenLogprobs


class LogitsNeed(StrEnum):
    """Which positions of an entry need logits."""

    NONE = "none"
    """A prefill chunk that does not reach the end of the sequence."""
    LAST = "last"
    ALL = "all"
    """Every position of the chunk: prompt logprobs. The last one is sampled iff `PlanEntry.sample`."""


class RowStart(msgspec.Struct, frozen=True):
    """State that the runner sets up when a sequence gets its row (first admission or after preemption)."""

    request_id: str
    params: SamplingParams
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    """Generated before this row began (hand-over, preemption): penalties and positions count them."""


class PlanEntry(msgspec.Struct, frozen=True):
    """The work of one sequence in one step: compute `token_ids` at positions start, start + 1, ..."""

    row: int
    start: int
    """Position of the first token = tokens of this sequence whose KV is already there."""
    token_ids: tuple[int, ...]
    num_draft_tokens: int
    """How many of `token_ids`, from the end, are guesses. 0 until speculation exists."""
    block_table: tuple[int, ...]
    """Block ids of the sequence so far, the new ones included; covers start + len(token_ids)."""
    num_new_blocks: int
    """How many of `block_table`, from the end, were appended by this step."""
    logits: LogitsNeed
    sample: bool
    """Draw the next token from the last position."""
    start_row: RowStart | None = None
    """Given in the first entry of a row, None after."""


class StepPlan(msgspec.Struct, frozen=True):
    """One step's work. Rows in `released_rows` were freed before this step and may be reused by it."""

    step_id: int
    entries: tuple[PlanEntry, ...]
    released_rows: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward pass computes."""
        return sum(len(entry.token_ids) for entry in self.entries)


class RowResult(msgspec.Struct, frozen=True):
    """What a step brought for one entry of the plan, in the same order."""

    row: int
    token_ids: tuple[int, ...] = ()
    """Drawn tokens: none for a prefill chunk, one, or accepted drafts plus one."""
    num_accepted: int = 0
    """Draft tokens that were confirmed; the others' KV is void."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With LogitsNeed.ALL: for each prompt position p in this chunk's span start + 1 .. end (the
    logits at p - 1 score the token at p), as far as p is inside the prompt."""
    is_end: bool = False
    """The grammar allows nothing after these tokens, of which there may be none: the sequence ends with `stop`."""
    error: str | None = None
    """The row failed (logits not finite, say): the sequence ends with this message, others go on."""
    is_request_fault: bool = False
    """With an error: the request's own parameters brought it about."""


class StepResult(msgspec.Struct, frozen=True):
    """One result for each entry of the plan, in the plan's order."""

    step_id: int
    rows: tuple[RowResult, ...]
