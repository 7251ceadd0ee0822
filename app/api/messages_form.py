"""The answers of `/v1/messages`: blocks of text and of tool use, whole or as Anthropic's events.

Invariants: a stream's blocks are numbered from 0, one is open at a time, and each is closed; the joined
deltas are the blocks of the whole answer, where no text stands behind a call.
"""

from collections.abc import Mapping, Sequence

import msgspec

from app.api.answers import AnswerHead
from app.api.aside import aside
from app.api.chat_prompt import prepare_chat
from app.api.deps import ServerContext
from app.api.errors import messages_error_body
from app.api.generation import Prepared
from app.api.messages_prompt import render_conversation
from app.api.schemas.decode import decode_struct
from app.api.schemas.field_rules import UnknownFields
from app.api.schemas.fields import MESSAGES
from app.api.schemas.messages import (
    AnswerBlock,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    MessageDelta,
    MessagesRequest,
    MessagesResponse,
    MessageStart,
    MessageStop,
    MessagesUsage,
    Ping,
    StopDelta,
    StopReason,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from app.api.sequence_text import Delta, SequenceText
from app.api.tools import ToolPlan, ToolText, WrittenCall
from app.core.types import EngineLimits, FinishReason
from app.text.tools import CallForm, ToolStep, call_frame

_ID_PREFIX = "toolu_"


class MessagesEndpoint:
    """`POST /v1/messages`."""

    table = MESSAGES

    async def prepare(
        self,
        body: bytes,
        fields: Mapping[str, msgspec.Raw],
        context: ServerContext,
        *,
        limits: EngineLimits,
        tenant: str,
        unknown: UnknownFields,
    ) -> Prepared:
        """Check the body, render the messages and turn them into a sequence."""
        request = await aside(len(body), decode_struct, body, MessagesRequest, fields=fields)
        model = context.check_model(request.model)
        prompt = await render_conversation(request, context, num_tool_bytes=len(bytes(fields.get("tools", b""))))
        plan = prompt.plan
        forced = None if plan is None else plan.grammar
        generation = await prepare_chat(
            prompt.request,
            prompt.text,
            context,
            limits=limits,
            tenant=tenant,
            forced=forced,
            continued=prompt.continued,
        )

        def make_form(head: AnswerHead, texts: Sequence[SequenceText]) -> MessagesForm:
            return MessagesForm(head, request, texts[0], plan=plan)

        return Prepared(generation, model=model, make_form=make_form, ignored=prompt.ignored)


class MessagesForm:
    """One answer."""

    def __init__(
        self, head: AnswerHead, request: MessagesRequest, text: SequenceText, *, plan: ToolPlan | None
    ) -> None:
        """`plan`: how tools are served; None where none may be called."""
        self._head = head
        self._request = request
        self._sequence = text
        self._tools = None if plan is None else ToolText(plan, id_prefix=_ID_PREFIX)
        self._shows_thinking = request.thinking is None or request.thinking.type != "disabled"
        self._collected: list[Delta] = []
        self._is_begun = False
        self._num_blocks = 0
        self._open: type[AnswerBlock] | None = None
        """What kind of block the last one is, while it is open."""

    def event(self, index: int, delta: Delta) -> bytes:
        """The events of one delta; none where what it brought is held back."""
        events: list[msgspec.Struct] = []
        if not self._is_begun:
            self._is_begun = True
            events += (MessageStart(self._message([], None, None)), Ping())
        self._add_thinking(events, delta.reasoning)
        self._add_blocks(events, ToolStep(delta.text, ()) if self._tools is None else self._tools.feed(delta))
        if delta.finish_reason is not None:
            self._close(events)
            reason, sequence = self._stop(delta, has_calls=self._tools is not None and self._tools.has_calls)
            events.append(MessageDelta(StopDelta(stop_reason=reason, stop_sequence=sequence), self._usage()))
        return b"".join(map(_event_of, events))

    def end(self) -> bytes:
        """The last event."""
        return _event_of(MessageStop())

    def failure(self, error: Exception) -> bytes:
        """The error as an event; nothing follows it."""
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(messages_error_body(error, self._head.request_id))

    def collect(self, index: int, delta: Delta) -> None:
        """Keep a delta for `whole`."""
        self._collected.append(delta)

    def whole(self) -> MessagesResponse:
        """The message."""
        deltas = self._collected
        content: list[AnswerBlock] = []
        if self._tools is None:
            text = "".join([delta.text for delta in deltas])
        else:
            text, calls = self._tools.whole(deltas)
            content += map(_block_of, calls)
        if text:
            content.insert(0, TextBlock(text))
        thought = "".join([delta.reasoning for delta in deltas])
        if thought and self._shows_thinking:
            content.insert(0, ThinkingBlock(thinking=thought))
        has_calls = any(isinstance(block, ToolUseBlock) for block in content)
        return self._message(content, *self._stop(deltas[-1], has_calls=has_calls))

    def _message(self, content: list[AnswerBlock], reason: StopReason | None, sequence: str | None) -> MessagesResponse:
        return MessagesResponse(
            id=f"msg_{self._head.request_id}",
            model=self._head.model,
            content=content,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(),
        )

    def _usage(self) -> MessagesUsage:
        text = self._sequence
        num_prompt = len(text.prepared.prompt.token_ids)
        return MessagesUsage(
            input_tokens=num_prompt - text.num_cached_tokens,
            cache_read_input_tokens=text.num_cached_tokens,
            output_tokens=text.num_output_tokens,
        )

    def _stop(self, last: Delta, *, has_calls: bool) -> tuple[StopReason, str | None]:
        if last.finish_reason is FinishReason.LENGTH:
            allowed = self._sequence.prepared.engine_request.params.max_tokens
            return ("model_context_window_exceeded" if allowed < self._request.max_tokens else "max_tokens"), None
        if has_calls:
            return "tool_use", None
        if isinstance(last.stop_reason, str):
            return "stop_sequence", last.stop_reason
        return "end_turn", None

    def _add_thinking(self, events: list[msgspec.Struct], text: str) -> None:
        if text and self._shows_thinking:
            if self._open is not ThinkingBlock:
                self._begin(events, ThinkingBlock(thinking=""))
            events.append(self._delta(ThinkingDelta(text)))

    def _add_blocks(self, events: list[msgspec.Struct], step: ToolStep) -> None:
        """What belongs to the open call comes first: text behind it closes it."""
        for call in step.calls:
            if call.name is None and call.arguments:
                events.append(self._delta(InputJsonDelta(call.arguments)))
        if step.text:
            if self._open is not TextBlock:
                self._begin(events, TextBlock(""))
            events.append(self._delta(TextDelta(step.text)))
        for call in step.calls:
            if call.name is not None:
                assert self._tools is not None
                self._begin(events, ToolUseBlock(self._tools.id_of(call.call), call.name, {}))
                events.append(self._delta(InputJsonDelta(call.arguments)))

    def _begin(self, events: list[msgspec.Struct], block: AnswerBlock) -> None:
        self._close(events)
        events.append(ContentBlockStart(self._num_blocks, block))
        self._num_blocks += 1
        self._open = type(block)

    def _close(self, events: list[msgspec.Struct]) -> None:
        if self._open is not None:
            self._open = None
            events.append(ContentBlockStop(self._num_blocks - 1))

    def _delta(self, delta: TextDelta | ThinkingDelta | InputJsonDelta) -> ContentBlockDelta:
        return ContentBlockDelta(self._num_blocks - 1, delta)


def _block_of(call: WrittenCall) -> TextBlock | ToolUseBlock:
    """The call; as text where its arguments are no object, or cut: a tool must not run on half of them."""
    try:
        return ToolUseBlock(call.id, call.name, msgspec.json.decode(call.arguments, type=dict[str, object]))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return TextBlock(call_frame(CallForm.TAGGED, call.name).before + call.arguments)


def _event_of(body: msgspec.Struct) -> bytes:
    """One server-sent event, named by its type."""
    name = type(body).__struct_config__.tag
    return b"event: %b\ndata: %b\n\n" % (str(name).encode(), msgspec.json.encode(body))
