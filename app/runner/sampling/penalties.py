"""Repetition, presence and frequency penalties, and the counts that they need.

Counts are derived from token ids alone, kept up incrementally, and read without copying.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """How often each token id occurred, as parallel arrays of the ids that occurred at all."""

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self._index: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.empty(64, dtype=np.float32)
        for token_id in token_ids:
            self.add(token_id)

    @property
    def ids(self) -> NDArray[np.int64]:
        """(num_distinct,), each id once, in order of first occurrence. A view: do not write."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """(num_distinct,), parallel to `ids`. A view: do not write."""
        return self._counts[: len(self._index)]

    def add(self, token_id: int) -> None:
        """Count one more occurrence."""
        index = self._index.get(token_id)
        if index is None:
            index = len(self._index)
            if index == len(self._ids):
                self._grow()
            self._index[token_id] = index
            self._ids[index] = token_id
            self._counts[index] = 0.0
        self._counts[index] += 1.0

    def _grow(self) -> None:
        self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])


def repetition(logits: NDArray[np.float32], ids: NDArray[np.int64], penalty: float) -> None:
    """In place: positive logits of `ids` are divided by `penalty`, the others multiplied by it."""
    factor = np.float32(penalty)
    values = logits[ids]
    logits[ids] = np.where(values > 0, values / factor, values * factor)


def presence_and_frequency(
    logits: NDArray[np.float32],
    ids: NDArray[np.int64],
    counts: NDArray[np.float32],
    *,
    presence: float,
    frequency: float,
) -> None:
    """In place: subtract `frequency` x count + `presence` from the logits of `ids`, all in float32."""
    logits[ids] -= counts * np.float32(frequency) + np.float32(presence)
