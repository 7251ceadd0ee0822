"""How long a process's threads stood in line for a core: time in which a busy machine, not the process, was slow."""

from pathlib import Path

_NS = 1e-9


class RunQueueWait:
    """Reads /proc/PID/task/*/schedstat. Where there is none (another kernel), nobody ever waits."""

    def __init__(self, pid: int, *, proc: Path = Path("/proc")) -> None:
        self._tasks = proc / str(pid) / "task"
        self._last: dict[str, int] = {}

    def take(self) -> float:
        """Seconds that the thread which waited longest has waited since the last call."""
        now = self._read()
        grown = [waited - self._last.get(thread, waited) for thread, waited in now.items()]
        self._last = now
        return max(grown, default=0) * _NS

    def _read(self) -> dict[str, int]:
        waited: dict[str, int] = {}
        try:
            threads = list(self._tasks.iterdir())
        except OSError:
            return waited
        for thread in threads:
            try:
                waited[thread.name] = int((thread / "schedstat").read_text().split()[1])
            except (OSError, ValueError, IndexError):
                continue
        return waited
