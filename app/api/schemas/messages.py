"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's bodies, answers, events and errors.

Blocks are typed for what the server reads of them; what else they hold, `cache_control` above all, has no
effect on an answer.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.api.schemas.generation import StopString
from app.api.schemas.limits import INT32, MAX_STOP_STRINGS, MAX_TOOLS
from app.api.schemas.tools import FunctionName


class ContentBlock(msgspec.Struct, frozen=True, kw_only=True):
    """One block of a message: text, tool_use, tool_result or thinking. Others are refused."""

    type: str
    text: str | None = None
    """Of a text block."""
    id: str | None = None
    name: str | None = None
    input: Any = None
    """These three of a tool_use block."""
    tool_use_id: str | None = None
    content: "str | list[ContentBlock] | None" = None
    """These two of a tool_result block."""
    thinking: str | None = None
    """Of a thinking block."""


class MessageParam(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class MessagesTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of the client's own. Those that Anthropic runs itself are refused."""

    name: FunctionName
    type: Literal["custom"] | None = None
    description: str | None = None
    input_schema: dict[str, Any]
    """A JSON Schema of an object."""


class MessagesToolChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """Of the tool, with type tool."""
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    """No effect: `max_tokens` bounds all."""


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a prompt."""

    model: str | None = None
    messages: Annotated[list[MessageParam], Meta(min_length=1)]
    system: str | list[ContentBlock] | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingConfig | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Honoured fields of a request for a message."""

    max_tokens: Annotated[int, Meta(ge=1, lt=INT32)]
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=INT32)] | None = None
    stream: bool | None = None


class TextBlock(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Text that the model wrote."""

    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thought before it answered."""

    thinking: str
    signature: str = ""
    """Nothing is signed."""


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    """A call that the model made."""

    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessagesUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. `input_tokens` are those that no cache had."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessagesResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer; in a stream's first event without content."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessageStart(msgspec.Struct, frozen=True, tag_field="type", tag="message_start"):
    """The first event."""

    message: MessagesResponse


class Ping(msgspec.Struct, frozen=True, tag_field="type", tag="ping"):
    """Nothing happened."""


class ContentBlockStart(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_start"):
    """A block begins, empty."""

    index: int
    content_block: AnswerBlock


class TextDelta(msgspec.Struct, frozen=True, tag_field="type", tag="text_delta"):
    """More of a text block."""

    text: str


class ThinkingDelta(msgspec.Struct, frozen=True, tag_field="type", tag="thinking_delta"):
    """More of a thinking block."""

    thinking: str


class InputJsonDelta(msgspec.Struct, frozen=True, tag_field="type", tag="input_json_delta"):
    """More of the JSON text of a call's input."""

    partial_json: str


class ContentBlockDelta(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_delta"):
    """More of a block."""

    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class ContentBlockStop(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_stop"):
    """A block ends."""

    index: int


class StopDelta(msgspec.Struct, frozen=True, kw_only=True):
    """Why the message ends."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag_field="type", tag="message_delta"):
    """The message ends."""

    delta: StopDelta
    usage: MessagesUsage


class MessageStop(msgspec.Struct, frozen=True, tag_field="type", tag="message_stop"):
    """The last event."""


class CountTokensResponse(msgspec.Struct, frozen=True, kw_only=True):
    """How long the prompt is."""

    input_tokens: int
