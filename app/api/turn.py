"""One turn of a conversation in the making, for the protocols that split a turn into blocks or items."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Turn:
    """What one side says in a row."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[object] = field(default_factory=list)

    def message(self, role: str) -> dict[str, object]:
        """As chat templates read it."""
        message: dict[str, object] = {"role": role, "content": "\n".join(self.texts)}
        if self.thoughts:
            message["reasoning_content"] = "\n".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        return message
