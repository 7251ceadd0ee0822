"""Errors by who is to blame.

HeadwaterError
├── ClientError            the request is wrong; decided before anything costly
│   ├── InvalidRequest     400; names the field
│   ├── NotFound           404; unknown model or route
│   ├── BodyTooLarge       413
│   ├── UnsupportedMedia   415
│   └── TooManyRequests    429; carries retry_after
├── ServerError            our side failed
│   ├── EngineUnavailable  503; starting, restarting or draining
│   │   └── QueueTimeout   503; waited too long for its turn
│   ├── DeadlineExceeded   504; the request's own time was up
│   └── EngineFailed       500; this request ended by a failure
└── ConfigurationError     the operator's settings or model cannot be served; says what to do

HTTP statuses and OpenAI error types are looked up by class in `app.api.errors`, nowhere else.
"""


class HeadwaterError(Exception):
    """Root of our errors. The message is one sentence that says what was wrong and what to do."""


class ClientError(HeadwaterError):
    """The request cannot be served as sent."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(ClientError):
    """A field is missing, unknown, of the wrong type or out of range."""


class NotFound(ClientError):
    """No such model or route."""


class BodyTooLarge(ClientError):
    """The body exceeds --max-body-size."""


class UnsupportedMedia(ClientError):
    """The content type is not application/json."""


class TooManyRequests(ClientError):
    """The queue is full."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after = retry_after
        """Whole seconds after which a new try is likely to be admitted."""


class ServerError(HeadwaterError):
    """The server failed a request that was fine."""

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class EngineUnavailable(ServerError):
    """No engine takes requests now: the first one loads, they die one after another, or the server is draining."""


class QueueTimeout(EngineUnavailable):
    """The request waited for its first output as long as one may."""


class DeadlineExceeded(ServerError):
    """The time that the client or the operator gave the request is up."""


class EngineFailed(ServerError):
    """The request was admitted and then failed."""


class ConfigurationError(HeadwaterError):
    """Settings, model files or machine do not fit; raised before anything is served."""
