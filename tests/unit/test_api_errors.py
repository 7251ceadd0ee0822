"""One table from exception to HTTP: every error of ours is in it, and no other module spells a status."""

import inspect
import re
from pathlib import Path

import pytest

from app.api import errors
from app.core import errors as core_errors

API = Path(errors.__file__).parent

STATUSES = {
    "InvalidRequest": 400,
    "NotFound": 404,
    "BodyTooLarge": 413,
    "UnsupportedMedia": 415,
    "TooManyRequests": 429,
    "EngineUnavailable": 503,
    "EngineFailed": 500,
}


def test_every_error_has_its_status() -> None:
    for name, status in STATUSES.items():
        assert errors.kind_of(getattr(core_errors, name)).status == status
    for _, kind in inspect.getmembers(core_errors, inspect.isclass):
        if issubclass(kind, core_errors.ClientError):
            assert 400 <= errors.kind_of(kind).status < 500
        elif issubclass(kind, core_errors.ServerError):
            assert errors.kind_of(kind).status >= 500


def test_what_is_unexpected_tells_nothing() -> None:
    error = KeyError("/secret/path")
    body = errors.error_body(error)
    assert errors.kind_of(error).status == 500 and not errors.is_expected(error)
    assert "secret" not in body.error.message and body.error.code == "internal_error"
    # A configuration error names files of the operator: it is no client's business either.
    assert "secret" not in errors.error_body(core_errors.ConfigurationError("secret")).error.message


def test_bodies_and_headers() -> None:
    wrong = core_errors.InvalidRequest("no", param="n", code="c")
    assert errors.error_body(wrong) == errors.ErrorBody(errors.ErrorDetail("no", "invalid_request_error", "n", "c"))
    assert errors.error_headers(core_errors.TooManyRequests("no", retry_after=9)) == [(b"retry-after", b"9")]
    assert errors.error_headers(core_errors.EngineUnavailable("no")) == [(b"retry-after", b"1")]
    assert errors.error_headers(core_errors.EngineUnavailable("no", retry_after=4)) == [(b"retry-after", b"4")]
    assert errors.error_headers(errors.MethodNotAllowed("no", allow="GET")) == [(b"allow", b"GET")]
    assert errors.error_headers(wrong) == []


@pytest.mark.parametrize("path", sorted(API.rglob("*.py")), ids=lambda path: path.stem)
def test_error_statuses_are_spelt_in_the_table_alone(path: Path) -> None:
    if path.name == "errors.py":
        return
    code = re.sub(r'"""[\s\S]*?"""|#.*|"[^"\n]*"', "", path.read_text())
    assert not re.search(r"\b(40[0-9]|41[0-9]|42[0-9]|50[0-4])\b", code)
