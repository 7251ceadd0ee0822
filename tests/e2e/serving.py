"""A real `headwater serve` with the default model, for tests that use it as a person would."""

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.store_models import default_model_folder

START_SECONDS = 60


@contextmanager
def serve_default_model(log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address, once it is ready. It is ended, and its log kept in `log`."""
    default_model_folder()
    port = free_port()
    with started(log, "-m", "app.cli", "serve", "--port", str(port), "--kv-cache-gib", "0.5", *flags) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url, log)
        yield process, url


@contextmanager
def started(log: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process with no HEADWATER_ variables but the given ones, killed at the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=output, env={**environment, **variables}
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def headwater(*arguments: str) -> str:
    """Standard output of a command, which must succeed."""
    done = subprocess.run([sys.executable, "-m", "app.cli", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def wait_ready(process: subprocess.Popen[bytes], url: str, log: Path, *, trust: ssl.SSLContext | None = None) -> None:
    """Wait for a 200 of /ready; fails with the log where the server ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}:\n{log.read_text()}")
        try:
            if httpx.get(f"{url}/ready", verify=trust or True).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready after {START_SECONDS} s:\n{log.read_text()}")
