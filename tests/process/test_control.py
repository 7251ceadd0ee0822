"""A command asks a server over its socket: real sockets, and a server that is asked in this very process."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from app.control import ControlError, ControlSocket, ask_reload, find_server


@asynccontextmanager
async def server(*, is_done: bool) -> AsyncIterator[None]:
    async def reload(tell: Callable[[str], None]) -> bool:
        tell("first")
        await asyncio.sleep(0)
        tell("then")
        return is_done

    control = ControlSocket(reload)
    await control.open()
    try:
        yield
    finally:
        control.close()


async def ask(pid: int) -> tuple[bool, list[str]]:
    lines: list[str] = []
    return await asyncio.to_thread(ask_reload, pid, report=lines.append), lines


@pytest.mark.parametrize("is_done", [True, False])
async def test_lines_come_and_then_how_it_went(is_done: bool) -> None:
    async with server(is_done=is_done):
        assert await ask(os.getpid()) == (is_done, ["first", "then"])
    with pytest.raises(ControlError, match="no Headwater server"):
        await ask(os.getpid())


async def test_a_second_server_of_the_same_name_does_without() -> None:
    """Two containers of a pod share this network, and each calls its first process 1."""
    async with server(is_done=True), server(is_done=False):
        assert (await ask(os.getpid()))[0] is True


async def test_another_word_is_not_answered() -> None:
    async with server(is_done=True):
        reader, writer = await asyncio.open_unix_connection(f"\0headwater-{os.getpid()}")
        writer.write(b"stop\n")
        assert await reader.read() == b""
        writer.close()


def test_nobody_is_believed_who_took_the_name_of_another_process() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with socket.socket(socket.AF_UNIX) as impostor:
            impostor.bind(f"\0headwater-{other.pid}")
            impostor.listen()
            with pytest.raises(ControlError, match=f"is process {os.getpid()}"):
                ask_reload(other.pid, report=lambda _: None)
    finally:
        other.communicate(b"\n")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), "no Headwater server"),
        (("@other-7", "/run/headwater-8"), "no Headwater server"),
        (("@headwater-11", "@headwater-11", "@other"), "11"),  # a connection has the name too
        (("@headwater-11", "@headwater-9"), "name one of 9, 11"),
    ],
)
def test_the_only_server_is_found(tmp_path: Path, names: tuple[str, ...], expected: str) -> None:
    listed = tmp_path / "unix"
    listed.write_text("Num RefCount\n" + "".join(f"0: 2 0 10000 1 1 42 {name}\n" for name in names))
    if expected.isdigit():
        assert find_server(listed) == int(expected)
        return
    with pytest.raises(ControlError, match=expected):
        find_server(listed)
