"""`GET /v1/responses/{id}/input_items`: what a stored response was asked with, in OpenAI's form."""

from typing import Literal

import msgspec

from app.api.schemas.responses import FunctionCall, OutputText, ReasoningPart

MAX_LISTED = 100
"""Items of one page, as OpenAI has it."""


class GivenText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input_text"):
    """Text that was sent."""

    text: str


class GivenRefusal(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    """A refusal that was sent as a part of an earlier answer."""

    refusal: str


class GivenSummary(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="summary_text"):
    """A summary of reasoning that was sent."""

    text: str


class GivenMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """A message that was sent. Parts of the assistant's are what it wrote, those of others input_text."""

    id: str
    role: Literal["user", "assistant", "system", "developer"]
    content: list[GivenText | OutputText | GivenRefusal]
    status: Literal["completed"] = "completed"


class GivenReasoning(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """Reasoning that was sent."""

    id: str
    summary: list[GivenSummary]
    content: list[ReasoningPart]
    status: Literal["completed"] = "completed"


class GivenOutput(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call_output"):
    """The result of a call."""

    id: str
    call_id: str
    output: str | list[GivenText]
    status: Literal["completed"] = "completed"


GivenItem = GivenMessage | FunctionCall | GivenOutput | GivenReasoning


class InputItemList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of items."""

    object: Literal["list"] = "list"
    data: list[GivenItem]
    first_id: str | None
    last_id: str | None
    """Null where the page is empty."""
    has_more: bool
