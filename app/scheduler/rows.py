"""Rows of the runner's state: each running sequence keeps one from admission until it stops running."""

import heapq


class Rows:
    """Row indexes 0 .. num_rows - 1, the lowest free one first."""

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows))
        self._released: list[int] = []

    @property
    def has_free(self) -> bool:
        """Whether `take` has one."""
        return bool(self._free)

    def take(self) -> int:
        """A free row. Raises IndexError where there is none."""
        return heapq.heappop(self._free)

    def release(self, row: int) -> None:
        """Give a row back; it may be taken again at once, the next plan says that it began anew."""
        heapq.heappush(self._free, row)
        self._released.append(row)

    def pop_released(self) -> tuple[int, ...]:
        """Rows given back since the last call, for the plan to name."""
        released = tuple(self._released)
        self._released.clear()
        return released
