"""From exception to HTTP: the one table of statuses, OpenAI error types and codes.

No other module of the project spells an HTTP error status. An exception that is not in the table is a
defect: it becomes a 500 whose body says nothing of its cause; the caller logs it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from app.core.errors import (
    BodyTooLarge,
    ClientError,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    InvalidRequest,
    NotFound,
    QueueTimeout,
    ServerError,
    TooManyRequests,
    UnsupportedMedia,
)


class MethodNotAllowed(ClientError):
    """The route exists and does not answer this HTTP method."""

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow
        """Value of the Allow header."""


class Unauthorized(ClientError):
    """No API key, or one that this server does not know."""


class HostRefused(ClientError):
    """The Host header has a name that this server does not answer to."""


class BodyTimeout(ClientError):
    """The body did not arrive in time."""


class ResumeConflict(ClientError):
    """The stream that the client goes on with is another server's or another request's."""


class ResumeDiverged(ServerError):
    """A stream that was to go on said something else than the client has."""


class HeadTimeout(ClientError):
    """The headers did not arrive in time."""


class HeadTooLarge(ClientError):
    """The headers are longer than any client's need be."""


class ErrorKind(NamedTuple):
    """How one class of exceptions looks on the wire."""

    status: int
    type: str
    code: str | None


_KINDS: Mapping[type[Exception], ErrorKind] = MappingProxyType(
    {
        InvalidRequest: ErrorKind(400, "invalid_request_error", None),
        Unauthorized: ErrorKind(401, "authentication_error", "invalid_api_key"),
        HostRefused: ErrorKind(403, "permission_error", "host_not_allowed"),
        NotFound: ErrorKind(404, "not_found_error", "not_found"),
        MethodNotAllowed: ErrorKind(405, "invalid_request_error", "method_not_allowed"),
        HeadTimeout: ErrorKind(408, "invalid_request_error", "request_timeout"),
        BodyTimeout: ErrorKind(408, "invalid_request_error", "request_timeout"),
        ResumeConflict: ErrorKind(409, "invalid_request_error", "resume_conflict"),
        BodyTooLarge: ErrorKind(413, "invalid_request_error", "body_too_large"),
        UnsupportedMedia: ErrorKind(415, "invalid_request_error", "unsupported_media_type"),
        HeadTooLarge: ErrorKind(431, "invalid_request_error", "headers_too_large"),
        TooManyRequests: ErrorKind(429, "rate_limit_error", "rate_limit_exceeded"),
        ClientError: ErrorKind(400, "invalid_request_error", None),
        QueueTimeout: ErrorKind(503, "server_error", "queue_timeout"),
        DeadlineExceeded: ErrorKind(504, "server_error", "deadline_exceeded"),
        EngineUnavailable: ErrorKind(503, "server_error", "engine_unavailable"),
        EngineFailed: ErrorKind(500, "server_error", "engine_failed"),
        ResumeDiverged: ErrorKind(500, "server_error", "resume_diverged"),
        ServerError: ErrorKind(500, "server_error", None),
    }
)
_MESSAGES_TYPES: Mapping[int, str] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
)
"""Anthropic's words for statuses."""
_UNEXPECTED = ErrorKind(500, "server_error", "internal_error")
_UNEXPECTED_MESSAGE = "The server failed to answer this request. The cause is in its log under the request id."
_DEFAULT_RETRY_AFTER = 1


class ErrorDetail(msgspec.Struct, frozen=True):
    """The object under `error` that OpenAI's clients read."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """Body of every error response and of an error event in a stream."""

    error: ErrorDetail


class MessagesErrorDetail(msgspec.Struct, frozen=True):
    """The object under `error` that Anthropic's clients read."""

    type: str
    message: str


class MessagesErrorBody(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """Body of every error response of `/v1/messages`, and of an error event in its streams."""

    error: MessagesErrorDetail
    request_id: str | None


def kind_of(error: Exception | type[Exception]) -> ErrorKind:
    """The row of the table that serves this exception: its own class's or its nearest ancestor's."""
    cls = error if isinstance(error, type) else type(error)
    return next((_KINDS[base] for base in cls.__mro__ if base in _KINDS), _UNEXPECTED)


def is_expected(error: Exception) -> bool:
    """False: a defect of ours, to be logged with its traceback."""
    return kind_of(error) is not _UNEXPECTED


def error_body(error: Exception) -> ErrorBody:
    """The OpenAI error body. Texts of unexpected exceptions are not shown."""
    kind = kind_of(error)
    if isinstance(error, ClientError):
        code = kind.code if error.code is None else error.code
        return ErrorBody(ErrorDetail(error.message, kind.type, error.param, code))
    message = error.message if isinstance(error, ServerError) else _UNEXPECTED_MESSAGE
    return ErrorBody(ErrorDetail(message, kind.type, None, kind.code))


def messages_error_body(error: Exception, request_id: str | None) -> MessagesErrorBody:
    """The same in Anthropic's form."""
    status = kind_of(error).status
    default = "invalid_request_error" if isinstance(error, ClientError) else "api_error"
    return MessagesErrorBody(
        MessagesErrorDetail(_MESSAGES_TYPES.get(status, default), error_body(error).error.message), request_id
    )


def error_headers(error: Exception) -> list[tuple[bytes, bytes]]:
    """Headers that belong to an error response beside content type and length."""
    if isinstance(error, TooManyRequests):
        return [(b"retry-after", str(error.retry_after).encode())]
    if isinstance(error, EngineUnavailable):
        seconds = _DEFAULT_RETRY_AFTER if error.retry_after is None else error.retry_after
        return [(b"retry-after", str(seconds).encode())]
    if isinstance(error, DeadlineExceeded):
        return [(b"x-should-retry", b"false")]  # OpenAI's and Anthropic's clients would, after any 5xx
    if isinstance(error, Unauthorized):
        return [(b"www-authenticate", b"Bearer")]
    if isinstance(error, MethodNotAllowed):
        return [(b"allow", error.allow.encode())]
    return []
