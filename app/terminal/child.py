"""A server that a command starts for itself: `headwater serve` as a child, on a free port of this machine.

The child ends with the block that started it, and with this process whatever ends it. It does not get
the terminal's Ctrl-C: that belongs to the command.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import app
from app.terminal.wire import Api, ApiError, Unreachable

START_SECONDS = 900.0
"""The first start may fetch the model."""
STOP_SECONDS = 10.0
POLL_SECONDS = 0.05
SHOWN_LOG_BYTES = 2000
_PR_SET_PDEATHSIG = 1
_DROPPED_VARIABLES = frozenset(
    f"HEADWATER_{name}"
    for name in ("API_KEY", "API_KEY_FILE", "METRICS_KEY_FILE", "SSL_CERTFILE", "SSL_KEYFILE", "ROOT_PATH")
)


@contextmanager
def own_server(*, model: str | None = None, arguments: Sequence[str] = ()) -> Iterator[str]:
    """Start a server and wait until it takes requests; its address. Raises ApiError with the end of its log."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = serve_command(port, model=model, arguments=arguments)
    with tempfile.TemporaryFile("w+b") as log:
        process = _spawn(command, log)
        try:
            _wait_ready(process, url, log)
            yield url
        finally:
            _stop(process)


def serve_command(port: int, *, model: str | None, arguments: Sequence[str]) -> list[str]:
    """The child's command line. The host is said, for the variables may name another."""
    command = [sys.executable, "-P", "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", str(port), *arguments]
    return command if model is None else [*command, model]


def child_environment() -> dict[str, str]:
    """This process's variables without those of keys, TLS and a proxy: the child is asked without them."""
    root = str(Path(app.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED_VARIABLES}
    return {**kept, "PYTHONPATH": path}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _spawn(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=child_environment(),
        start_new_session=True,
        preexec_fn=end_with_parent,
    )


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    with Api(url) as api:
        while not _is_ready(api):
            if process.poll() is not None:
                raise ApiError(f"the server ended with status {process.returncode}:\n{_end_of(log)}")
            if time.monotonic() > deadline:
                raise ApiError(f"the server was not ready after {START_SECONDS:.0f} s:\n{_end_of(log)}")
            time.sleep(POLL_SECONDS)


def _is_ready(api: Api) -> bool:
    try:
        ready = api.ready()
    except Unreachable:
        return False
    return ready is not None and ready.state == "ready"


def _end_of(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - SHOWN_LOG_BYTES))
    return log.read().decode(errors="replace").strip()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Two SIGTERM: the first would wait for live requests, and nobody reads their answers any more."""
    try:
        for _ in range(2):
            process.terminate()
            try:
                process.wait(STOP_SECONDS / 2)
                return
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
