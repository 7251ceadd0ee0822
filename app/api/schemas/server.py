"""`/v1/models`, `/ready`, `/version`: what the server says of itself."""

import msgspec


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's fields of a model, and what this server resolved for it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "headwater"
    root: str
    max_model_len: int
    fingerprint: str
    tier: str
    device: str
    dtype: str
    row_independent: bool
    """Whether a sequence's tokens are independent of what shares its steps."""


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All names that requests may use."""

    object: str = "list"
    data: list[ModelEntry]


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests are taken, and if not, why."""

    state: str
    generation: int
    detail: str
    row_independent: bool | None
    """None before the first engine was ready."""
    engine_pid: int | None = None
    """The engine's process; null while there is none."""
    last_step_age: float | None = None
    """Seconds since the engine's last step; null before its first. It also grows while there is nothing to do."""
    fingerprint: str | None = None
    """Of the engine that was ready last; null before the first one was."""


class Liveness(msgspec.Struct, frozen=True, kw_only=True):
    """The process answers."""

    status: str


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """The server's version."""

    version: str
