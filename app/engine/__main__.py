"""The engine process: `python -m app.engine --socket-fd N --progress-fd M`, started by the API process.

It lives exactly as long as its socket: it ignores SIGINT and SIGTERM (a Ctrl-C or a service manager's stop
reaches the whole group, and the API process still drains), and it ends when the API process closes its end or
dies, in the middle of a load or a step too.

Exit status: 0 the socket closed, 1 a failure that was reported as Fatal, 2 a configuration error.
"""

import argparse
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys

from app.core.errors import ConfigurationError
from app.core.memory import EngineMemory
from app.engine.build import Engine, build_engine
from app.engine.loop import EngineLoop
from app.ipc.messages import Fatal, Ready, Start
from app.ipc.progress import EnginePhase, ProgressWriter
from app.ipc.transport import EngineEnd
from app.observability.logging import configure_logging

logger = logging.getLogger("headwater.engine")

EXIT_SOCKET_CLOSED = 0
EXIT_FAILED = 1
EXIT_CONFIGURATION = 2
FATAL_SEND_SECONDS = 2.0
PROCESS_NAME = b"headwater-eng"
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def main() -> int:
    """Run an engine until its socket closes; returns the exit status."""
    options = _parse_arguments()
    configure_logging(level=options.log_level, form=options.log_format)
    _settle_in()
    channel = EngineEnd(socket.socket(fileno=options.socket_fd))
    channel.watch_for_close(_exit_now)
    progress = ProgressWriter(options.progress_fd)
    try:
        start, memory = _receive_start(channel)
        progress.set_generation(start.generation)
        return _serve(start, memory, channel, progress)
    except ConnectionError:
        return EXIT_SOCKET_CLOSED


def _serve(start: Start, memory: EngineMemory, channel: EngineEnd, progress: ProgressWriter) -> int:
    progress.set_phase(EnginePhase.LOADING)
    try:
        engine = build_engine(start.config, memory)
    except ConfigurationError as error:
        _send_fatal(channel, start, seq=0, reason=str(error), is_configuration=True)
        return EXIT_CONFIGURATION
    except Exception as error:
        logger.exception("the model did not load")
        reason = f"the model did not load: {type(error).__name__}: {error}"
        _send_fatal(channel, start, seq=0, reason=reason, is_configuration=False)
        return EXIT_FAILED
    return _run_loop(engine, start, channel, progress)


def _run_loop(engine: Engine, start: Start, channel: EngineEnd, progress: ProgressWriter) -> int:
    if not engine.limits.kept.has_adopted_weights:
        gc.collect()  # packing leaves much behind; whoever found packed weights has somebody waiting
    gc.freeze()  # what the load left lives until the exit: no collection needs to look at it again
    loop = EngineLoop(engine, generation=start.generation, channel=channel, progress=progress)
    progress.set_phase(EnginePhase.IDLE)
    channel.send(Ready(start.generation, 0, engine.limits))
    try:
        loop.run()
    except ConnectionError:
        raise
    except Exception as error:
        logger.exception("a step failed")
        reason = f"a step failed: {type(error).__name__}: {error}"
        _send_fatal(channel, start, seq=loop.next_seq, reason=reason, is_configuration=False)
    return EXIT_FAILED


def _send_fatal(channel: EngineEnd, start: Start, *, seq: int, reason: str, is_configuration: bool) -> None:
    channel.send(Fatal(start.generation, seq, reason, is_configuration))
    channel.flush(timeout=FATAL_SEND_SECONDS)


def _receive_start(channel: EngineEnd) -> tuple[Start, EngineMemory]:
    while True:
        for message in channel.receive(None):
            if isinstance(message, Start):
                descriptors = channel.take_descriptors()
                if len(descriptors) != message.num_descriptors:
                    logger.warning("%d of %d descriptors came", len(descriptors), message.num_descriptors)
                    return message, EngineMemory()
                return message, EngineMemory.of(descriptors)
            raise ConnectionError(f"the first message was {type(message).__name__}, not Start")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app.engine", description="Started by the API process.")
    parser.add_argument("--socket-fd", type=int, required=True, help="connected stream socket to the API process")
    parser.add_argument("--progress-fd", type=int, required=True, help="memfd of the progress page")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="auto")
    return parser.parse_args()


def _settle_in() -> None:
    """Signals, the kernel's own watch on our parent, and a name for `top` and `pgrep`."""
    faulthandler.enable()  # a crash in native code says where
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    # Belt and braces beside the socket: also ends an engine that is stopped. The kernel sends it when the
    # *thread* that started us ends, so whoever spawns engines does it from a thread that lives on.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NAME, PROCESS_NAME, 0, 0, 0)


def _exit_now() -> None:
    """The main thread may be deep in a step: nothing there is worth a clean end."""
    os._exit(EXIT_SOCKET_CLOSED)


if __name__ == "__main__":
    sys.exit(main())
