"""How commands on this machine speak to a server that runs: an abstract Unix socket named after the server's process.

It is no file, so nothing is left behind and a read-only root is no hindrance. The kernel says whose process is at the
other end: the server heeds its own user and root alone, and a command believes nobody but the process that it asked.
There is one word so far, `reload`, answered with lines for people and a last one that says how it went.
"""

import asyncio
import logging
import os
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from app.signals import Reload

logger = logging.getLogger("headwater.control")

RELOAD = b"reload\n"
_DONE, _FAILED = "done", "failed"
_NAME = "headwater-{}"
_LISTED = re.compile(r"@headwater-(\d+)$")
_CREDENTIALS = struct.Struct("3i")
_ASK_SECONDS = 5.0


class ControlError(Exception):
    """There is no server to speak to, or it cannot be told which one is meant."""


class Peer(NamedTuple):
    """Who is at the other end, as the kernel says."""

    pid: int
    uid: int
    gid: int


class ControlSocket:
    """The server's end. Belongs to the event loop's thread."""

    def __init__(self, reload: Reload) -> None:
        """`reload` is given whom to tell, and returns how it went."""
        self._reload = reload
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen. Where this machine has no such sockets, or the name is taken, that is logged: no command can ask."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(_address(os.getpid()))
            self._server = await asyncio.start_unix_server(self._answer, sock=listener)
        except OSError as error:
            listener.close()
            logger.info("`headwater reload` cannot reach this server, SIGHUP can: %s", error)

    def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer = _peer(writer.get_extra_info("socket"))
            if peer.uid not in (0, os.geteuid()):
                logger.warning("a process of user %d asked for a reload and was not heard", peer.uid)
                return
            async with asyncio.timeout(_ASK_SECONDS):
                word = await reader.readline()
            if word == RELOAD:
                logger.info("process %d asks for a reload", peer.pid)
                is_done = await self._reload(lambda line: writer.write(f"{line}\n".encode()))
                writer.write(f"{_DONE if is_done else _FAILED}\n".encode())
                await writer.drain()
        except (OSError, TimeoutError, ValueError) as error:
            logger.info("a command left: %s", error)
        finally:
            writer.close()


def find_server(listed: Path = Path("/proc/net/unix")) -> int:
    """The process of the only server here, by the kernel's list of sockets. Raises ControlError."""
    lines = listed.read_text().splitlines() if listed.exists() else []
    pids = sorted({int(found[1]) for line in lines if (found := _LISTED.search(line))})
    if not pids:
        raise ControlError("no Headwater server runs here; start one with `headwater serve`")
    if len(pids) > 1:
        raise ControlError(f"several servers run here: name one of {', '.join(map(str, pids))} with --pid")
    return pids[0]


def ask_reload(pid: int, *, report: Callable[[str], None]) -> bool:
    """Have the server of this process reload; whether it did. Raises ControlError."""
    with _connect(pid) as sock:
        sock.sendall(RELOAD)
        last = ""
        with sock.makefile(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                last = line.rstrip("\n")
                if last not in (_DONE, _FAILED):
                    report(last)
    if last not in (_DONE, _FAILED):
        raise ControlError("the server ended before it had reloaded")
    return last == _DONE


def _connect(pid: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(_address(pid))
        peer = _peer(sock)
    except OSError as error:
        sock.close()
        raise ControlError(f"process {pid} is no Headwater server that can be reached: {error.strerror}") from None
    if peer.pid != pid:
        sock.close()
        raise ControlError(f"what calls itself the server of process {pid} is process {peer.pid}: nothing was asked")
    return sock


def _address(pid: int) -> str:
    return "\0" + _NAME.format(pid)


def _peer(sock: socket.socket) -> Peer:
    return Peer(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))
