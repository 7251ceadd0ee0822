"""A whole server in this process's event loop, with an engine process that can be told to fail."""

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import uvicorn

from app import main
from app.api.app import create_app
from app.api.protocol import BoundedHttpProtocol
from app.client.engine_client import EngineState
from app.client.local import LocalEngineClient
from app.client.process import EngineLaunch
from app.client.settings import Supervision
from app.observability.metrics import Metrics
from app.settings import Settings, load_settings
from app.store import resolve
from loadtest.faulty_engine import Fault

WAIT_SECONDS = 60.0
DEFAULT_MODEL = "smollm2-135m-instruct-q4"
VOCAB_SIZE = 49152
SCRIPT: dict[str, float | int | str] = {"vocab_size": VOCAB_SIZE, "block_size": 16, "num_kv_blocks": 8192}


class FaultServer:
    """The server under test."""

    def __init__(self, port: int, client: LocalEngineClient, metrics: Metrics, control: Path) -> None:
        self.port = port
        self.client = client
        self.metrics = metrics
        self._control = control

    def arm(self, fault: Fault) -> None:
        """The engine strikes when the fault's phase comes."""
        fresh = self._control.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(fault))
        fresh.replace(self._control)

    def disarm(self) -> bool:
        """True where the fault had not struck."""
        try:
            self._control.unlink()
        except FileNotFoundError:
            return False
        return True

    @property
    def is_armed(self) -> bool:
        return self._control.exists()

    def kill_engine(self, number: signal.Signals = signal.SIGKILL) -> bool:
        """Send a signal to the engine; False where there is none just now."""
        pid = self.client.engine_pid
        if pid is None:
            return False
        os.kill(pid, number)
        return True

    @property
    def generation(self) -> int:
        return self.client.status.generation

    @property
    def is_ready(self) -> bool:
        return self.client.status.state is EngineState.READY

    @property
    def has_failed(self) -> bool:
        """No engine will be started any more."""
        return self.client.status.state is EngineState.FAILED

    @property
    def num_kv_blocks_held(self) -> int:
        """By sequences, as the engine said last."""
        step = self.client.status.last_step
        return 0 if step is None else step.num_kv_blocks_used + step.num_running + step.num_waiting


async def until(condition: Callable[[], bool], *, seconds: float = WAIT_SECONDS) -> bool:
    """Wait for another process; False where it takes too long."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.003)
    return True


def scripted_settings(**scripted: float | int | str) -> Settings:
    """The scripted tier over the default model's tokenizer: its tokens are a hash of all tokens before."""
    return load_settings(model=DEFAULT_MODEL, tier="scripted", scripted=SCRIPT | scripted)


def scripted_flags(**scripted: float | int | str) -> tuple[str, ...]:
    """The same as flags of a server in a process of its own."""
    return (DEFAULT_MODEL, "--tier", "scripted", "--scripted", json.dumps(SCRIPT | scripted))


def default_settings() -> Settings:
    """The default model on the native tier."""
    return load_settings(model=DEFAULT_MODEL, kv_cache_gib=0.5)


def default_flags() -> tuple[str, ...]:
    """The same."""
    return (DEFAULT_MODEL, "--kv-cache-gib", "0.5")


@asynccontextmanager
async def serving(settings: Settings, *, supervision: Supervision | None = None) -> AsyncIterator[FaultServer]:
    """Serve on a free loopback port until the block ends."""
    folder = resolve(settings.model, report=lambda _: None)
    metrics = main.make_metrics(settings, folder)
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        control = Path(scratch) / "fault.json"
        command = (sys.executable, "-P", "-m", "loadtest.faulty_engine", str(control))
        client = LocalEngineClient(
            settings.to_engine_config(str(folder.path), folder.eos_token_ids),
            launch=EngineLaunch(command=command, log_level="error"),
            supervision=supervision,
            on_step=metrics.observe_step,
        )
        context = main.make_context(settings, folder, metrics=metrics, engine=client, runs_engine=False)
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        server = _Server(
            uvicorn.Config(
                create_app(context),
                http=BoundedHttpProtocol,
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=2,
            )
        )
        await client.start()
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await client.wait_ready(WAIT_SECONDS)
            await until(lambda: server.started)
            yield FaultServer(listener.getsockname()[1], client, metrics, control)
        finally:
            await client.stop()
            server.should_exit = True
            await running
            listener.close()


class _Server(uvicorn.Server):
    """Without signal handlers: Ctrl-C is the command's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
