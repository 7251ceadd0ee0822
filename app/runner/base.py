"""The protocol between the engine loop and whatever computes logits.

A runner executes plans: it knows rows, positions and block ids, never requests or queues. It owns the
weights, the KV pool and the per-row sampling state. It imports no torch here; implementations may.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from app.core.memory import KeptMemory
from app.core.plan import StepPlan, StepResult

if TYPE_CHECKING:  # the scripted tier starts without numpy
    import numpy as np
    from numpy.typing import NDArray

Bitmask: TypeAlias = "NDArray[np.int32]"
"""(num_words,), num_words x 32 >= vocab_size: bit i % 32 of word i // 32 says whether token i may be drawn."""
StepMasks: TypeAlias = Mapping[int, Bitmask]
"""By row. A row that is not in it may draw every token."""


class RunnerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded runner is. Printed at start, checked by the API process, part of `EngineLimits`."""

    tier: str
    tier_reason: str
    """One clause: why this tier serves here."""
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    """The model's own context length, or the smaller one that was asked for."""
    num_kv_blocks: int
    block_size: int
    kv_bytes: int
    weight_bytes: int
    max_num_batched_tokens: int
    """Token budget of one step: a full one takes about the target inter-token latency."""
    row_independent: bool
    """DESIGN rule 2: a row's tokens depend on nothing that shares its batch, on no chunking, no cache hit."""
    fingerprint: str
    """Names all that the tokens depend on: weights, dtype, tier, ISA level, kernel and sampler epoch."""
    kept: KeptMemory = KeptMemory()
    """`has_kv`: the pool lies in `EngineMemory.kv`, and what was in it is still there."""


class Forward(Protocol):
    """Logits of one step, still where they were computed. Only its own runner looks inside."""


class ModelRunner(Protocol):
    """Executes step plans. One thread calls it; `forward` may return before the work is done."""

    @property
    def info(self) -> RunnerInfo:
        """Fixed from load to exit."""
        ...

    def forward(self, plan: StepPlan) -> Forward:
        """Write the KV of all tokens of the plan and compute the logits that it asks for.

        Rows named in `plan.released_rows` are forgotten first, then `start_row`s are set up.
        """
        ...

    def guesses(self, plan: StepPlan, forward: Forward) -> Mapping[int, int]:
        """By row, the token that a row with a grammar draws if the grammar allows it.

        Of rows of which that is known without a wait; there may be none. A mask for such a row is needed only where
        its guess is forbidden.
        """
        ...

    def sample(self, plan: StepPlan, forward: Forward, masks: StepMasks | None = None) -> StepResult:
        """Draw the next tokens. One result per entry; a failing row has `error`, the others go on.

        `masks` restricts rows whose parameters have a grammar, and no others.

        The draw at a row's position p = start + len(token_ids) (the position the new token will
        take, counted from the start of the prompt) is keyed by (seed, p).
        """
        ...

    def close(self) -> None:
        """Give back device memory and threads."""
        ...


class TierUnavailable(Exception):
    """A tier cannot serve this model on this machine; the next one is tried."""

    def __init__(self, reason: str, *, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        """One clause: what is missing or unknown, with the value."""
        self.remedy = remedy
        """What would enable the tier, or None."""
