"""How request fields are sorted into honoured, harmless, refused and unknown: the mechanism of the tables.

- *honoured*: a field of the endpoint's struct, with an effect.
- *harmless*: accepted where its value says what the server does anyway, or where it is a label without
  effect; named in the response header `Headwater-Ignored`. Any other value is a 400 that names the field.
- *refused*: a 400 that names the field, with what to do instead.

`null` is "not given" everywhere. A field in none of the lists is unknown: `UnknownFields` decides.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from app.api.schemas.decode import decode_value, shown
from app.core.errors import InvalidRequest

_HEADER_SAFE = re.compile(r"^[A-Za-z0-9_.-]{1,64}\Z")
_MAX_REPORTED = 32

Accepts = Callable[[msgspec.Raw, Mapping[str, msgspec.Raw]], bool]
"""Takes a field's value, undecoded, and all fields of the body."""


class UnknownFields(StrEnum):
    """What happens to a field that no list names."""

    REFUSE = "refuse"
    REPORT = "report"


class Honoured(NamedTuple):
    """A field with an effect."""

    name: str
    default: str
    range: str
    meaning: str


class Accepted(NamedTuple):
    """Values that change nothing."""

    accepts: Accepts
    schema: dict[str, Any]
    """The same as JSON Schema."""


class Harmless(NamedTuple):
    """A field that may be given where it changes nothing."""

    name: str
    values: Accepted
    accepted: str
    """The accepted values, in words."""
    meaning: str


class Refused(NamedTuple):
    """A field that other servers know and this one does not serve."""

    name: str
    instead: str
    """What to do, as the end of a sentence."""


class FieldTable:
    """Every field of one endpoint. Immutable."""

    def __init__(
        self,
        *,
        honoured: tuple[Honoured, ...],
        harmless: tuple[Harmless, ...],
        refused: tuple[Refused, ...],
        unknown: UnknownFields,
    ) -> None:
        self.honoured = honoured
        self.harmless = harmless
        self.refused = refused
        self.unknown = unknown
        """What happens to unknown fields unless the operator decides otherwise."""

    def sort(self, fields: Mapping[str, msgspec.Raw], *, unknown: UnknownFields | None = None) -> tuple[str, ...]:
        """Names for `Headwater-Ignored`, sorted. Raises InvalidRequest for the first field that cannot be served."""
        others = [name for name in fields if name not in self._honoured_names]
        ignored = [name for name in others if bytes(fields[name]) != b"null"]
        for name in ignored:
            self._check(name, fields, self.unknown if unknown is None else unknown)
        return tuple(sorted(ignored))

    def _check(self, name: str, fields: Mapping[str, msgspec.Raw], unknown: UnknownFields) -> None:
        harmless = self._harmless_by_name.get(name)
        if harmless is not None:
            if not harmless.values.accepts(fields[name], fields):
                raise InvalidRequest(
                    f"`{name}` is accepted as {harmless.accepted} only, got {shown(fields[name])}.", param=name
                )
            return
        refused = self._refused_by_name.get(name)
        if refused is not None:
            raise InvalidRequest(f"`{name}` is not served: {refused.instead}.", param=name, code="unsupported_field")
        if unknown is UnknownFields.REFUSE:
            close = difflib.get_close_matches(name[:64], self._honoured_names, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else " Leave it out."
            raise InvalidRequest(f"Unknown field `{shown(name)}`.{hint}", param=shown(name), code="unknown_field")

    @cached_property
    def _honoured_names(self) -> frozenset[str]:
        return frozenset(one.name for one in self.honoured)

    @cached_property
    def _harmless_by_name(self) -> dict[str, Harmless]:
        return {one.name: one for one in self.harmless}

    @cached_property
    def _refused_by_name(self) -> dict[str, Refused]:
        return {one.name: one for one in self.refused}


def ignored_header(names: Iterable[str]) -> bytes:
    """Value of `Headwater-Ignored`. Unknown names are the client's text: odd ones are only counted."""
    listed = list(names)
    safe = [name for name in listed if _HEADER_SAFE.match(name)][:_MAX_REPORTED]
    hidden = len(listed) - len(safe)
    return ", ".join([*safe, f"and {hidden} more"] if hidden else safe).encode("ascii")


def anything() -> Accepted:
    """A label: whatever it is, it has no effect."""
    return Accepted(lambda _value, _fields: True, {})


def only(*values: object) -> Accepted:
    """One of these JSON values."""

    def accepts(raw: msgspec.Raw, _fields: Mapping[str, msgspec.Raw]) -> bool:
        value = decode_value(raw)
        return any(type(value) is type(one) and value == one for one in values)

    return Accepted(accepts, {"enum": [*values, None]})


def one_or_n() -> Accepted:
    """1, or what the field `n` says."""

    def accepts(raw: msgspec.Raw, fields: Mapping[str, msgspec.Raw]) -> bool:
        value = decode_value(raw)
        n = decode_value(fields["n"]) if "n" in fields else 1
        return isinstance(value, int) and not isinstance(value, bool) and value in (1, n)

    return Accepted(accepts, {"type": ["integer", "null"], "minimum": 1})
