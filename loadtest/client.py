"""Owns the connections to the server under test: HTTP/1.1 by hand, so that the client costs little.

One request at a time on a connection; a connection that the server keeps open is used again. Every
event is stamped when its bytes arrive, before anything is parsed. Nothing here limits how many
requests run at once.
"""

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import cast
from urllib.parse import SplitResult, urlsplit

import httptools
import msgspec

from loadtest.record import Outcome, RequestRecord
from loadtest.sse import EventParser

_MAX_ERROR_BYTES = 65_536
_MAX_IDLE_NS = 2_000_000_000
"""An older connection may be closed by the server at the moment it is used: a new one is opened."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    """The part of a completion or chat chunk that is measured."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class Response:
    """Takes the bytes of one response and fills its record."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.body = bytearray()
        self.done = asyncio.Event()
        self._events = EventParser()

    def take(self, status: int, data: bytes, now_ns: int) -> None:
        """Body bytes that arrived at `now_ns`."""
        if status != 200:
            self.body += data[: _MAX_ERROR_BYTES - len(self.body)]
            return
        for event in self._events.feed(data):
            if event != b"[DONE]" and self.record.outcome is not Outcome.STREAM_ERROR:
                self._take_event(event, now_ns)

    def end(self, status: int) -> None:
        """The whole body has arrived."""
        record = self.record
        record.status = status
        if status in (429, 503):
            record.outcome = Outcome.REFUSED
        elif status != 200:
            record.outcome = Outcome.HTTP_ERROR
        elif record.outcome is not Outcome.STREAM_ERROR:
            record.outcome = Outcome.TRUNCATED if record.finish_reason is None else Outcome.COMPLETED
        if status != 200:
            record.detail = f"{status} {_error_message(bytes(self.body))}"
        self.finish()

    def fail(self, outcome: Outcome, detail: str) -> None:
        """The response will not come to its end."""
        if not self.done.is_set():
            self.record.outcome, self.record.detail = outcome, detail
            self.finish()

    def finish(self) -> None:
        """Mark the end, once."""
        if not self.done.is_set():
            self.record.end_ns = time.monotonic_ns()
            self.done.set()

    def _take_event(self, event: bytes, now_ns: int) -> None:
        record = self.record
        try:
            chunk = _decode_chunk(event)
        except msgspec.MsgspecError as error:
            record.outcome, record.detail = Outcome.STREAM_ERROR, f"event is no chunk: {error}"
            return
        if chunk.error is not None and bytes(chunk.error) != b"null":
            record.outcome, record.detail = Outcome.STREAM_ERROR, _error_message(event)
            return
        for choice in chunk.choices:
            if choice.text or (choice.delta is not None and choice.delta.content):
                record.output_ns.append(now_ns)
            record.finish_reason = choice.finish_reason or record.finish_reason
        if chunk.usage is not None:
            self._take_usage(chunk.usage)

    def _take_usage(self, usage: _Usage) -> None:
        record, details = self.record, usage.prompt_tokens_details
        record.prompt_tokens = usage.prompt_tokens
        record.output_tokens = 0 if usage.completion_tokens is None else usage.completion_tokens
        if details is not None and details.cached_tokens is not None:
            record.cached_tokens = details.cached_tokens


class _Connection(asyncio.Protocol):
    """One socket. httptools calls the on_* methods while it is fed."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.response: Response | None = None
        self.is_reusable = False
        self.used_ns = 0
        self._parser = httptools.HttpResponseParser(self)
        self._now_ns = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes, response: Response) -> None:
        assert self.transport is not None
        self.response, self.is_reusable = response, False
        self._parser = httptools.HttpResponseParser(self)
        response.record.sent_ns = time.monotonic_ns()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._now_ns = time.monotonic_ns()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")
            self.close()

    def on_body(self, data: bytes) -> None:
        if self.response is not None:
            self.response.take(self._parser.get_status_code(), data, self._now_ns)

    def on_message_complete(self) -> None:
        response, self.response = self.response, None
        self.is_reusable = self._parser.should_keep_alive()
        if response is not None:
            response.end(self._parser.get_status_code())

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        self._fail("the server closed the connection" if exc is None else f"the connection broke: {exc}")

    def close(self) -> None:
        self.is_reusable = False
        if self.transport is not None:
            self.transport.close()

    def _fail(self, detail: str) -> None:
        response, self.response = self.response, None
        if response is not None:
            response.fail(Outcome.CONNECTION, detail)


