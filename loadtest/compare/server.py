"""One server process under measurement: start it, wait until it answers, weigh it, and end all of it.

Servers start processes of their own, some in sessions of their own: what is ended is the tree below the
process that was started here, as it stood just before.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

_POLL_S = 0.1
_STOP_S = 30.0
_KILL_S = 10.0
_LOG_LINES = 8


class ServerFailed(RuntimeError):
    """It did not start, or did not answer in time."""


class Server:
    """A context manager: running inside, gone with all its processes afterwards."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = list(command)
        self._environment = os.environ | dict(environment)
        self._port = port
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def __enter__(self) -> "Server":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self, body: Mapping[str, object], *, timeout_s: float) -> float:
        """Seconds from the start of the process to the first completion that was answered.

        Args:
            body: fields to ask with.

        Raises:
            ServerFailed: it ended, or does not answer within `timeout_s`.
        """
        assert self._process is not None
        while time.monotonic() - self._started < timeout_s:
            if (status := self._process.poll()) is not None:
                raise ServerFailed(f"it ended with status {status}:\n{self._last_lines()}")
            if self._answers(body):
                return time.monotonic() - self._started
            time.sleep(_POLL_S)
        raise ServerFailed(f"no answer within {timeout_s:.0f} s:\n{self._last_lines()}")

    @property
    def pid(self) -> int | None:
        """Of the process that was started; None outside of the context."""
        return None if self._process is None else self._process.pid

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes: pages that several share are counted once."""
        assert self._process is not None
        return tree_pss_bytes(self._process.pid)

    def stop(self) -> None:
        """SIGTERM to the process, then SIGKILL to what is left of its tree."""
        if self._process is None:
            return
        members = {pid: _start_time(pid) for pid in tree(self._process.pid)}
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        deadline = time.monotonic() + _KILL_S
        while alive := [pid for pid, began in members.items() if began is not None and _start_time(pid) == began]:
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            if time.monotonic() > deadline:
                raise ServerFailed(f"processes {alive} of {self._command[0]} do not end")
            time.sleep(_POLL_S)
        self._process = None

    def _answers(self, fields: Mapping[str, object]) -> bool:
        body = {"prompt": "a", "max_tokens": 1, "temperature": 0.0} | dict(fields)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60.0)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            return response.status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_lines(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


def free_port() -> int:
    """A port of this machine's loopback that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def tree(pid: int) -> list[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for other, parent in _parents():
        children.setdefault(parent, []).append(other)
    members, new = [], [pid]
    while new:
        members += new
        new = [child for member in new for child in children.get(member, [])]
    return members


def tree_pss_bytes(pid: int) -> int:
    """Proportional set size of the process and all that descend from it."""
    return sum(_pss_bytes(member) for member in tree(pid))


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            yield int(entry.name), int(fields[1])


def _start_time(pid: int) -> str | None:
    """Tells a process from a later one with the same number; None for one that is gone or only not yet reaped."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else fields[19]


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
