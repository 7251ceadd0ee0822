"""A streamed answer that outlives its connection and its server: a client to use as it is, or to copy.

It needs httpx and nothing else of this project. Each event of a resumable stream has a cursor as its `id`; when the
connection breaks, the same request goes with that cursor to the next server of the list, and the chunks go on as if
nothing had happened: none is lost, doubled or changed.

    for chunk in ResumingStream(["http://a:8000", "http://b:8000"], "/v1/completions", {"prompt": "Hi"}):
        print(chunk["choices"][0]["text"], end="")

Invariant: cursor and token ids are those of the events that were yielded, never of one that came in part.
"""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import httpx

PATIENCE_SECONDS = 60.0
SILENCE_SECONDS = 35.0
"""A server says something every 10 s."""
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0
_TRY_ELSEWHERE = frozenset({408, 429, 502, 503, 504})
_OTHER_MODEL = "fingerprint_differs"
_ITS_OWN = "deadline_exceeded"
"""The request's own time is up, wherever it is asked."""
_GOING_AWAY = frozenset({"engine_unavailable", "queue_timeout"})
"""Codes of the errors with which a server that stops, or has too much to do, ends its streams."""


class Refused(Exception):
    """A server answered, and another try would not change the answer."""

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Lost(Exception):
    """No server went on with the stream in time."""


class _Cut(Exception):
    """This try is over; another one may go on."""

    def __init__(self, reason: str, *, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the server asks to wait."""


class ResumingStream:
    """Iterate over it once; the chunks are decoded JSON, usage included, in the form of the route."""

    def __init__(
        self,
        urls: Sequence[str],
        path: str,
        body: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        hands_back: bool = True,
        patience: float = PATIENCE_SECONDS,
        on_cut: Callable[[str], None] | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        """`hands_back`: ask for token ids and send them with the cursor, so that a server reads what was said, many
        tokens at once, instead of saying it again. `patience`: seconds without a new event until it gives up.
        `on_cut` is told why it asks again; each reason once until more of the answer has come.
        """
        if not urls:
            raise ValueError("there must be at least one server")
        self._urls = [url.rstrip("/") for url in urls]
        self._path = path
        self._shows_ids = bool(body.get("return_token_ids"))
        self._options = {**(body.get("stream_options") or {}), "resumable": True}
        self._hands_back = hands_back
        self._body = {**body, "stream": True} | ({"return_token_ids": True} if hands_back else {})
        self._headers = dict(headers or {})
        self._patience = patience
        self._on_cut = on_cut
        self._http = httpx.Client(timeout=httpx.Timeout(SILENCE_SECONDS, connect=5.0)) if http is None else http
        self._owns_http = http is None
        self._token_ids: list[list[int]] = []
        self.cursor = ""
        """Of the last event; empty before the first."""
        self.num_events = 0
        self.num_cuts = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._chunks()
        finally:
            if self._owns_http:
                self._http.close()

    def _chunks(self) -> Iterator[dict[str, Any]]:
        wait = _FIRST_WAIT
        progress, since = 0, time.monotonic()
        told: set[str] = set()
        while True:
            try:
                yield from self._one_try(self._urls[0])
                return
            except _Cut as cut:
                reason, asked = str(cut), cut.wait
            self.num_cuts += 1
            if self.num_events > progress:
                progress, since, wait = self.num_events, time.monotonic(), _FIRST_WAIT
                pause = 0.0
                told.clear()
            else:
                pause, wait = max(asked, wait), min(2 * wait, _LONGEST_WAIT)
            if self._on_cut is not None and reason not in told:
                told.add(reason)
                self._on_cut(reason)
            if time.monotonic() + pause - since > self._patience:
                raise Lost(f"no server went on with the stream in {self._patience:g} s; the last: {reason}")
            self._urls.append(self._urls.pop(0))
            time.sleep(pause)

    def _one_try(self, url: str) -> Iterator[dict[str, Any]]:
        """Until the answer's end, or _Cut."""
        headers, options = dict(self._headers), dict(self._options)
        if self.cursor:
            headers["last-event-id"] = self.cursor
            options |= {"resume_token_ids": self._token_ids} if self._hands_back else {}
        body = {**self._body, "stream_options": options}
        try:
            with self._http.stream("POST", url + self._path, json=body, headers=headers) as response:
                if response.status_code != 200:
                    response.read()
                    self._refuse(url, response)
                yield from self._events(url, response)
        except httpx.TransportError as error:
            raise _Cut(f"the connection to {url} broke: {str(error) or type(error).__name__}") from None

    def _events(self, url: str, response: httpx.Response) -> Iterator[dict[str, Any]]:
        for cursor, data in server_sent_events(response.iter_bytes()):
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if (error := chunk.get("error")) is not None:
                self._fail(url, error)
            if not cursor:
                raise Refused(f"{url} sends no cursors: it is no server that can go on with a stream")
            self._take(cursor, chunk)
            yield chunk
        raise _Cut(f"{url} ended the response before its end")

    def _take(self, cursor: str, chunk: dict[str, Any]) -> None:
        self.cursor = cursor
        self.num_events += 1
        if not self._shows_ids:
            chunk.pop("prompt_token_ids", None)
        for choice in chunk.get("choices") or ():
            index = choice["index"]
            while len(self._token_ids) <= index:
                self._token_ids.append([])
            self._token_ids[index] += choice.get("token_ids") or []
            if not self._shows_ids:
                choice.pop("token_ids", None)
                choice.pop("prompt_token_ids", None)

    def _refuse(self, url: str, response: httpx.Response) -> None:
        """Raises _Cut where another server, or the same one later, may answer otherwise; else Refused."""
        status = response.status_code
        try:
            error = response.json()["error"]
            message, code = str(error["message"]), error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            message, code = response.text[:200], None
        said = f"{url} answered {status}: {message}"
        if status in _TRY_ELSEWHERE and code != _ITS_OWN:
            raise _Cut(said, wait=_seconds(response.headers.get("retry-after")))
        if code == _OTHER_MODEL and len(self._urls) > 1:
            del self._urls[0]
            self._urls.insert(0, self._urls.pop())  # the turn goes to the next one
            raise _Cut(said)
        raise Refused(said, status=status, code=code)

    def _fail(self, url: str, error: Any) -> None:
        message = error.get("message") if isinstance(error, dict) else error
        code = error.get("code") if isinstance(error, dict) else None
        if code in _GOING_AWAY:
            raise _Cut(f"{url} ended the answer: {message}")
        raise Refused(f"{url} ended the answer: {message}", code=code)


def server_sent_events(parts: Iterator[bytes]) -> Generator[tuple[str, str], None, None]:
    """(id, data) of each event that is whole; an id holds until the next one."""
    rest, last_id, data = b"", "", list[str]()
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            name, _, value = line.rstrip(b"\r").decode("utf-8", "replace").partition(":")
            if name == "id":
                last_id = value.removeprefix(" ")
            elif name == "data":
                data.append(value.removeprefix(" "))
            elif line in (b"", b"\r") and data:
                yield last_id, "\n".join(data)
                data = []


def _seconds(value: str | None) -> float:
    try:
        return max(0.0, float(value or 0.0))
    except ValueError:
        return 0.0
