"""API keys: who may ask. Read from a file or the environment, kept as hashes, checked in constant time.

A file has one key a line, `name:key` or the key alone, and after it, divided by blanks, `weight=2` (its share of
tokens beside other keys), `concurrency=8` (most sequences in flight) and `priority=0` (the lowest number, and so the
best place, that its requests may ask for) where they are wanted; blank lines and lines that begin with # are left out.
It is looked at again at most once a second: a changed file takes effect without a restart. One that cannot
be read any more, or is blank as while it is being written, changes nothing and is logged as an error; one that has
comments alone now lets nobody in.

Nothing of HTTP is imported here: the start reads the keys before anything listens. `app.api.keys` asks for them.

Invariant: no key is kept, logged or compared as itself.
"""

import hmac
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

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
            self._of_file = _read_again(self._file)
        except ConfigurationError as error:
            _logger.error("the keys stay as they were: %s", error)
            return
        level = logging.INFO if self._of_file else logging.WARNING
        _logger.log(level, "read %d keys from %s", len(self._of_file), self._file)


def _fingerprint(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(file: Path) -> tuple[Key, ...]:
    return tuple(_parse_lines(_text_of(file).splitlines(), str(file)))


def _read_again(file: Path) -> tuple[Key, ...]:
    """The keys of a file that had some. Who empties it on purpose says so in a comment."""
    if not _text_of(file).strip():
        raise ConfigurationError(f"{file} is empty; to let nobody in, write a comment into it, such as `# nobody`")
    return _read(file)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the keys in {file}: {error}") from error


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
