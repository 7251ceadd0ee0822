"""What a response says of hand-overs: beforehand what it can promise, and afterwards where it was not exact."""

from app.core.types import EngineLimits

INEXACT_COMMENT = b": an engine was replaced; on this tier the text may differ from here on\n\n"

RESUMED_COMMENT = b": another engine goes on with this; on this tier the text may differ from here on\n\n"


def resume_header(limits: EngineLimits) -> tuple[bytes, bytes]:
    """`Headwater-Resume`: exact where an answer that outlives its engine goes on with the very same tokens."""
    return b"headwater-resume", b"exact" if limits.row_independent else b"approximate"
