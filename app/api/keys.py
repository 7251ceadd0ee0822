"""API keys: who may ask. Read from a file or the environment, kept as hashes, checked in constant time.

A file has one key a line, `name:key` or the key alone, and after it, divided by blanks, `weight=2` (its share of
tokens beside other keys), `concurrency=8` (most sequences in flight) and `priority=0` (the lowest number, and so the
best place, that its requests may ask for) where they are wanted; blank lines and lines that begin with # are left out.
It is looked at again at most once a second: a changed file takes effect without a restart. One that cannot
be read any more changes nothing and is logged; one that is empty now lets nobody in.

Invariants: no key is kept, logged or compared as itself; without a valid key nothing behind the layer runs.
"""

import hmac
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import Unauthorized, kind_of
from app.api.record import RequestRecord
from app.api.respond import ErrorResponse
from app.api.share import Share
from app.core.errors import ConfigurationError

MIN_KEY_CHARS = 16
MAX_KEY_CHARS = 512
_NAMED = re.compile(r"^(?P<name>[A-Za-z0-9_.-]{1,64}):(?P<key>.*)$")
_KEY = re.compile(rf"^[\x21-\x7e]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}$")
_WEIGHT = re.compile(r"^[0-9]{1,6}(\.[0-9]{1,6})?$")
_PRIORITY = re.compile(r"^-?[0-9]{1,9}$")
_ID_CHARS = 12
_LOOK_SECONDS = 1.0
_OPEN_PATHS = frozenset({"/health", "/ready", "/"})
_OPEN_PREFIX = "/page/"
_METRICS_PATH = "/metrics"

_logger = logging.getLogger("headwater.keys")


@dataclass(frozen=True, slots=True)
class Key:
    """One key, without the key."""

    digest: bytes
    """Its SHA-256."""
    name: str | None
    weight: float = 1.0
    max_live: int | None = None
    best_priority: int | None = None

    @property
    def share(self) -> Share:
        """What it may have."""
        return Share(self.id, self.weight, self.max_live, self.best_priority)

    @property
    def id(self) -> str:
        """How the log and the prefix cache call it: the beginning of a hash."""
        return sha256(self.digest).hexdigest()[:_ID_CHARS]


class KeyRing:
    """A set of keys."""

    def __init__(
        self, *, file: Path | None = None, keys: Sequence[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`keys` hold, whole, beside those of the file. Raises ConfigurationError where none is there or fit."""
        self._file = file
        self._fixed = tuple(_make_key(key.strip(), None, "HEADWATER_API_KEY") for key in keys)
        self._clock = clock
        self._looked_at = clock()
        self._seen = None if file is None else _fingerprint(file)
        self._of_file = () if file is None else _read(file)
        if not self._fixed and not self._of_file:
            raise ConfigurationError(f"{file} holds no key: write one a line, or leave the setting out")

    def find(self, presented: str) -> Key | None:
        """The key that was presented. Takes as long for a wrong one as for a right one."""
        self._refresh()
        digest = sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found: Key | None = None
        for key in (*self._fixed, *self._of_file):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if self._file is None or now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        seen = _fingerprint(self._file)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._of_file = _read(self._file)
        except ConfigurationError as error:
            _logger.error("the keys stay as they were: %s", error)
        else:
            _logger.info("read %d keys from %s", len(self._of_file), self._file)


class KeyLayer:
    """Asks for a key on every route but the open ones. Pure ASGI, inside the layer that makes the record."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None, metrics_keys: KeyRing | None) -> None:
        self._app = app
        self._keys = keys
        self._metrics_keys = metrics_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        rings = [ring for ring in self._rings(path) if ring is not None]
        record = RequestRecord.of(scope)
        if rings:
            presented = _presented(Headers(scope=scope))
            key = next((key for ring in rings for one in presented if (key := ring.find(one)) is not None), None)
            if key is None:
                error = Unauthorized(_explain(presented), code=None if presented else "missing_api_key")
                record.error_code = error.code or kind_of(error).code
                await ErrorResponse(error, scope)(scope, receive, send)
                return
            record.key_id, record.key_name, record.share = key.id, key.name, key.share
        await self._app(scope, receive, send)

    def _rings(self, path: str) -> tuple[KeyRing | None, ...]:
        """Any key of these rings opens the path; none are needed where there are none."""
        if path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX):
            return ()
        return (self._keys, self._metrics_keys) if path == _METRICS_PATH else (self._keys,)


def _presented(headers: Headers) -> list[str]:
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = [bearer.strip()] if scheme.lower() == "bearer" else []
    given.append(headers.get("x-api-key", ""))
    return [one for one in given if one]


def _explain(presented: Sequence[str]) -> str:
    if presented:
        return "The API key is not one of this server's."
    return "This server needs an API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`."


def _fingerprint(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(file: Path) -> tuple[Key, ...]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the keys in {file}: {error}") from error
    return tuple(_parse_lines(text.splitlines(), str(file)))


def _parse_lines(lines: Iterable[str], source: str) -> Iterable[Key]:
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield _parse_line(stripped, f"{source}, line {number}")


def _parse_line(line: str, source: str) -> Key:
    named = _NAMED.match(line)
    name, rest = (None, line) if named is None else (named["name"], named["key"].strip())
    text, *options = rest.split() or [""]
    key = _make_key(text, name, source)
    for option in options:
        key = _with_option(key, option, source)
    return key


def _with_option(key: Key, option: str, source: str) -> Key:
    name, _, value = option.partition("=")
    if name == "weight" and _WEIGHT.match(value) and float(value) > 0:
        return replace(key, weight=float(value))
    if name == "concurrency" and value.isdecimal() and int(value[:9]) > 0:
        return replace(key, max_live=int(value[:9]))
    if name == "priority" and _PRIORITY.match(value):
        return replace(key, best_priority=int(value))
    # What it is may be part of a key.
    raise ConfigurationError(f"{source}: behind a key only `weight=2`, `concurrency=8` and `priority=0` are understood")


def _make_key(key: str, name: str | None, source: str) -> Key:
    if not _KEY.match(key):
        if name is None and ":" in key:
            raise ConfigurationError(
                f"{source}: the name in front of the `:` has 1 to 64 ASCII letters, digits and `_.-`, and no others"
            )
        # The key itself is never part of a message.
        raise ConfigurationError(
            f"{source}: a key has {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable ASCII characters without spaces; "
            "`openssl rand -hex 24` makes one"
        )
    return Key(sha256(key.encode()).digest(), name)
