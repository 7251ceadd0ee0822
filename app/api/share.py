"""What a key may have of the server: a frozen value that goes with each request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """Whose a request is. The default: nobody's in particular, where there are no keys."""

    tenant: str = ""
    """The key's id; empty without keys."""
    weight: float = 1.0
    """Tokens beside others', while there is not enough for all."""
    max_live: int | None = None
    """Most of its sequences in flight; None: as the server's settings say."""
    best_priority: int | None = None
    """The lowest number that its requests may have as `priority`; None: any."""
