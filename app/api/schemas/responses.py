"""`POST /v1/responses`: the body's typed form, and the response object with its items.

Items and tools are typed for what the server reads of them; kinds that it does not serve are refused by name in
`app.api.responses_prompt`. A response object has every field that OpenAI's has and this server can fill.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.api.schemas.chat import ChatTokenLogprob, OutputTokenCount, TemplateKwargs
from app.api.schemas.generation import Bias, LogprobCount, Penalty, StopString
from app.api.schemas.limits import (
    INT32,
    INT64,
    MAX_LABEL_CHARS,
    MAX_LOGIT_BIAS,
    MAX_METADATA,
    MAX_METADATA_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOOLS,
)
from app.api.schemas.structured import JsonObjectFormat, JsonSchema, TextFormat
from app.api.schemas.tools import FunctionName

Metadata = Annotated[dict[str, Annotated[str, Meta(max_length=MAX_METADATA_CHARS)]], Meta(max_length=MAX_METADATA)]
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""OpenAI's list. Only the first has an effect: of the others nothing is ever there to be included."""
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of an item. `input_text`, `output_text`, `reasoning_text`, `summary_text` and `refusal` are text."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """A message, a function_call, a function_call_output or a reasoning item. Others are refused."""

    type: str | None = None
    """None is a message."""
    role: Literal["user", "assistant", "system", "developer"] | None = None
    """Of a message."""
    content: str | list[InputPart] | None = None
    """Of a message or a reasoning item."""
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    """These three of a function_call; the first of its output, too."""
    output: str | list[InputPart] | None = None
    """Of a function_call_output."""
    summary: list[InputPart] | None = None
    """Of a reasoning item."""


class ResponseTool(msgspec.Struct, frozen=True, kw_only=True):
    """A function of the client's own. Tools that OpenAI runs itself are refused."""

    type: str
    name: FunctionName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON Schema of an object."""
    strict: bool | None = None
    """Accepted either way: forced calls are always held to the schema."""


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    """This function, and no other."""

    type: str
    name: str | None = None


class FlatSchemaFormat(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True
):
    """JSON that validates against a schema."""

    schema: JsonSchema
    name: str
    description: str | None = None
    strict: bool | None = None
    """Accepted either way: the output is always held to the schema."""


class TextConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form of the text."""

    format: TextFormat | JsonObjectFormat | FlatSchemaFormat | None = None
    verbosity: Literal["medium"] | None = None
    """The model has no such dial."""


class ReasoningConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the model reasons."""

    effort: Annotated[str, Meta(max_length=MAX_LABEL_CHARS)] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """No summary is written; the reasoning itself is in its item."""


class ResponseStreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a stream."""

    include_obfuscation: bool | None = None
    """False: events are not padded. True is refused."""


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Honoured fields of a request for a response."""

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Meta(max_length=MAX_LABEL_CHARS)] | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    max_output_tokens: OutputTokenCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=INT32)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    include: list[Includable] | None = None
    top_logprobs: LogprobCount | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_LABEL_CHARS)] | None = None
    priority: Annotated[int, Meta(ge=-INT32, lt=INT32)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are shown."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    """Text that the model wrote."""

    text: str
    annotations: list[None] = []
    logprobs: list[ChatTokenLogprob] = []


class ReasoningPart(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    """What the model thought before it answered."""

    text: str


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """A message that the model wrote."""

    id: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]
    status: ItemStatus


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """The reasoning before an answer."""

    id: str
    summary: list[None] = []
    content: list[ReasoningPart]
    status: ItemStatus


class FunctionCall(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call that the model made."""

    id: str
    call_id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it: not always valid, unless the call was forced."""
    status: ItemStatus


OutputItem = OutputMessage | ReasoningItem | FunctionCall


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What of the prompt was not computed anew."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What of the output is not the answer."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why an answer is cut: it reached `max_output_tokens` or the end of the context."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a response failed."""

    code: Literal["server_error"] = "server_error"
    message: str


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of the request, in the answer."""

    type: Literal["function"] = "function"
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class FunctionToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The choice of one function, in the answer."""

    type: Literal["function"] = "function"
    name: str


class ShownReasoning(msgspec.Struct, frozen=True, kw_only=True):
    """`reasoning` in the answer."""

    effort: str | None = None
    summary: None = None


class ShownText(msgspec.Struct, frozen=True, kw_only=True):
    """`text` in the answer."""

    format: TextFormat | JsonObjectFormat | FlatSchemaFormat
    verbosity: Literal["medium"] = "medium"


class ResponseObject(msgspec.Struct, kw_only=True):
    """The whole answer; in a stream's first events without output."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ShownReasoning
    service_tier: Literal["default"] = "default"
    store: bool
    """Whether it can be read, and gone on with, by its id."""
    temperature: float
    text: ShownText
    tool_choice: Literal["none", "auto", "required"] | FunctionToolChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    seed: int
    """The seed that repeats this answer; an extension of Headwater."""
    system_fingerprint: str


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response is not stored any more."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
