"""Tools: what a request says of functions that the model may call, and the calls in answers."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.api.schemas.limits import MAX_TOOLS

FunctionName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}\Z")]
"""Not `$`, which a newline may follow."""


class FunctionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A function. Further fields are passed on to the chat template."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON Schema of an object; none: no arguments are known."""
    strict: bool | None = None
    """Accepted either way: forced calls are always held to the schema."""


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the model may call."""

    type: Literal["function"]
    function: FunctionSpec


class FunctionChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The name of a function."""

    name: str


class NamedToolChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """This function, and no other."""

    type: Literal["function"]
    function: FunctionChoice


Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """What is called, and with what."""

    name: str
    arguments: str
    """JSON text, as the model wrote it: not always valid, unless the call was forced."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call in a whole answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CalledFunctionDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to a call."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """One call in a chunk; its id, type and name come with its first."""

    index: int
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET
    function: CalledFunctionDelta
