"""`headwater serve` and `headwater check`: the life of a server, from the first fork to the exit code.

The engine is started before FastAPI is imported, so that both load side by side. A model that must be fetched or
converted first keeps nobody waiting: `/health` and `/ready` answer meanwhile. The first signal to end drains:
`/ready` says so at once; after a SIGTERM requests are still served for `--drain-grace` seconds, in which load
balancers look elsewhere; then new ones are refused with 503, live ones get `--drain-timeout` seconds, and
everything ends. The second signal ends it at once. A SIGHUP reloads (`app.reload`).
"""

import asyncio
import gc
import ipaddress
import logging
import os
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from app import __version__
from app.access import make_keys, make_metrics_keys
from app.banner import banner, describe_model, shown_in_shell, table
from app.client.process import EngineLaunch, EngineProcess
from app.console import answer, remark
from app.core.errors import ConfigurationError, EngineUnavailable
from app.core.types import EngineLimits
from app.observability.logging import configure_logging
from app.observability.tracing import RequestTracer, make_tracer
from app.settings import API_KEY_VARIABLE, Settings, split_address
from app.signals import Signals, listen_for_signals
from app.store import ModelFolder, Resolution
from app.weights import Model, find_model, read_model

if TYPE_CHECKING:
    import uvicorn

    from app.api.connections import ConnectionRoom
    from app.api.front import Front
    from app.client.local import LocalEngineClient
    from app.reload import Reloader

logger = logging.getLogger("headwater.serve")

EXIT_OK = 0
EXIT_ENGINE_FAILED = 1
LISTEN_BACKLOG = 2048
AT_ONCE_SECONDS = 0.5
"""So long the start waits for a model that is on this machine already, to let its engine load first."""
PUBLIC_GRACE_SECONDS = 5.0
CLOSE_SECONDS = 5
"""How long connections may take to close once their requests have ended."""


def serve(settings: Settings) -> int:
    """Serve until a signal; returns the exit code. Raises ConfigurationError."""
    _check_exposure(settings)
    _check_files(settings)
    listeners = [_listen(settings.host, settings.port)]
    if settings.metrics_listen is not None:
        listeners.append(_listen(*split_address(settings.metrics_listen), advice="another --metrics-listen"))
    configure_logging(level=settings.log_level, form=settings.log_format)
    search = Resolution(lambda report: find_model(settings, report=report), name=settings.model, report=remark)
    start = _start_engine(settings, search.folder.result()) if search.wait(AT_ONCE_SECONDS) else None
    import uvloop  # from here on the engine loads; what only the API needs is imported meanwhile

    from app.api.aside import SWITCH_SECONDS

    sys.setswitchinterval(SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, listeners, search, start))


def check(settings: Settings) -> int:
    """Load the model as `serve` would, print what was decided, and end. Raises ConfigurationError."""
    _check_exposure(settings)
    _check_files(settings)
    configure_logging(level=settings.log_level, form=settings.log_format)
    return asyncio.run(_check(settings, _start_engine(settings, find_model(settings))))


class _Start(NamedTuple):
    """The first engine, loading, and what it was told."""

    model: Model
    launch: EngineLaunch
    engine: EngineProcess


def _start_engine(settings: Settings, folder: ModelFolder) -> _Start:
    """Call it in the thread that lives longest: the engine ends with it."""
    model = read_model(settings, folder)
    launch = EngineLaunch(log_level=settings.log_level, log_format=settings.log_format)
    return _Start(model, launch, EngineProcess.spawn(1, model.config, launch=launch))


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

    folder, config = start.model.folder, start.model.config
    metrics = main.make_metrics(settings, folder)
    client = main.make_engine_client(settings, config, launch=start.launch, metrics=metrics, first=start.engine)
    await client.start()
    try:
        # The model's template and whatever else `serve` would refuse.
        main.make_context(settings, folder, metrics=metrics, engine=client, runs_engine=False)
        answer(table(describe_model(folder, await client.wait_ready(settings.load_timeout))))
    finally:
        await client.stop()
    return EXIT_OK


async def _serve(settings: Settings, listeners: list[socket.socket], search: Resolution, start: _Start | None) -> int:
    from app.api.connections import ConnectionRoom, raise_descriptor_limit
    from app.api.front import Front
    from app.api.starting import StartingApp

    tracer = make_tracer(settings.otlp_traces_endpoint, version=__version__)
    room = ConnectionRoom(raise_descriptor_limit())
    fronts = [Front(StartingApp(lambda: search.detail, root_path=settings.root_path)) for _ in listeners]
    servers = [_make_server(front, settings, room=room) for front in fronts]
    with listen_for_signals() as signals:
        pairs = zip(servers, listeners, strict=True)
        serving = [asyncio.create_task(server.serve(sockets=[listener])) for server, listener in pairs]
        try:
            if start is None:
                folder = await _found(search, signals)
                if folder is None:
                    logger.info("ended by a signal while the model was prepared")
                    return EXIT_OK
                start = _start_engine(settings, folder)
            return await _run(settings, start, listeners, signals=signals, fronts=fronts, room=room, tracer=tracer)
        finally:
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*serving)
            if tracer is not None:
                await asyncio.to_thread(tracer.close)


