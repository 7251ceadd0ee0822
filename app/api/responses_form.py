"""The answers of `/v1/responses`: a response object, whole or as OpenAI's typed events; and their storing.

Invariants: a stream's events are numbered from 0; what it ends with is what the whole answer would be; a response
is stored, where it is, before the client hears of its end.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from app.api.answers import AnswerHead, TokenSpelling, token_logprob
from app.api.aside import aside
from app.api.chat_prompt import prepare_chat
from app.api.deps import ServerContext
from app.api.errors import error_body
from app.api.generation import Prepared
from app.api.responses_items import OutputItems
from app.api.responses_prompt import ResponsesPrompt, Turns, fields_renamed, render_response
from app.api.responses_store import ResponseStore, StoredResponse, Turn
from app.api.schemas.chat import ChatTokenLogprob
from app.api.schemas.decode import decode_struct, shown
from app.api.schemas.field_rules import UnknownFields
from app.api.schemas.fields import RESPONSES
from app.api.schemas.responses import (
    FunctionTool,
    FunctionToolChoice,
    IncompleteDetails,
    InputTokensDetails,
    NamedFunction,
    OutputTokensDetails,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    ShownReasoning,
    ShownText,
)
from app.api.schemas.responses_events import (
    Event,
    ResponseCompleted,
    ResponseCreated,
    ResponseErrorEvent,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
)
from app.api.schemas.structured import TextFormat
from app.api.sequence_text import Delta, SequenceText
from app.api.tools import ToolText
from app.core.errors import InvalidRequest
from app.core.types import EngineLimits, FinishReason
from app.text.tokenizer import Tokenizer
from app.text.tools import ToolStep

_encode = msgspec.json.Encoder().encode


class ResponsesEndpoint:
    """`POST /v1/responses`."""

    table = RESPONSES

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
        """Check the body, find what it goes on from, render it and turn it into a sequence."""
        request = await aside(len(body), decode_struct, body, ResponsesRequest, fields=fields)
        model = context.check_model(request.model)
        store = context.responses
        previous = _find_previous(request, store, tenant)
        keeps = _is_stored(request, store)
        with fields_renamed():
            prompt = await render_response(
                request,
                [] if previous is None else previous.conversation(),
                context,
                num_tool_bytes=len(bytes(fields.get("tools", b""))),
                unknown=unknown,
            )
            forced = None if prompt.plan is None else prompt.plan.grammar
            generation = await prepare_chat(
                prompt.request, prompt.text, context, limits=limits, tenant=tenant, forced=forced
            )

        def keep(response: ResponseObject, body: bytes) -> None:
            turns = Turns((), model=model, knows_developer=True)
            turn = Turn([*prompt.new_messages, *turns.of_output(response.output)], previous)
            store.add(tenant, response.id, StoredResponse(body, bytes(fields["input"]), turn))

        def make_form(head: AnswerHead, texts: Sequence[SequenceText]) -> ResponsesForm:
            begun = _begun_response(head, request, texts[0], is_stored=keeps)
            return ResponsesForm(begun, prompt, texts[0], tokenizer=context.tokenizer, keep=keep if keeps else None)

        return Prepared(generation, model=model, make_form=make_form, ignored=prompt.ignored)


class ResponsesForm:
    """One answer."""

    def __init__(
        self,
        begun: ResponseObject,
        prompt: ResponsesPrompt,
        text: SequenceText,
        *,
        tokenizer: Tokenizer,
        keep: Callable[[ResponseObject, bytes], None] | None,
    ) -> None:
        """`begun` is the answer without output; `keep` stores it at its end, None where it is not stored."""
        self._begun = begun
        self._sequence = text
        self._keep = keep
        self._tools = None if prompt.plan is None else ToolText(prompt.plan)
        self._items = OutputItems(self._call_id)
        self._num_candidates = prompt.request.num_logprobs
        self._spelling = TokenSpelling(tokenizer, as_ids=False)
        self._waiting: list[ChatTokenLogprob] = []
        """Of tokens whose text is held back."""
        self._num_events = 0
        self._last: Delta | None = None

    def event(self, index: int, delta: Delta) -> bytes:
        """The events of one delta; none where what it brought is held back."""
        return self._encode([*self._beginning(), *self._advance(delta)])

    def end(self) -> bytes:
        """The last event: the whole response."""
        response, _ = self._finish()
        kind = ResponseCompleted if response.status == "completed" else ResponseIncomplete
        return self._encode([kind(response=response)])

    def failure(self, error: Exception) -> bytes:
        """An error, and the response as one that failed."""
        detail = error_body(error).error
        self._items.close("incomplete")
        response = self._response("failed", error=ResponseError(message=detail.message))
        told = ResponseErrorEvent(code=detail.code, message=detail.message, param=detail.param)
        return self._encode([*self._beginning(), told, ResponseFailed(response=response)])

    def collect(self, index: int, delta: Delta) -> None:
        """Keep a delta for `whole`."""
        self._advance(delta)

    def whole(self) -> msgspec.Raw:
        """The response."""
        _, body = self._finish()
        return msgspec.Raw(body)

    def _beginning(self) -> list[Event]:
        if self._num_events:
            return []
        return [ResponseCreated(response=self._begun), ResponseInProgress(response=self._begun)]

    def _advance(self, delta: Delta) -> list[Event]:
        """What the delta adds. What belongs to the open call comes first: text behind it closes it."""
        self._last = delta
        logprobs = self._logprobs(delta)
        step = ToolStep(delta.text, ()) if self._tools is None else self._tools.feed(delta)
        events: list[Event] = []
        if delta.reasoning:
            events += self._items.add_reasoning(delta.reasoning)
        for call in step.calls:
            if call.name is None:
                events += self._items.add_call(call)
        if step.text:
            events += self._items.add_text(step.text, logprobs)
        for call in step.calls:
            if call.name is not None:
                events += self._items.add_call(call)
        if step.text or step.calls or delta.reasoning:
            self._waiting = []
        if delta.finish_reason is not None:
            events += self._items.close("incomplete" if delta.finish_reason is FinishReason.LENGTH else "completed")
        return events

    def _finish(self) -> tuple[ResponseObject, bytes]:
        """The response at its end and its JSON; stored, where it is to be."""
        assert self._last is not None
        is_cut = self._last.finish_reason is FinishReason.LENGTH
        response = self._response(
            "incomplete" if is_cut else "completed",
            completed_at=None if is_cut else int(time.time()),
            incomplete_details=IncompleteDetails() if is_cut else None,
        )
        body = _encode(response)
        if self._keep is not None:
            self._keep(response, body)
        return response, body

    def _response(self, status: str, **fields: object) -> ResponseObject:
        return msgspec.structs.replace(
            self._begun, status=status, output=self._items.items, usage=self._usage(), **fields
        )

    def _usage(self) -> ResponseUsage:
        text = self._sequence
        num_prompt = len(text.prepared.prompt.token_ids)
        return ResponseUsage(
            input_tokens=num_prompt,
            input_tokens_details=InputTokensDetails(cached_tokens=text.num_cached_tokens),
            output_tokens=text.num_output_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=text.num_reasoning_tokens),
            total_tokens=num_prompt + text.num_output_tokens,
        )

    def _call_id(self, call: int) -> str:
        assert self._tools is not None
        return self._tools.id_of(call)

    def _logprobs(self, delta: Delta) -> list[ChatTokenLogprob]:
        """Of this delta's tokens and of those whose text was held back before it."""
        count = self._num_candidates
        if count is not None:
            self._waiting += [
                token_logprob(token_id, entry, spelling=self._spelling, count=count)
                for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True)
            ]
        return self._waiting

    def _encode(self, events: Iterable[Event]) -> bytes:
        parts: list[bytes] = []
        for event in events:
            event.sequence_number = self._num_events
            self._num_events += 1
            parts.append(_framed(event))
        return b"".join(parts)