class Client:
    """Sends requests to one server. Use as an async context manager."""

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float, keep_alive: bool = True) -> None:
        """`url` is the server's, with or without /v1; `keep_alive` uses connections again. Raises ValueError."""
        self._url = _parse_url(url)
        self._timeout_s = timeout_s
        self._headers = {"Host": self._url.netloc.rpartition("@")[2], "Accept": "text/event-stream"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._keep_alive = keep_alive
        if not keep_alive:
            self._headers["Connection"] = "close"
        self._idle: list[_Connection] = []
        is_secure = self._url.scheme == "https"
        self._ssl = ssl.create_default_context() if is_secure else None
        given_port = self._url.port
        self._port = given_port if given_port is not None else 443 if is_secure else 80

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def stream(self, path: str, body: Mapping[str, object], record: RequestRecord) -> None:
        """POST a streaming request and fill `record`; never raises for what the server or network does."""
        response = Response(record)
        await self._exchange("POST", path, msgspec.json.encode(body), response)
        if record.output_tokens == 0:
            record.output_tokens = len(record.output_ns)

    async def first_model(self) -> str:
        """The first name of /v1/models; raises ValueError where there is none."""
        record = RequestRecord(index=-1, scheduled_ns=time.monotonic_ns())
        response = _WholeBody(record)
        await self._exchange("GET", "/v1/models", b"", response)
        try:
            return str(msgspec.json.decode(bytes(response.body))["data"][0]["id"])
        except (msgspec.MsgspecError, LookupError, TypeError) as error:
            told = record.detail if record.detail else bytes(response.body[:200]).decode(errors="replace")
            raise ValueError(f"{self._url.geturl()}/v1/models names no model ({told}); give one by --model") from error

    async def _exchange(self, method: str, path: str, body: bytes, response: Response) -> None:
        connection = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connect()
                connection.send(self._head(method, path, len(body)) + body, response)
                await response.done.wait()
        except TimeoutError:
            response.fail(Outcome.TIMEOUT, f"no end within {self._timeout_s} s")
        except OSError as error:
            response.fail(Outcome.CONNECTION, f"cannot connect: {error.strerror or error}")
        finally:
            if connection is not None:
                self._put_back(connection)

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable and time.monotonic_ns() - connection.used_ns < _MAX_IDLE_NS:
                return connection
            connection.close()
        _, connection = await asyncio.get_running_loop().create_connection(
            _Connection, self._url.hostname or "", self._port, ssl=self._ssl
        )
        return connection

    def _put_back(self, connection: _Connection) -> None:
        if connection.is_reusable and self._keep_alive:
            connection.used_ns = time.monotonic_ns()
            self._idle.append(connection)
        else:
            connection.response = None
            connection.close()

    def _head(self, method: str, path: str, num_bytes: int) -> bytes:
        lines = [f"{method} {self._url.path}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in self._headers.items())]
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {num_bytes}"]
        return "\r\n".join([*lines, "", ""]).encode()


class _WholeBody(Response):
    """A response that is no stream: the body is kept."""

    def take(self, status: int, data: bytes, now_ns: int) -> None:
        self.body += data

    def end(self, status: int) -> None:
        self.record.status = status
        self.finish()


def _parse_url(url: str) -> SplitResult:
    parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ValueError(f"the URL {url!r} is not of the form http://HOST:PORT")
    return parts


def _error_message(body: bytes) -> str:
    """The message of an error body, whichever server wrote it; else the start of the body."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body[:200].decode(errors="replace")
    error = value.get("error", value) if isinstance(value, dict) else value
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:200]
