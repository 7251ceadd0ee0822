"""`python -m loadtest.watched_server FILE serve ...`: the `headwater` command, with a watch over its event loop.

A timer in the loop is due each millisecond. Where it comes more than LEAST_SECONDS late, a line of FILE tells: when
(CLOCK_MONOTONIC), how late beside what its thread waited for a processor, and the CPU time that the process used in
that while. The first is how long the loop stood still. The smaller of the two is how long it would have stood still on
a machine with nothing else to do: other work there also holds up whoever holds the interpreter's lock.
"""

import sys
import time
from asyncio import AbstractEventLoop
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import msgspec

TICK_SECONDS = 0.001
LEAST_SECONDS = 0.003


class Stall(msgspec.Struct, frozen=True):
    """One while in which the loop did nothing else."""

    at: float
    late: float
    """Seconds, the wait for a processor left out."""
    cpu: float
    """Seconds of the whole process."""

    @property
    def own(self) -> float:
        """Seconds that are the server's doing."""
        return min(self.late, self.cpu)


def read_stalls(path: Path, *, since: float) -> Iterable[Stall]:
    """Those that ended after `since`."""
    decode = msgspec.json.Decoder(Stall).decode
    stalls = (decode(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
    return [stall for stall in stalls if stall.at >= since]


class _Watch:
    """Of one loop, begun in its thread."""

    def __init__(self, loop: AbstractEventLoop, file: IO[bytes]) -> None:
        self._loop = loop
        self._file = file
        self._queue = Path("/proc/thread-self/schedstat").open()  # noqa: SIM115 - read until the process ends
        self._set()

    def _set(self) -> None:
        self._cpu, self._queued = time.process_time(), self._queue_seconds()
        self._due = time.monotonic() + TICK_SECONDS
        self._loop.call_later(TICK_SECONDS, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        late = now - self._due - (self._queue_seconds() - self._queued)
        if late > LEAST_SECONDS:
            self._file.write(msgspec.json.encode(Stall(now, late, time.process_time() - self._cpu)) + b"\n")
        self._set()

    def _queue_seconds(self) -> float:
        self._queue.seek(0)
        return int(self._queue.read().split()[1]) / 1e9


def main() -> int:
    """The command's exit code."""
    import uvloop

    from app import cli

    file = Path(sys.argv.pop(1)).open("ab", buffering=0)  # noqa: SIM115 - written until the process ends
    make = uvloop.new_event_loop

    def make_watched() -> AbstractEventLoop:
        loop = make()
        loop.call_soon(_Watch, loop, file)
        return loop

    uvloop.new_event_loop = make_watched  # type: ignore[assignment]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