def _framed(event: Event) -> bytes:
    """One server-sent event, named by its type."""
    name = type(event).__struct_config__.tag
    return b"event: %b\ndata: %b\n\n" % (str(name).encode(), _encode(event))


def _find_previous(request: ResponsesRequest, store: ResponseStore, tenant: str) -> Turn | None:
    if request.previous_response_id is None:
        return None
    found = store.find(tenant, request.previous_response_id)
    if found is None:
        raise InvalidRequest(
            f"Previous response with id `{shown(request.previous_response_id)}` not found: it was not stored, was "
            "deleted, made room for others, or is from before the server's start. Send the conversation in `input`.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return found.turn


def _is_stored(request: ResponsesRequest, store: ResponseStore) -> bool:
    """As asked for; by default where the server stores at all."""
    if request.store and not store.is_on:
        raise InvalidRequest(
            "`store` is true, and this server stores no responses: leave it out, or have the server started with "
            "--max-stored-responses.",
            param="store",
        )
    return store.is_on and request.store is not False


def _begun_response(
    head: AnswerHead, request: ResponsesRequest, text: SequenceText, *, is_stored: bool
) -> ResponseObject:
    """The response before its first output."""
    params = text.prepared.engine_request.params
    choice = request.tool_choice
    tools = [
        FunctionTool(name=tool.name or "", description=tool.description, parameters=tool.parameters, strict=tool.strict)
        for tool in request.tools or ()
    ]
    form = None if request.text is None else request.text.format
    return ResponseObject(
        # Its own and not the request's id, which clients may choose: whoever knows it may read the response.
        id=f"resp_{secrets.token_hex(24)}",
        created_at=head.created,
        status="in_progress",
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata={} if request.metadata is None else request.metadata,
        model=head.model,
        output=[],
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        reasoning=ShownReasoning(effort=None if request.reasoning is None else request.reasoning.effort),
        store=is_stored,
        temperature=params.temperature,
        text=ShownText(format=TextFormat() if form is None else form),
        tool_choice=FunctionToolChoice(name=choice.name or "")
        if isinstance(choice, NamedFunction)
        else choice or "auto",
        tools=tools,
        top_logprobs=request.top_logprobs or 0,
        top_p=params.top_p,
        seed=head.seed,
        system_fingerprint=head.fingerprint,
    )
