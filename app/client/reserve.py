"""File descriptors kept back, so that an engine can be started when connections have used up all others."""

import os

NUM_DESCRIPTORS = 16
"""Starting an engine takes 10 for a moment: socket pair, page and its mapping, null device, the fork's pipe, memfds."""


class DescriptorReserve:
    """Holds descriptors of the null device."""

    def __init__(self, count: int = NUM_DESCRIPTORS) -> None:
        self._count = count
        self._held: list[int] = []

    def fill(self) -> None:
        """Take as many as are missing and can be had."""
        try:
            while len(self._held) < self._count:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return

    def release(self) -> None:
        """Give all of them back."""
        while self._held:
            os.close(self._held.pop())
