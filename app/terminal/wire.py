"""The public API as the commands need it: models, readiness, streams; and what to say when it fails.

Every failure is an `ApiError` whose message says what was asked of whom. Bodies of other servers may
lack what ours says of itself: those fields are None.
"""

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec

from app.core.errors import ConfigurationError, HeadwaterError
from app.terminal.resume import Lost, Refused, ResumingStream

CONNECT_SECONDS = 10.0
READ_SECONDS = 300.0
"""Between two events: an engine that is replaced loads its model meanwhile."""
PATIENCE_SECONDS = 30.0
"""Without a new token, while no server answers."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class ApiError(HeadwaterError):
    """The server did not do what was asked. The message is for the person at the terminal."""

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Unreachable(ApiError):
    """Nothing answers at the address."""


class Delta(NamedTuple):
    """What one event of a stream adds."""

    text: str
    finish_reason: str | None
    reasoning: str = ""
    """What the model thinks before it answers."""


class Model(msgspec.Struct, frozen=True):
    """An entry of /v1/models. Only `id` is there on every server."""

    id: str
    row_independent: bool | None = None
    tier: str | None = None
    device: str | None = None


class Ready(msgspec.Struct, frozen=True):
    """Our /ready."""

    state: str
    generation: int
    engine_pid: int | None = None


class _ModelList(msgspec.Struct):
    data: list[Model]


class _Part(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Part | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


class Lines:
    """Divides a byte stream into lines at newlines alone: JSON may hold what else Unicode calls the end of a line."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> list[str]:
        """The lines that are complete now, without their ends."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.rstrip(b"\r").decode(errors="replace") for line in lines]


class Api:
    """One server, or several of the same model, spoken to in order. Close it, or use it as a context manager."""

    def __init__(self, url: str, *, key: str | None = None, on_cut: Callable[[str], None] | None = None) -> None:
        """`url`: one, or several divided by commas; `on_cut` is told when an answer must go on elsewhere."""
        self._urls = [base_url(one) for one in url.split(",")]
        options = client_options(self.url, key=key)
        self._http = httpx.Client(**options | {"trust_env": not all(map(is_loopback, self._urls))})
        self._on_cut = on_cut
        self._can_resume = False
        """The server is one of ours: its streams have cursors."""

    @property
    def url(self) -> str:
        """The server that answered last."""
        return self._urls[0]

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def choose_model(self, name: str | None) -> Model:
        """The served model of this name, or the first one."""
        response = self._get("/v1/models")
        if response.status_code != 200:
            raise response_error(response)
        try:
            models = msgspec.json.decode(response.content, type=_ModelList).data
        except msgspec.MsgspecError:
            raise ApiError(f"{self.url}/v1/models did not answer with a list of models: is it such a server?") from None
        chosen = [model for model in models if name in (None, model.id)]
        if not chosen:
            names = ", ".join(model.id for model in models) or "none"
            raise ApiError(f"{self.url} does not serve {name!r}; it serves: {names}")
        self._can_resume = chosen[0].row_independent is not None
        return chosen[0]

    def ready(self) -> Ready | None:
        """What /ready says; None where the server has no such route."""
        return read_ready(self._get("/ready"))

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[Delta, None, None]:
        """Post a request and yield what comes. Closing the iterator closes the connection: the server stops.

        Of a server of ours, once a model was chosen, the answer goes on where a connection breaks.
        """
        _require_text(body)
        if self._can_resume:
            yield from self._resuming(path, body)
            return
        try:
            with self._http.stream("POST", self.url + path, json=dict(body)) as response:
                if response.status_code != 200:
                    response.read()
                    raise response_error(response)
                lines = Lines()
                for data in response.iter_bytes():
                    yield from filter(None, map(read_line, lines.push(data)))
        except httpx.HTTPError as error:
            raise transport_error(self.url, error) from None

    def _resuming(self, path: str, body: Mapping[str, Any]) -> Generator[Delta, None, None]:
        stream = ResumingStream(self._urls, path, body, patience=PATIENCE_SECONDS, on_cut=self._on_cut, http=self._http)
        try:
            for chunk in stream:
                if (delta := _delta_of(msgspec.convert(chunk, _Event))) is not None:
                    yield delta
        except Refused as error:
            raise ApiError(str(error), status=error.status, code=error.code) from None
        except Lost as error:
            raise Unreachable(str(error)) from None

    def _get(self, path: str) -> httpx.Response:
        """From the first server that answers; it is the first one then."""
        for _ in self._urls[1:]:
            try:
                return self._http.get(self.url + path)
            except httpx.TransportError:
                self._urls.append(self._urls.pop(0))
        try:
            return self._http.get(self.url + path)
        except httpx.HTTPError as error:
            raise transport_error(self.url, error) from None


def base_url(url: str) -> str:
    """The address without a trailing slash or /v1. Raises ConfigurationError where it is not one of HTTP."""
    url = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"--url takes an address such as http://127.0.0.1:8000, got {url!r}")
    return url


def is_loopback(url: str) -> bool:
    """Whether the address is this machine's own."""
    return urlsplit(url).hostname in LOOPBACK


