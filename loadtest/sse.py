"""Cuts a byte stream into server-sent events, however the network split it."""


class EventParser:
    """Feed bytes, get the data of every event they complete. Comments and other fields are skipped."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._held_return = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The `data` of each event that ended in `chunk`, its lines joined by newlines."""
        *lines, self._line = (self._line + self._with_newlines(chunk)).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    def _with_newlines(self, chunk: bytes) -> bytes:
        """Lines may end in CR LF or CR; a CR at the end waits, for its LF may come next."""
        if self._held_return:
            chunk = b"\r" + chunk
        if b"\r" not in chunk:
            return chunk
        self._held_return = chunk.endswith(b"\r")
        if self._held_return:
            chunk = chunk[:-1]
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
