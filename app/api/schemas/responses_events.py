"""The events of a stream of `/v1/responses`, each named by its type and numbered from 0."""

import msgspec

from app.api.schemas.chat import ChatTokenLogprob
from app.api.schemas.responses import OutputItem, OutputText, ReasoningPart, ResponseObject


class _Event(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int = 0


class ResponseCreated(_Event, kw_only=True, tag="response.created"):
    """The first event."""

    response: ResponseObject


class ResponseInProgress(_Event, kw_only=True, tag="response.in_progress"):
    """The second."""

    response: ResponseObject


class OutputItemAdded(_Event, kw_only=True, tag="response.output_item.added"):
    """An item begins, empty."""

    output_index: int
    item: OutputItem


class ContentPartAdded(_Event, kw_only=True, tag="response.content_part.added"):
    """The part of a message or of reasoning begins, empty."""

    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningPart


class OutputTextDelta(_Event, kw_only=True, tag="response.output_text.delta"):
    """More text."""

    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    logprobs: list[ChatTokenLogprob] = []


class OutputTextDone(_Event, kw_only=True, tag="response.output_text.done"):
    """All of a message's text."""

    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    logprobs: list[ChatTokenLogprob] = []


class ReasoningTextDelta(_Event, kw_only=True, tag="response.reasoning_text.delta"):
    """More reasoning."""

    item_id: str
    output_index: int
    content_index: int = 0
    delta: str


class ReasoningTextDone(_Event, kw_only=True, tag="response.reasoning_text.done"):
    """All of an item's reasoning."""

    item_id: str
    output_index: int
    content_index: int = 0
    text: str


class ContentPartDone(_Event, kw_only=True, tag="response.content_part.done"):
    """The part is whole."""

    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningPart


class CallArgumentsDelta(_Event, kw_only=True, tag="response.function_call_arguments.delta"):
    """More of the JSON text of a call's arguments."""

    item_id: str
    output_index: int
    delta: str


class CallArgumentsDone(_Event, kw_only=True, tag="response.function_call_arguments.done"):
    """All of a call's arguments."""

    item_id: str
    output_index: int
    name: str
    arguments: str


class OutputItemDone(_Event, kw_only=True, tag="response.output_item.done"):
    """An item is whole."""

    output_index: int
    item: OutputItem


class ResponseCompleted(_Event, kw_only=True, tag="response.completed"):
    """The last event of an answer that ended by itself."""

    response: ResponseObject


class ResponseIncomplete(_Event, kw_only=True, tag="response.incomplete"):
    """The last event of an answer that was cut."""

    response: ResponseObject


class ResponseErrorEvent(_Event, kw_only=True, tag="error"):
    """Something failed; response.failed follows."""

    code: str | None
    message: str
    param: str | None


class ResponseFailed(_Event, kw_only=True, tag="response.failed"):
    """The last event of an answer that failed."""

    response: ResponseObject


Event = (
    ResponseCreated
    | ResponseInProgress
    | OutputItemAdded
    | ContentPartAdded
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ContentPartDone
    | CallArgumentsDelta
    | CallArgumentsDone
    | OutputItemDone
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseErrorEvent
    | ResponseFailed
)
