"""What a server's signals mean.

The first SIGTERM or SIGINT drains, the second ends. A SIGHUP reloads, as daemons do, unless it comes because the
server's terminal was closed: then it drains, once, however many of them come. Where a SIGHUP was ignored from the
start, as nohup has it, it stays so.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("headwater.serve")

Reload = Callable[[Callable[[str], None]], Awaitable[bool]]
"""Is given whom to tell of it, line by line, and returns how it went."""


class Signals:
    """SIGTERM, SIGHUP and SIGINT, as they came."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        """Set by the first one that ends."""
        self.end = asyncio.Event()
        """Set by the second one."""
        self.is_terminated = False
        """The first one was no SIGINT: a machine's wish, not a person's at the keyboard."""
        self._had_terminal = _has_terminal()
        self._reload: Reload | None = None
        self._reloads: set[asyncio.Future[bool]] = set()

    def note(self, number: int) -> None:
        """One came."""
        is_hang_up = number == signal.SIGHUP
        if is_hang_up and (_has_terminal() or not self._had_terminal):
            self._begin_reload()
        elif self.drain.is_set():
            if not is_hang_up:  # the kernel and the shell may both send one
                self.end.set()
        else:
            self.is_terminated = number != signal.SIGINT
            self.drain.set()

    @contextmanager
    def reloading(self, reload: Reload) -> Iterator[None]:
        """A SIGHUP reloads meanwhile."""
        self._reload = reload
        try:
            yield
        finally:
            self._reload = None

    def _begin_reload(self) -> None:
        if self._reload is None:
            logger.warning("a SIGHUP came while nothing can be reloaded, and was not heeded")
            return
        reload = asyncio.ensure_future(self._reload(lambda _: None))  # it is logged
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)


@contextmanager
def listen_for_signals() -> Iterator[Signals]:
    """Note them until the block ends."""
    loop = asyncio.get_running_loop()
    signals = Signals()
    # Who starts a server with nohup wants it to outlive the terminal.
    hang_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    numbers = (signal.SIGTERM, signal.SIGINT, *hang_up)
    for number in numbers:
        loop.add_signal_handler(number, signals.note, number)
    try:
        yield signals
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _has_terminal() -> bool:
    """Whether a terminal controls this process. One that was closed does so no more when its SIGHUP arrives."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
