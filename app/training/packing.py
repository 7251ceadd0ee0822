"""Packs documents into rows without padding; which rows a step reads follows from its number alone.

An epoch lays the documents end to end in an order of its own, cuts that stream into rows of `context` tokens, and
reads the rows in an order of their own. A row may hold several documents or a piece of one; `documents` and
`positions` keep attention inside each document, and no label reaches across two.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from app.core.errors import ConfigurationError
from app.training.shards import Split

NO_LABEL = -100
"""Positions whose next token is another document's. The value that torch's cross-entropy leaves out."""


@dataclass(frozen=True)
class Rows:
    """What a forward pass reads; all arrays are (num_rows, context)."""

    token_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    """Counted from the document's first token in the row."""
    documents: NDArray[np.int64]
    """Which of the row's documents a token belongs to, from 0."""


class PackedRows:
    """The endless sequence of rows of one split, numbered from 0."""

    def __init__(self, split: Split, *, context: int, seed: int) -> None:
        self._split = split
        self._context = context
        self._seed = seed
        self.rows_per_epoch = (len(split.tokens) - 1) // context
        if self.rows_per_epoch < 1:
            raise ConfigurationError(
                f"the split has {len(split.tokens)} tokens, less than one row of {context}; "
                "give more text or a smaller context"
            )
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def rows(self, first: int, count: int) -> Rows:
        """Rows `first` to `first + count - 1`."""
        pieces = [self._row(number) for number in range(first, first + count)]
        token_ids, labels, positions, documents = (np.stack(arrays) for arrays in zip(*pieces, strict=True))
        return Rows(token_ids, labels, positions, documents)

    def _row(self, number: int) -> tuple[NDArray[np.int64], ...]:
        epoch, index = divmod(number, self.rows_per_epoch)
        order, starts, row_order = self._epoch(epoch)
        begin = int(row_order[index]) * self._context
        tokens = np.empty(self._context + 1, np.int64)
        document_of = np.empty(self._context + 1, np.int64)
        place, filled = int(np.searchsorted(starts, begin, "right")) - 1, 0
        while filled < len(tokens):
            document = self._split.document(int(order[place]))
            piece = document[begin + filled - int(starts[place]) :][: len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            document_of[filled : filled + len(piece)] = place
            filled, place = filled + len(piece), place + 1
        documents = document_of[:-1] - document_of[0]
        labels = np.where(document_of[1:] == document_of[:-1], tokens[1:], NO_LABEL)
        first_of = np.searchsorted(documents, documents, "left")  # (context,): where the token's document begins
        return tokens[:-1], labels, np.arange(self._context) - first_of, documents

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._split.offsets) - 1)
        lengths = np.diff(self._split.offsets)[order]
        starts = np.concatenate([[0], np.cumsum(lengths)])  # (num_documents + 1,)
        return order, starts, generator.permutation(self.rows_per_epoch)
