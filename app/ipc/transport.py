"""Framing of the socket between the API process and the engine process, and the engine's end of it.

A frame is a little-endian u32 length and a msgpack body. The API process reads and writes with
asyncio (`app.ipc.api_end`). The engine's one thread owns `EngineEnd`: it never blocks on sending, and what
the kernel does not take at once waits in a backlog that the loop watches. Descriptors come beside the
first frame alone.

Invariant: bytes that are no frame, or a frame that is no message, end the connection (`FrameError`);
nobody guesses where the next frame begins.
"""

import array
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from app.ipc.messages import FromEngine, ToEngine

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""A larger length is taken for garbage. The longest prompt of 1M tokens is about 5 MB."""
RECEIVE_BYTES = 256 * 1024
_HEADER = struct.Struct("<I")
HEADER_BYTES = _HEADER.size
_ANCILLARY_BYTES = socket.CMSG_LEN(8 * array.array("i").itemsize)
"""Room for eight descriptors."""


class FrameError(Exception):
    """The bytes received are not frames of the messages agreed on."""


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """Length and body of one message. Raises FrameError where the body exceeds MAX_FRAME_BYTES."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a {type(message).__name__} of {len(body)} bytes exceeds {MAX_FRAME_BYTES}; send it in parts")
    return _HEADER.pack(len(body)) + body


def body_length(header: bytes | bytearray | memoryview) -> int:
    """What a header says of the body behind it. Raises FrameError."""
    (length,) = _HEADER.unpack(header)
    if not 0 < length <= MAX_FRAME_BYTES:
        raise FrameError(f"a frame claims {length} bytes; 1 to {MAX_FRAME_BYTES} are possible")
    return int(length)


class FrameBuffer:
    """Cuts received bytes into frame bodies."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add received bytes; yields the bodies that are complete. Raises FrameError."""
        self._bytes += data
        start = 0
        while len(self._bytes) - start >= _HEADER.size:
            end = start + _HEADER.size + body_length(self._bytes[start : start + _HEADER.size])
            if len(self._bytes) < end:
                break
            yield bytes(self._bytes[start + _HEADER.size : end])
            start = end
        del self._bytes[:start]


class EngineEnd:
    """The engine's end. One thread calls it, between steps; others may only `wake` it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._frames = FrameBuffer()
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._backlog: deque[memoryview] = deque()
        self._backlog_bytes = 0
        self._descriptors: list[int] = []
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __del__(self) -> None:
        os.close(self._wake_fd)

    def wake(self) -> None:
        """End a wait in `receive`, or the next one where none is under way. Any thread may call it."""
        os.eventfd_write(self._wake_fd, 1)

    @property
    def backlog_bytes(self) -> int:
        """Bytes sent that the kernel has not taken yet."""
        return self._backlog_bytes

    def receive(self, timeout: float | None = 0.0) -> list[ToEngine]:
        """What has arrived, waiting up to `timeout` seconds for the first message (None: for ever).

        Waiting also ends when the kernel took a part of the backlog, and by `wake`. Raises FrameError for
        what is no message and ConnectionError when the API process has closed its end.
        """
        self.flush()
        if timeout != 0.0:
            writable = select.POLLOUT if self._backlog else 0
            self._poll(select.POLLIN | writable, timeout=timeout, takes_wakes=True)
            self.flush()
        messages: list[ToEngine] = []
        while data := self._receive_bytes():
            for body in self._frames.feed(data):
                messages.append(self._decode(body))
        return messages

    def take_descriptors(self) -> list[int]:
        """Descriptors that came so far; the caller owns them."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def send(self, message: FromEngine) -> None:
        """Hand to the kernel what it takes; the rest waits in the backlog. Never blocks."""
        frame = encode_frame(message)
        self._backlog.append(memoryview(frame))
        self._backlog_bytes += len(frame)
        self.flush()

    def flush(self, *, timeout: float = 0.0) -> None:
        """Hand on the backlog; with a timeout, wait up to so many seconds for the kernel to take all of it."""
        deadline = time.monotonic() + timeout
        while self._backlog:
            try:
                sent = self._socket.send(self._backlog[0])
            except BlockingIOError:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return
                self._poll(select.POLLOUT, timeout=remaining)
                continue
            self._backlog_bytes -= sent
            if sent == len(self._backlog[0]):
                self._backlog.popleft()
            else:
                self._backlog[0] = self._backlog[0][sent:]

    def watch_for_close(self, on_close: Callable[[], None]) -> None:
        """Call `on_close` from a thread of its own when the API process closes its end, also in mid-step."""
        fd = self._socket.fileno()

        def watch() -> None:
            poller = select.poll()
            poller.register(fd, select.POLLRDHUP)
            while not poller.poll():
                pass
            on_close()

        threading.Thread(target=watch, name="watch-socket", daemon=True).start()

    def _poll(self, events: int, *, timeout: float | None, takes_wakes: bool = False) -> None:
        poller = select.poll()
        poller.register(self._socket, events)
        if takes_wakes:
            poller.register(self._wake_fd, select.POLLIN)
        ready = poller.poll(None if timeout is None else max(0.0, timeout) * 1000)
        if any(fd == self._wake_fd for fd, _ in ready):
            os.eventfd_read(self._wake_fd)

    def _receive_bytes(self) -> bytes | None:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(RECEIVE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors += array.array("i", content)
        if not data:
            raise ConnectionResetError("the API process has closed the socket")
        return data

    def _decode(self, body: bytes) -> ToEngine:
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise FrameError(f"a frame of {len(body)} bytes is no message to an engine: {error}") from error
