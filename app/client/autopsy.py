"""Whether an engine died of itself or was ended from outside, and what the kernel says of want of memory.

Of itself: a signal that the kernel sends for what a process did (SIGSEGV, SIGBUS, SIGABRT, SIGILL, SIGFPE ...), an
exit, an exception, broken messages, a hang, or SIGKILL by the kernel for want of memory. From outside: any other
signal. `kill -SEGV` cannot be told from a bad pointer; the suspicion then ends with the trials.
"""

import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

CGROUPS = Path("/sys/fs/cgroup")
_SELF_INFLICTED = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}
)


def is_self_inflicted(returncode: int | None, *, was_out_of_memory: bool) -> bool:
    """By exit status, or minus the signal's number; None: it closed its socket and did not exit."""
    if returncode is None or returncode >= 0:
        return True
    if returncode == -signal.SIGKILL:
        return was_out_of_memory
    return -returncode in _SELF_INFLICTED


def leaves_memory_true(returncode: int | None, *, was_out_of_memory: bool) -> bool:
    """Whether what the process had sealed in shared memory can be believed: somebody else ended it.

    Not after an end of its own making: whatever went wrong may have written there first. Nor for want of
    memory: then the memory itself is what is needed.
    """
    return returncode is not None and not is_self_inflicted(returncode, was_out_of_memory=was_out_of_memory)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped (SIGSTOP, a debugger) rather than at work."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")


class KillCounter(msgspec.Struct, frozen=True):
    """A file in which the kernel counts the processes that it killed for want of memory."""

    path: Path

    def read(self) -> int:
        """The count; 0 where the file cannot be read or has none."""
        try:
            lines = self.path.read_text().splitlines()
        except OSError:
            return 0
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.strip().isdigit():
                return int(value)
        return 0


def find_kill_counter(*, cgroups: Path = CGROUPS, proc: Path = Path("/proc")) -> KillCounter:
    """Our cgroup's memory.events (in version 1 memory.oom_control), else the whole machine's /proc/vmstat."""
    for candidate in _candidates(cgroups, proc):
        if candidate.is_file():
            return KillCounter(candidate)
    return KillCounter(proc / "vmstat")


def _candidates(cgroups: Path, proc: Path) -> list[Path]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append(cgroups / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(cgroups / "memory" / path.lstrip("/") / "memory.oom_control")
    return found


class MemoryWatch:
    """Tells whether the kernel killed for want of memory around an engine's death."""

    MIN_AGE_SECONDS = 5.0
    """A process takes a while from the kernel's kill, when the count rises, to its end, when we look."""

    def __init__(self, read: Callable[[], int], now: float) -> None:
        self._read = read
        self._baseline = self._next = read()
        self._next_at = now

    def tick(self, now: float) -> None:
        """Move the baseline on, so that an old rise is not taken for a new one."""
        if now - self._next_at >= self.MIN_AGE_SECONDS:
            self._baseline, self._next, self._next_at = self._next, self._read(), now

    def has_risen(self) -> bool:
        """Whether the count is higher than some seconds ago."""
        return self._read() > self._baseline
