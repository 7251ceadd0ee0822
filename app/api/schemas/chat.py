"""`POST /v1/chat/completions`: the body's typed form and the objects of its answers.

Messages are typed for what the server reads of them. The template gets them as the client sent them, so
that fields which only a template knows, and tool calls of any shape, reach it.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.api.schemas.generation import (
    GenerationRequest,
    LogprobCount,
    PromptLogprobs,
    TokenCount,
    Usage,
    check_generation,
)
from app.api.schemas.limits import INT32, MAX_LABEL_CHARS, MAX_TEMPLATE_KWARGS
from app.api.schemas.tools import ToolCall, ToolCallDelta, ToolChoice, Tools
from app.core.errors import InvalidRequest

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
TemplateValue = str | bool | int | float | None
TemplateKwargs = Annotated[dict[str, TemplateValue], Meta(max_length=MAX_TEMPLATE_KWARGS)]
OutputTokenCount = Annotated[int, Meta(ge=1, lt=INT32)]


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message. `text`, `input_text`, `output_text` and `refusal` are text; others are refused."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the conversation. Further fields are passed on to the chat template."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    """Of an assistant's message; passed on to the template whatever it holds."""
    tool_call_id: str | None = None
    """Of a tool's message."""


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """Honoured fields of a chat request."""

    messages: Messages
    max_tokens: OutputTokenCount | None = None
    max_completion_tokens: OutputTokenCount | None = None
    min_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: Annotated[str, Meta(max_length=MAX_LABEL_CHARS)] | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def output_limit(self) -> int | None:
        """`max_completion_tokens` over `max_tokens`; None: whatever the context leaves."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def output_limit_field(self) -> str:
        """The field that `output_limit` came from."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """`top_logprobs` where `logprobs` is true."""
        if not self.logprobs:
            return None
        return 0 if self.top_logprobs is None else self.top_logprobs


class ChatCandidate(msgspec.Struct, frozen=True):
    """One token that could have stood at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """One token of the answer, and the most likely ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatCandidate]


class ChatLogprobs(msgspec.Struct):
    """OpenAI's log-probabilities of a message."""

    content: list[ChatTokenLogprob] = []
    refusal: None = None


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The message that the model wrote."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """None where there is nothing but calls."""
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    """What the model thought before it answered, under both names that clients read; where it did."""
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One sequence's whole answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatResponse(msgspec.Struct, kw_only=True):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    seed: int
    """The seed that repeats this answer; an extension of Headwater."""
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """What a chunk adds to one sequence's answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    """In the last chunk."""
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    system_fingerprint: str
    prompt_token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    """In the first chunk, where token ids are asked for."""
    seed: int | msgspec.UnsetType = msgspec.UNSET
    """In the last chunk, with usage: the seed that repeats this answer; an extension of Headwater."""


def check_chat(request: ChatRequest) -> None:
    """Checks that need several fields and no model. Raises InvalidRequest naming the field to change."""
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    check_continuation(
        continue_final_message=request.continue_final_message, add_generation_prompt=request.add_generation_prompt
    )
    check_generation(request)


def check_continuation(*, continue_final_message: bool | None, add_generation_prompt: bool | None) -> None:
    """A final message is gone on with, or a new one begun. Raises InvalidRequest."""
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt` exclude each other: set one of them.",
            param="continue_final_message",
        )
