"""Strict decoding of JSON bodies into typed structs, with errors that name the field.

JSON is taken as RFC 8259 has it: no NaN, no Infinity, no number outside a double, no lone surrogate.
The bodies are read twice by msgspec: once for the names of the fields, so that none goes unseen, and
once into the struct.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from app.core.errors import InvalidRequest

StructType = TypeVar("StructType", bound=msgspec.Struct)

_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LOCATED = re.compile(r"^(?P<what>.*?) - at (?:`key` in )?`\$(?P<path>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`$")
MAX_FIELDS = 256
"""Of a body, known or not: no client has so many to say."""
_MANY_COLONS = 16_384
"""A body with more may have so many fields that one call that reads them all holds the interpreter's lock too long."""
_MARK = re.compile(rb'"(?:[^"\\]|\\.)*+"|[{}\[\]:]', re.DOTALL)
_TOO_DEEP = 1024
"""Nobody reads so many levels: the decoder refuses them at once, however many more there are."""
_MAX_SHOWN = 64
_MAX_EXPLAINED = 65_536
"""Longest body that is searched for the forbidden value: the search holds the event loop."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode_keys(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, undecoded: at most `MAX_FIELDS`. Raises InvalidRequest."""
    if body.count(b":") > _MANY_COLONS and _has_many_fields(body):
        raise InvalidRequest(f"The body has more than {MAX_FIELDS} fields.", code="too_many_fields")
    try:
        fields = _KEYS.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(body, error) from error
    if len(fields) > MAX_FIELDS:  # before each is looked up, sorted and perhaps reported on the event loop
        raise InvalidRequest(
            f"The body has {len(fields)} fields; at most {MAX_FIELDS} are taken.", code="too_many_fields"
        )
    return fields


def _has_many_fields(body: bytes) -> bool:
    """Whether it has more than MAX_FIELDS. In small steps, for a thread: what is no JSON is found elsewhere."""
    depth = count = 0
    for mark in _MARK.finditer(body):
        match mark.group()[0]:
            case 0x7B | 0x5B:  # { [
                depth += 1
                if depth > _TOO_DEEP:
                    return False
            case 0x7D | 0x5D:  # } ]
                depth -= 1
            case 0x3A if depth == 1:  # :
                count += 1
                if count > MAX_FIELDS:
                    return True
    return False


def decode_struct(body: bytes, kind: type[StructType], *, fields: Mapping[str, msgspec.Raw]) -> StructType:
    """The body as a struct. `fields` is what `decode_keys` gave. Raises InvalidRequest naming the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), fields) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(body, error) from error


def decode_value(raw: msgspec.Raw) -> object:
    """One field's value in Python's own types. Raises InvalidRequest where it is nested too deeply."""
    try:
        value: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(bytes(raw), error) from error
    return value


def shown(raw: msgspec.Raw | str | bytes) -> str:
    """A client's value for an error message: short, and whatever it holds, printable."""
    text = raw if isinstance(raw, str) else bytes(raw).decode("utf-8", "replace")
    text = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _invalid(message: str, fields: Mapping[str, msgspec.Raw]) -> InvalidRequest:
    located = _LOCATED.match(message)
    missing = _MISSING.match(message if located is None else located["what"])
    if missing is not None:
        within = "" if located is None else f"{located['path'].removeprefix('.')}."
        path = shown(f"{within}{missing['name']}")
        return InvalidRequest(f"`{path}` is required.", param=path)
    if located is None:
        return InvalidRequest(f"The body is not valid: {message}.")
    # msgspec says of a value in an object that it is one, not which.
    path, is_within, _ = located["path"].removeprefix(".").partition("[...]")
    what = located["what"].replace("Expected", "expected").replace("Number out", "number out")
    if what.startswith("expected `int") and what.endswith("got `float`"):
        what += ": a whole number is written without fraction and exponent"
    raw = None if is_within else fields.get(path)
    got = "" if raw is None or "got `" in what else f", got {shown(raw)}"
    whose = "one of its values: " if is_within else ""
    return InvalidRequest(f"`{shown(path)}`: {whose}{what}{got}.", param=shown(path))


def _malformed(body: bytes, error: Exception) -> InvalidRequest:
    if isinstance(error, RecursionError):
        return InvalidRequest("The body is nested too deeply.", code="invalid_json")
    if isinstance(error, UnicodeDecodeError):
        return InvalidRequest("The body is not UTF-8.", code="invalid_json")
    if not body.strip():
        return InvalidRequest("The body is empty: send a JSON object.", code="invalid_json")
    path = _find_forbidden(body)
    if path is None:
        return InvalidRequest(f"The body is not valid JSON: {shown(str(error))}.", code="invalid_json")
    return InvalidRequest(
        f"`{shown(path)}` holds what JSON does not allow: NaN, Infinity or a lone surrogate.",
        param=shown(path),
        code="invalid_json",
    )


def _find_forbidden(body: bytes) -> str | None:
    """Path of the first value that Python's tolerant reader takes and JSON does not, for the message alone."""
    if len(body) > _MAX_EXPLAINED:
        return None
    try:
        root = json.loads(body)
    except (ValueError, RecursionError):
        return None
    # Depth first by a stack of our own: the body may be nested as deeply as json.loads allows.
    stack: list[tuple[str, object]] = [("", root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return path
        if isinstance(value, str) and _SURROGATE.search(value):
            return path
        if isinstance(value, dict):
            stack.extend((f"{path}.{key}".removeprefix("."), item) for key, item in value.items())
            stack.extend((f"{path}.{key}".removeprefix("."), key) for key in value)
        elif isinstance(value, list):
            stack.extend((f"{path}[{index}]", item) for index, item in enumerate(value))
    return None
