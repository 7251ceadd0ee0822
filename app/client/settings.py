"""How patient the client is with engines. Defaults for people; tests are less patient."""

import msgspec


class Supervision(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one supervised engine. Times are seconds."""

    hang_seconds: float = 2.0
    """A step that takes longer is a hang, unless more is expected of its size (`hang_factor`)."""
    hang_factor: float = 10.0
    """Times what the engine's own steps of that many tokens took; the larger of the two limits counts."""
    unknown_step_seconds: float = 1.0
    """Expected of the first step of an engine, beside `unknown_token_seconds` for each of its tokens: generous,
    because it also pays for what is done once (pages of the weights, kernels that are built when first used)."""
    unknown_token_seconds: float = 0.01
    preparation_seconds: float = 60.0
    """An engine that only prepares grammars says so over and over, but the preparation may hold it up. More than the
    engine's own limit, by which it ends a sequence whose grammar takes too long."""
    load_seconds: float = 600.0
    """From the start of an engine to its Ready."""
    max_deaths: int = 5
    """So many deaths within the window, with no token received between them, and no engine is started any more."""
    window_seconds: float = 60.0
    """The window's clock runs while an engine is ready, so that slow loads do not hide a crash loop."""
    backoff_seconds: float = 0.5
    """Wait before the second restart in a row without a token; doubles from there. The first is at once."""
    max_backoff_seconds: float = 8.0
    tick_seconds: float = 0.5
    """How often the progress page is looked at."""
