"""Which connections are open, so that no crowd of them keeps others out.

A connection is *idle* until a request's head has come whole, and again after its answer. Beyond `most`
connections the one that has been idle longest makes room; where none is idle, the new one is closed.

Invariants: never more than `most` stay open; one that is being served is never closed for another. One event
loop's thread.
"""

import logging
import resource
from typing import Protocol

from app.observability.metrics import Metrics

MAX_DESCRIPTORS = 65_536
RESERVED_DESCRIPTORS = 128
"""For everything that is no client's connection: engines, files, the listening socket."""

_logger = logging.getLogger("headwater.api")


class Connection(Protocol):
    """What can be closed."""

    def close_now(self) -> None:
        """Close, whatever is not sent yet."""
        ...


class ConnectionRoom:
    """The open connections of one server."""

    def __init__(self, most: int, *, metrics: Metrics | None = None) -> None:
        self._most = most
        self._metrics = metrics
        self._idle: dict[Connection, None] = {}
        self._num_open = 0

    def count_with(self, metrics: Metrics) -> None:
        """Count in these from now on: the server listens before it knows what it serves."""
        self._metrics = metrics

    def opened(self, connection: Connection) -> None:
        """A client connected; it is idle. Closes one connection where there are too many."""
        self._num_open += 1
        self._idle[connection] = None
        if self._num_open > self._most:
            oldest = next(iter(self._idle))  # where all others are served, the new one
            del self._idle[oldest]
            self.note_cut("no_room")
            oldest.close_now()

    def busy(self, connection: Connection) -> None:
        """A request has come."""
        self._idle.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        """Its answer is out."""
        self._idle[connection] = None

    def closed(self, connection: Connection) -> None:
        """It is gone."""
        self._num_open -= 1
        self._idle.pop(connection, None)

    def note_cut(self, reason: str, **facts: object) -> None:
        """This side closed a connection for what its client does, or does not."""
        if self._metrics is not None:
            self._metrics.count_cut(reason)
        _logger.warning("closed a connection", extra={"facts": {"reason": reason, **facts}})


def raise_descriptor_limit() -> int:
    """Take as many file descriptors as this process may have; returns how many connections that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    most = MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return max(16, most - RESERVED_DESCRIPTORS)
