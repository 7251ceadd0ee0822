"""The sparse changes that one row makes to its logits before temperature, as plain arrays.

One value carries them from the row's state to whoever applies them: numpy here, torch on a device.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.runner.sampling.masks import NO_IDS, keep_only
from app.runner.sampling.penalties import presence_and_frequency, repetition


@dataclass(frozen=True)
class LogitChanges:
    """What happens to a row's logits, in the order of the fields. Arrays of ids have each id once."""

    repeated_ids: NDArray[np.int64]
    repetition_penalty: float
    output_ids: NDArray[np.int64]
    output_counts: NDArray[np.float32]
    presence_penalty: float
    frequency_penalty: float
    bias_ids: NDArray[np.int64]
    bias_values: NDArray[np.float32]
    allowed_ids: NDArray[np.int64]
    """Empty: every token is allowed."""
    banned_ids: NDArray[np.int64]
    """Ids may occur more than once here."""

    @property
    def is_empty(self) -> bool:
        """Nothing changes: the raw logits can be used as they are."""
        return not any(map(len, (self.repeated_ids, self.output_ids, self.bias_ids, self.allowed_ids, self.banned_ids)))

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The changed logits, (vocab_size,): the given array itself where nothing changes, else a copy."""
        if self.is_empty:
            return logits
        changed = logits.copy()
        if len(self.repeated_ids):
            repetition(changed, self.repeated_ids, self.repetition_penalty)
        if len(self.output_ids):
            presence_and_frequency(
                changed,
                self.output_ids,
                self.output_counts,
                presence=self.presence_penalty,
                frequency=self.frequency_penalty,
            )
        changed[self.bias_ids] += self.bias_values
        if len(self.allowed_ids):
            changed = keep_only(changed, self.allowed_ids)
        changed[self.banned_ids] = -np.inf
        return changed


NO_CHANGES = LogitChanges(
    repeated_ids=NO_IDS,
    repetition_penalty=1.0,
    output_ids=NO_IDS,
    output_counts=NO_IDS.astype(np.float32),
    presence_penalty=0.0,
    frequency_penalty=0.0,
    bias_ids=NO_IDS,
    bias_values=NO_IDS.astype(np.float32),
    allowed_ids=NO_IDS,
    banned_ids=NO_IDS,
)
"""The raw logits as they are."""