def client_options(url: str, *, key: str | None) -> dict[str, Any]:
    """Options of an httpx client for this address; proxies are not asked for this machine's own."""
    return {
        "base_url": url,
        "headers": {} if key is None else {"authorization": f"Bearer {key}"},
        "timeout": httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        "limits": httpx.Limits(max_connections=None),
        "trust_env": not is_loopback(url),
    }


def read_line(line: str) -> Delta | None:
    """One line of an event stream; None where it adds nothing. Raises ApiError for an error event."""
    if not line.startswith("data:"):
        return None
    payload = line.removeprefix("data:").strip()
    if payload in ("", "[DONE]"):
        return None
    try:
        event = msgspec.json.decode(payload, type=_Event)
    except msgspec.MsgspecError:
        raise ApiError(f"the server sent an event that is not of this API: {payload[:200]!r}") from None
    if event.error is not None:
        raise ApiError(f"the server ended the answer: {_error_message(event.error)}")
    return _delta_of(event)


def _require_text(body: Mapping[str, Any]) -> None:
    """Raise ApiError for what a terminal or a pipe gave that is no UTF-8: Python kept its bytes as half characters."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError("what was typed is not UTF-8, and was not sent") from None


def _delta_of(event: _Event) -> Delta | None:
    if not event.choices:
        return None
    choice = event.choices[0]
    text = choice.text if choice.delta is None else choice.delta.content
    thought = None if choice.delta is None else choice.delta.reasoning_content
    return Delta("" if text is None else text, choice.finish_reason, "" if thought is None else thought)


def read_ready(response: httpx.Response) -> Ready | None:
    """The body of /ready, whatever its status; None where it is not ours."""
    try:
        return msgspec.json.decode(response.content, type=Ready)
    except msgspec.MsgspecError:
        return None


def response_error(response: httpx.Response) -> ApiError:
    """The error of a response that is not a 200, read to its end."""
    try:
        content = msgspec.json.decode(response.content)
    except msgspec.MsgspecError:
        content = None
    error = content.get("error") if isinstance(content, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    message = f"{response.url} answered {response.status_code}"
    if error is not None:
        message += f": {_error_message(error)}"
    return ApiError(message, status=response.status_code, code=code if isinstance(code, str) else None)


def transport_error(url: str, error: httpx.HTTPError) -> ApiError:
    """What a failure of the connection means."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Unreachable(f"no server answers at {url}: start one with `headwater serve`, or name another by --url")
    if isinstance(error, httpx.TimeoutException):
        return ApiError(f"{url} was silent for {READ_SECONDS:.0f} s")
    return ApiError(f"the connection to {url} broke: {str(error) or type(error).__name__}")


def _error_message(error: object) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return str(error if message is None else message)