async def _found(search: Resolution, signals: Signals) -> ModelFolder | None:
    """The model's folder, or None where a signal came first. Raises what `resolve` raises."""
    finding = asyncio.wrap_future(search.folder)
    draining = asyncio.create_task(signals.drain.wait())
    waiting: set[asyncio.Future[Any]] = {finding, draining}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    if finding.done():
        return finding.result()
    search.give_up()
    return None


async def _run(
    settings: Settings,
    start: _Start,
    listeners: list[socket.socket],
    *,
    signals: Signals,
    fronts: list["Front"],
    room: "ConnectionRoom",
    tracer: RequestTracer | None,
) -> int:
    """From the first engine's start to the exit code. Raises ConfigurationError."""
    from app import main
    from app.control import ControlSocket
    from app.reload import Reloader
    from app.serving import Ground, Serving

    folder = start.model.folder
    metrics = main.make_metrics(settings, folder)
    ground = Ground(settings, start.launch, listeners, metrics, tracer, count(1))
    client = ground.make_client(start.model.config, first=start.engine)
    reloader: Reloader | None = None
    try:
        await client.start()
        room.count_with(metrics)
        context = await asyncio.to_thread(ground.make_context, start.model, client)
        reloader = Reloader(ground, fronts, Serving(start.model, client, context, ground.make_apps(context)))

        def describe(limits: EngineLimits) -> str:
            return banner(
                folder,
                limits,
                urls=[
                    _url(listener, scheme="http" if settings.ssl_certfile is None else "https")
                    for listener in listeners
                ],
                model_name=context.model_names[0],
                key=_key_to_paste(settings),
            )

        gc.collect()
        gc.freeze()  # what is there by now stays: a full collection would look at all of it, and hold the loop up
        announcing = _announce(client, describe, timeout=settings.load_timeout)
        control = ControlSocket(reloader.reload)
        await control.open()
        with signals.reloading(reloader.reload):
            is_drained = await _live(reloader, announcing=announcing, drain=signals.drain)
        control.close()
        if not is_drained:
            logger.error("no engine can be kept alive: %s", reloader.serving.client.status.detail)
            return EXIT_ENGINE_FAILED
        await _drain(reloader, settings, signals)
        return EXIT_OK
    finally:
        await (client if reloader is None else reloader).stop()


async def _live(reloader: "Reloader", *, announcing: Awaitable[None], drain: asyncio.Event) -> bool:
    """Until a signal asks to drain (True), or no engine can be kept alive (False). Raises ConfigurationError."""
    draining = asyncio.create_task(drain.wait())
    failing = asyncio.create_task(reloader.wait_failed())
    announcement = asyncio.ensure_future(announcing)
    waiting: set[asyncio.Future[Any]] = {draining, failing, announcement}
    try:
        while not (draining.done() or failing.done()):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if announcement in done:
                announcement.result()
        if not draining.done():
            await announcement  # both may come at once, and it knows of a mistake
        return draining.done()
    finally:
        for task in (draining, failing, announcement):
            task.cancel()


async def _announce(client: "LocalEngineClient", describe: Callable[[EngineLimits], str], *, timeout: float) -> None:
    """Print the banner once the engine is ready. Raises ConfigurationError."""
    with suppress(EngineUnavailable):  # `wait_failed` tells
        remark(describe(await client.wait_ready(timeout)))


async def _drain(reloader: "Reloader", settings: Settings, signals: Signals) -> None:
    grace = _grace(settings) if signals.is_terminated else 0.0
    await reloader.leave()
    facts = "not ready any more: new requests for %.0f s, live ones for %.0f s more; a second signal ends them"
    logger.info(facts, grace, settings.drain_timeout)
    draining = asyncio.create_task(_let_finish(reloader, grace=grace, timeout=settings.drain_timeout))
    ending = asyncio.create_task(signals.end.wait())
    await asyncio.wait({draining, ending}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, ending):
        task.cancel()


async def _let_finish(reloader: "Reloader", *, grace: float, timeout: float) -> None:
    await asyncio.sleep(grace)
    await reloader.drain(timeout)


def _key_to_paste(settings: Settings) -> str | None:
    """The key in the command that the banner shows, as a shell reads it; None where none is needed."""
    if API_KEY_VARIABLE in os.environ:
        return f"${API_KEY_VARIABLE}"
    # Pasted into a shell without it, this says what is missing, and nothing is sent.
    file = None if settings.api_key_file is None else Path(settings.api_key_file).name
    return None if file is None else f"${{{API_KEY_VARIABLE}:?set it to a key of {shown_in_shell(file)}}}"


def _grace(settings: Settings) -> float:
    """Load balancers find out from /ready; nobody balances what only this machine reaches."""
    if settings.drain_grace is not None:
        return settings.drain_grace
    return 0.0 if _is_loopback(settings.host) else PUBLIC_GRACE_SECONDS


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


def _check_files(settings: Settings) -> None:
    """Read the operator's files as the application will: what is wrong with them ends the start before anybody can
    connect. Raises ConfigurationError.
    """
    make_keys(settings)
    make_metrics_keys(settings)
    if settings.chat_template is not None:
        from app.text.chat_template import ChatTemplate

        ChatTemplate.check(Path(settings.chat_template))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _make_server(app: "Front", settings: Settings, *, room: "ConnectionRoom") -> "uvicorn.Server":
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
        interface="asgi3",
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


def _url(listener: socket.socket, *, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
