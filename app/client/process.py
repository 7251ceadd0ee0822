"""One engine process: socket, progress page and child, from spawn to reaping.

Imports neither FastAPI nor asyncio, so that a command can start the first engine, which has much to
import and load, before it imports anything of its own.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

import app
from app.client.memory import MemoryKeeper
from app.core.config import EngineConfig
from app.ipc.messages import Start
from app.ipc.progress import ProgressReader, create_page
from app.ipc.transport import encode_frame

ENGINE_COMMAND = (sys.executable, "-P", "-m", "app.engine")
"""-P: the engine is our `app`, not a folder of that name where the server was started."""
_STDERR = 2


class EngineLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """How engine processes are started."""

    command: tuple[str, ...] = ENGINE_COMMAND
    log_level: str = "info"
    log_format: str = "auto"


class EngineProcess:
    """A child that runs or has run an engine. The owner closes it."""

    def __init__(
        self,
        generation: int,
        popen: subprocess.Popen[bytes],
        sock: socket.socket,
        progress: ProgressReader,
        memory: MemoryKeeper,
    ) -> None:
        self.generation = generation
        self.socket = sock
        """Our end of the engine's socket, until somebody takes it over."""
        self.progress = progress
        self.memory = memory
        """What outlives this engine, for the next one. Not closed here."""
        self._popen = popen

    @classmethod
    def spawn(
        cls,
        generation: int,
        config: EngineConfig,
        *,
        launch: EngineLaunch | None = None,
        memory: MemoryKeeper | None = None,
    ) -> "EngineProcess":
        """Start a child and tell it what to load; returns at once. `memory` is that of its predecessors, if any.

        Call it from a thread that outlives the engine: the kernel kills the child when that thread ends.
        Raises OSError where the machine has no room for another process.
        """
        launch = EngineLaunch() if launch is None else launch
        memory = MemoryKeeper() if memory is None else memory
        ours, theirs = socket.socketpair()
        page_fd = create_page()
        try:
            popen = _popen(launch, socket_fd=theirs.fileno(), progress_fd=page_fd)
            _tell(ours, generation, config, memory.descriptors())
            return cls(generation, popen, ours, ProgressReader(page_fd), memory)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(page_fd)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, or minus the signal's number; None while it lives."""
        return self._popen.poll()

    def kill(self) -> None:
        """SIGKILL; also a stopped process goes. Harmless after its death."""
        if self._popen.poll() is None:
            self._popen.kill()

    def close(self) -> None:
        """Give back socket and page. The engine exits when its socket closes; `kill` does not wait for that."""
        self.socket.close()
        self.progress.close()


def _tell(sock: socket.socket, generation: int, config: EngineConfig, descriptors: tuple[int, ...]) -> None:
    """The first message. Descriptors go beside its first byte."""
    frame = encode_frame(Start(generation, config, num_descriptors=len(descriptors)))
    if descriptors:
        frame = frame[socket.send_fds(sock, [frame], descriptors) :]
    sock.sendall(frame)


def describe_returncode(returncode: int | None, *, was_out_of_memory: bool = False) -> str:
    """An exit status in words."""
    if returncode is None:
        return "the engine closed its socket and did not exit"
    if returncode >= 0:
        return f"the engine exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    if was_out_of_memory:
        return f"the engine was ended by {name}: the kernel was out of memory"
    return f"the engine was ended by {name}"


def _popen(launch: EngineLaunch, *, socket_fd: int, progress_fd: int) -> subprocess.Popen[bytes]:
    arguments = ["--socket-fd", str(socket_fd), "--progress-fd", str(progress_fd)]
    arguments += ["--log-level", launch.log_level, "--log-format", launch.log_format]
    return subprocess.Popen(
        [*launch.command, *arguments],
        pass_fds=(socket_fd, progress_fd),
        stdin=subprocess.DEVNULL,
        stdout=_STDERR,  # standard output is the command's own
        start_new_session=True,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    root = str(Path(app.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = root if not inherited else f"{root}{os.pathsep}{inherited}"
    return {**os.environ, "PYTHONPATH": path}
