"""SIGTERM and Ctrl-C as a wish to stop, heard between two steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals(on_stop: Callable[[], None]) -> Iterator[None]:
    """Call `on_stop` on either signal, as long as the block runs; what they did before comes back after it."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        on_stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
