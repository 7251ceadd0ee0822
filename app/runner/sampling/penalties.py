"""Repetition, presence and frequency penalties, and the counts that they need.

Counts are derived from token ids alone, kept up incrementally, and read without copying.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """How often each token id occurred, as parallel arrays of the ids that occurred at all."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        distinct, counts = np.unique(np.array(token_ids, dtype=np.int64), return_counts=True)
        self._num_first = self._size = len(distinct)
        """The ids that were there first lie sorted."""
        self._index: dict[int, int] = {}
        """Of ids that came later, and of first ones that came again."""
        room = np.zeros(64, dtype=np.int64)
        self._ids = np.concatenate([distinct, room])
        self._counts = np.concatenate([counts, room]).astype(np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        """(num_distinct,), each id once. A view: do not write."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """(num_distinct,), parallel to `ids`. A view: do not write."""
        return self._counts[: self._size]

    def add(self, token_id: int) -> None:
        """Count one more occurrence."""
        index = self._index.get(token_id)
        if index is None:
            index = self._index[token_id] = self._find(token_id)
        self._counts[index] += 1.0

    def _find(self, token_id: int) -> int:
        """Where an id lies that was there first, or else a new place."""
        first = self._ids[: self._num_first]
        index = int(first.searchsorted(token_id))
        if index < self._num_first and first[index] == token_id:
            return index
        if self._size == len(self._ids):
            self._grow()
        self._ids[self._size], self._counts[self._size] = token_id, 0.0
        self._size += 1
        return self._size - 1

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
