"""Numbers of rows for which there are static shapes, and how work is cut into them."""

from collections.abc import Iterator, Sequence

DECODE_SIZES = (1, 2, 4, *range(8, 257, 8))
"""Of decode steps and draws on a GPU."""
FIXED_ROWS = {"cpu": 16, "cuda": 128}
"""The only size in the deterministic mode, by kind of device: on a GPU what it computes while it reads the weights
once; on a CPU, where each row costs time, few."""


def passes(num_rows: int, sizes: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Rows of each pass, and its size: as many passes of the largest as are full, then the smallest for the rest."""
    for first in range(0, num_rows, sizes[-1]):
        rows = slice(first, min(num_rows, first + sizes[-1]))
        yield rows, next(size for size in sizes if size >= rows.stop - rows.start)
