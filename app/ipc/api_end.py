"""The API process's end of the socket to an engine. Apart from `transport`, because engines start without asyncio."""

import asyncio
import socket

import msgspec

from app.ipc.messages import FromEngine, ToEngine
from app.ipc.transport import HEADER_BYTES, RECEIVE_BYTES, FrameError, body_length, encode_frame


class ApiEnd:
    """The API process's end: awaits one message at a time, writes without waiting."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

    @classmethod
    async def open(cls, sock: socket.socket) -> "ApiEnd":
        """Take over a connected stream socket."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=RECEIVE_BYTES)
        return cls(reader, writer)

    async def receive(self) -> FromEngine | None:
        """The next message; None when the other end has closed, also in the middle of a frame. Raises FrameError."""
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            body = await self._reader.readexactly(body_length(header))
        except (asyncio.IncompleteReadError, OSError):
            return None
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise FrameError(f"a frame of {len(body)} bytes is no message of an engine: {error}") from error

    def send(self, message: ToEngine) -> None:
        """Write at once or buffer; a dead engine shows in `receive`, never here."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    def close(self) -> None:
        """Close now; what was not written is dropped."""
        self._writer.transport.abort()
