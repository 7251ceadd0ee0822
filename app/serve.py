"""`headwater serve` and `headwater check`: the life of a server, from the first fork to the exit code.

The engine is started before FastAPI is imported, so that both load side by side. The first SIGTERM or
SIGINT drains: new requests are refused with 503, live ones get `--drain-timeout` seconds, then
everything ends. The second ends it at once.
"""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from app.banner import banner, describe_model, table
from app.client.process import EngineLaunch, EngineProcess
from app.console import answer, remark
from app.core.config import EngineConfig
from app.core.errors import ConfigurationError, EngineUnavailable
from app.core.types import EngineLimits
from app.observability.logging import configure_logging
from app.settings import API_KEY_VARIABLE, Settings, split_address
from app.store import ModelFolder
from app.weights import find_model

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from app.api.connections import ConnectionRoom
    from app.client.local import LocalEngineClient

logger = logging.getLogger("headwater.serve")

EXIT_OK = 0
EXIT_ENGINE_FAILED = 1
LISTEN_BACKLOG = 2048
CLOSE_SECONDS = 5
"""How long connections may take to close once their requests have ended."""


def serve(settings: Settings) -> int:
    """Serve until a signal; returns the exit code. Raises ConfigurationError."""
    _check_exposure(settings)
    listeners = [_listen(settings.host, settings.port)]
    if settings.metrics_listen is not None:
        listeners.append(_listen(*split_address(settings.metrics_listen), advice="another --metrics-listen"))
    start = _start_engine(settings)
    import uvloop  # from here on the engine loads; what only the API needs is imported meanwhile

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, start, listeners))


def check(settings: Settings) -> int:
    """Load the model as `serve` would, print what was decided, and end. Raises ConfigurationError."""
    return asyncio.run(_check(settings, _start_engine(settings)))


class _Start(NamedTuple):
    """The first engine, loading, and what it was told."""

    folder: ModelFolder
    config: EngineConfig
    launch: EngineLaunch
    engine: EngineProcess


def _start_engine(settings: Settings) -> _Start:
    configure_logging(level=settings.log_level, form=settings.log_format)
    folder = find_model(settings)
    config = settings.to_engine_config(str(folder.path), folder.eos_token_ids)
    launch = EngineLaunch(log_level=settings.log_level, log_format=settings.log_format)
    return _Start(folder, config, launch, EngineProcess.spawn(1, config, launch=launch))


def _listen(host: str, port: int, *, advice: str = "another --port or --host") -> socket.socket:
    """The listening socket, so that a taken port ends the start before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port} ({_words(error)}): choose {advice}") from None


def _words(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)


async def _check(settings: Settings, start: _Start) -> int:
    from app import main

    metrics = main.make_metrics(settings, start.folder)
    client = main.make_engine_client(settings, start.config, launch=start.launch, metrics=metrics, first=start.engine)
    await client.start()
    try:
        answer(table(describe_model(start.folder, await client.wait_ready(settings.load_timeout))))
    finally:
        await client.stop()
    return EXIT_OK


async def _serve(settings: Settings, start: _Start, listeners: list[socket.socket]) -> int:
    from app import main
    from app.api.app import create_app, create_metrics_app
    from app.api.connections import ConnectionRoom, raise_descriptor_limit

    metrics = main.make_metrics(settings, start.folder)
    client = main.make_engine_client(settings, start.config, launch=start.launch, metrics=metrics, first=start.engine)
    context = main.make_context(
        settings, start.folder, metrics=metrics, engine=client, runs_engine=False, listens_on=settings.host
    )
    room = ConnectionRoom(raise_descriptor_limit(), metrics=metrics)
    apps = [create_app(context, root_path=settings.root_path)]
    for listener in listeners[1:]:
        hosts = main.allowed_hosts(listener.getsockname()[0], context.keys or context.metrics_keys)
        apps.append(create_metrics_app(context, allowed_hosts=hosts))
    servers = [_make_server(app, settings, room=room) for app in apps]

    def describe(limits: EngineLimits) -> str:
        return banner(
            start.folder,
            limits,
            urls=[
                _url(listener, scheme="http" if settings.ssl_certfile is None else "https") for listener in listeners
            ],
            model_name=context.model_names[0],
            needs_key=context.keys is not None,
        )

    with _signals() as (drain, end):
        await client.start()
        pairs = zip(servers, listeners, strict=True)
        serving = [asyncio.create_task(server.serve(sockets=[listener])) for server, listener in pairs]
        try:
            announcing = _announce(client, describe, timeout=settings.load_timeout)
            if not await _live(client, announcing=announcing, drain=drain):
                logger.error("no engine can be kept alive: %s", client.status.detail)
                return EXIT_ENGINE_FAILED
            await _drain(client, settings.drain_timeout, end=end)
            return EXIT_OK
        finally:
            await client.stop()
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*serving)


async def _live(client: "LocalEngineClient", *, announcing: Awaitable[None], drain: asyncio.Event) -> bool:
    """Until a signal asks to drain (True), or no engine can be kept alive (False). Raises ConfigurationError."""
    draining = asyncio.create_task(drain.wait())
    failing = asyncio.create_task(client.wait_failed())
    announcement = asyncio.ensure_future(announcing)
    waiting: set[asyncio.Future[Any]] = {draining, failing, announcement}
    try:
        while not (draining.done() or failing.done()):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if announcement in done:
                announcement.result()
        return draining.done()
    finally:
        for task in (draining, failing, announcement):
            task.cancel()


async def _announce(client: "LocalEngineClient", describe: Callable[[EngineLimits], str], *, timeout: float) -> None:
    """Print the banner once the engine is ready. Raises ConfigurationError."""
    with suppress(EngineUnavailable):  # `wait_failed` tells
        remark(describe(await client.wait_ready(timeout)))


async def _drain(client: "LocalEngineClient", timeout: float, *, end: asyncio.Event) -> None:
    logger.info("draining: live requests get %.0f s; a second signal ends them", timeout)
    draining = asyncio.create_task(client.drain(timeout))
    ending = asyncio.create_task(end.wait())
    await asyncio.wait({draining, ending}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, ending):
        task.cancel()


def _check_exposure(settings: Settings) -> None:
    """Refuse TLS files that do not fit; warn where everybody on the network may ask. Raises ConfigurationError."""
    if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
        raise ConfigurationError("--ssl-certfile and --ssl-keyfile need each other: give both or none")
    if settings.ssl_certfile is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # A password, though none: without one OpenSSL would ask for it on the terminal.
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password="")
        except OSError as error:  # ssl.SSLError is one
            raise ConfigurationError(
                f"cannot use --ssl-certfile {settings.ssl_certfile} with --ssl-keyfile {settings.ssl_keyfile}: {error}"
            ) from None
    has_keys = settings.api_key_file is not None or API_KEY_VARIABLE in os.environ
    if not has_keys and not _is_loopback(settings.host):
        remark(
            f"headwater: whoever reaches {settings.host}:{settings.port} may use this server: "
            "set --api-key-file, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _make_server(app: "FastAPI", settings: Settings, *, room: "ConnectionRoom") -> "uvicorn.Server":
    import uvicorn

    from app.api.protocol import BoundedHttpProtocol

    class Protocol(BoundedHttpProtocol):
        """With this server's room for connections."""

    Protocol.room = room

    class Server(uvicorn.Server):
        """uvicorn without its signal handlers: signals drain first, and this module decides when to exit."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,
        http=Protocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    return Server(config)


@contextmanager
def _signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Events of the first and the second SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    drain, end = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if drain.is_set():
            end.set()
        drain.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield drain, end
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _url(listener: socket.socket, *, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
