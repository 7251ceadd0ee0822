"""The answers of `/v1/chat/completions`: messages, deltas, log-probabilities with bytes.

`top_logprobs` holds the most likely tokens and nothing else, as OpenAI has it: the token that was drawn is
among them only where it is one of them.
"""

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from app.api.answers import (
    AnswerHead,
    TokenSpelling,
    event_of,
    failure_events,
    prompt_logprobs_of,
    token_logprob,
    usage_of,
)
from app.api.aside import aside
from app.api.chat_prompt import message_text, prepare_chat, render, require_template, sort_variables
from app.api.deps import ServerContext
from app.api.generation import Prepared
from app.api.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    check_chat,
)
from app.api.schemas.decode import decode_struct
from app.api.schemas.field_rules import UnknownFields
from app.api.schemas.fields import CHAT
from app.api.schemas.tools import CalledFunction, CalledFunctionDelta, ToolCall, ToolCallDelta
from app.api.sequence_text import Delta, SequenceText
from app.api.sse import DONE
from app.api.tools import ToolPlan, ToolText, plan_tools
from app.core.types import EngineLimits, FinishReason
from app.text.tokenizer import Tokenizer


class ChatEndpoint:
    """`POST /v1/chat/completions`."""

    table = CHAT

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
        """Check the body, render the messages and turn them into sequences."""
        request = await aside(len(body), decode_struct, body, ChatRequest, fields=fields)
        model = context.check_model(request.model)
        check_chat(request)
        template = require_template(context)
        variables = sort_variables(request, template, unknown=unknown)
        raw_tools = fields.get("tools")
        num_tool_bytes = 0 if raw_tools is None else len(bytes(raw_tools))
        plan = await aside(num_tool_bytes, plan_tools, request, template, num_bytes=num_tool_bytes)
        rendered = await render(
            request,
            fields["messages"],
            context,
            variables=variables,
            raw_tools=raw_tools if plan is not None else None,
        )
        forced = None if plan is None else plan.grammar
        continued = message_text(request.messages[-1]) if request.continue_final_message else ""
        generation = await prepare_chat(
            request, rendered, context, limits=limits, tenant=tenant, forced=forced, continued=continued
        )

        def make_form(head: AnswerHead, texts: Sequence[SequenceText]) -> ChatForm:
            return ChatForm(head, request, texts, tokenizer=context.tokenizer, plan=plan)

        return Prepared(generation, model=model, make_form=make_form, ignored=variables.ignored)


class ChatForm:
    """One answer. Of a stream's chunks, what is the same in all of them is encoded once."""

    def __init__(
        self,
        head: AnswerHead,
        request: ChatRequest,
        texts: Sequence[SequenceText],
        *,
        tokenizer: Tokenizer,
        plan: ToolPlan | None = None,
    ) -> None:
        """`plan`: how tools are served; None where none may be called."""
        self._head = head
        self._request = request
        self._texts = texts
        self._splits = texts[0].splits_reasoning
        self._tokenizer = tokenizer
        self._spelling = TokenSpelling(tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self._collected: list[list[Delta]] = [[] for _ in texts]
        self._begun = [False for _ in texts]
        options = request.stream_options
        self._ends_with_usage = options is not None and bool(options.include_usage)
        self._with_usage = options is not None and bool(options.continuous_usage_stats)
        self._tools = None if plan is None else [ToolText(plan, id_key=self._id_key(text)) for text in texts]
        """Of each sequence."""
        self._shows_reasoning = request.include_reasoning is not False
        self._is_plain = not (request.logprobs or request.return_token_ids or self._with_usage)
        self._chunk = ChatChunk(
            id=f"chatcmpl-{head.request_id}",
            created=head.created,
            model=head.model,
            choices=[],
            system_fingerprint=head.fingerprint,
        )
        # The plain chunk is put together from bytes around its text: most chunks of most streams are plain.
        mark = "\x00"
        choice = ChatChunkChoice(index=0, delta=ChatDelta(content=mark))
        before, self._after = event_of(msgspec.structs.replace(self._chunk, choices=[choice])).split(
            msgspec.json.encode(mark)
        )
        self._before = before.removesuffix(b'0,"delta":{"content":')
        self._encode = msgspec.json.Encoder().encode

    def event(self, index: int, delta: Delta) -> bytes:
        """One delta as a chunk; before a sequence's first, a chunk with the role."""
        opening = b""
        if not self._begun[index]:
            self._begun[index] = True
            opening = self._opening(index)
        is_text = self._tools is None and not delta.reasoning
        if delta.finish_reason is None and self._is_plain and is_text and (delta.text or not self._splits):
            content = self._encode(delta.text)
            return b'%b%b%d,"delta":{"content":%b%b' % (opening, self._before, index, content, self._after)
        choice = ChatChunkChoice(index=index, delta=self._delta(index, delta))
        if choice.delta == ChatDelta() and self._is_plain and delta.finish_reason is None:
            return opening  # text that may become a call, or a tag, is held back
        if delta.finish_reason is not None:
            choice.finish_reason = self._finish_reason(index, delta)
            choice.stop_reason = delta.stop_reason
        if self._request.logprobs:
            choice.logprobs = self._logprobs([delta])
        if self._request.return_token_ids:
            choice.token_ids = list(delta.token_ids)
        return opening + self._event(choice)

    def end(self) -> bytes:
        """Usage and seed, where asked for, and [DONE]."""
        if not self._ends_with_usage:
            return DONE
        usage = usage_of(self._texts)
        return event_of(msgspec.structs.replace(self._chunk, usage=usage, seed=self._head.seed)) + DONE

    def failure(self, error: Exception) -> bytes:
        """The error, and [DONE]."""
        return failure_events(error)

    def collect(self, index: int, delta: Delta) -> None:
        """Keep a delta for `whole`."""
        self._collected[index].append(delta)

    def whole(self) -> ChatResponse:
        """All choices, joined."""
        request, prompt = self._request, self._texts[0].prepared.prompt
        answer = ChatResponse(
            id=self._chunk.id,
            created=self._head.created,
            model=self._head.model,
            choices=[self._choice(index, deltas) for index, deltas in enumerate(self._collected)],
            usage=usage_of(self._texts),
            system_fingerprint=self._head.fingerprint,
            seed=self._head.seed,
        )
        if request.prompt_logprobs is not None:
            entries = self._texts[0].prompt_logprobs
            answer.prompt_logprobs = prompt_logprobs_of(
                prompt.token_ids, entries, request.prompt_logprobs, tokenizer=self._tokenizer
            )
        if request.return_token_ids:
            answer.prompt_token_ids = prompt.token_ids
        return answer

    def _id_key(self, text: SequenceText) -> str | None:
        head = self._head
        return f"{head.request_id}/{head.created}/{text.prepared.index}" if self._request.is_resumable else None

    def _choice(self, index: int, deltas: Sequence[Delta]) -> ChatChoice:
        message = self._message(index, deltas)
        choice = ChatChoice(
            index=index,
            message=message,
            finish_reason=self._finish_reason(index, deltas[-1]),
            stop_reason=deltas[-1].stop_reason,
        )
        if self._request.logprobs:
            choice.logprobs = self._logprobs(deltas)
        if self._request.return_token_ids:
            choice.token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        return choice

    def _message(self, index: int, deltas: Sequence[Delta]) -> AssistantMessage:
        thought = self._shown_reasoning("".join([delta.reasoning for delta in deltas]))
        if self._tools is None:
            content = "".join([self._echo(), *[delta.text for delta in deltas]])
            return AssistantMessage(content=content, reasoning_content=thought, reasoning=thought)
        text, calls = self._tools[index].whole(deltas)
        content = self._echo() + text
        written = [
            ToolCall(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments)) for call in calls
        ]
        return AssistantMessage(
            content=content or None if calls else content,
            reasoning_content=thought,
            reasoning=thought,
            tool_calls=written or UNSET,
        )

    def _shown_reasoning(self, text: str) -> str | UnsetType:
        return text if text and self._shows_reasoning else UNSET

    def _delta(self, index: int, delta: Delta) -> ChatDelta:
        thought = self._shown_reasoning(delta.reasoning)
        if self._tools is None:
            is_silent = not delta.text and (delta.finish_reason is not None or self._splits)
            content = UNSET if is_silent else delta.text
            return ChatDelta(content=content, reasoning_content=thought, reasoning=thought)
        tools = self._tools[index]
        step = tools.feed(delta)
        calls = [
            ToolCallDelta(
                index=one.call,
                id=UNSET if one.name is None else tools.id_of(one.call),
                type=UNSET if one.name is None else "function",
                function=CalledFunctionDelta(name=UNSET if one.name is None else one.name, arguments=one.arguments),
            )
            for one in step.calls
        ]
        return ChatDelta(
            content=step.text or UNSET, reasoning_content=thought, reasoning=thought, tool_calls=calls or UNSET
        )

    def _finish_reason(self, index: int, last: Delta) -> str:
        if last.finish_reason is None:
            return ""
        has_calls = self._tools is not None and self._tools[index].has_calls
        return "tool_calls" if has_calls and last.finish_reason is FinishReason.STOP else last.finish_reason.value

    def _opening(self, index: int) -> bytes:
        """The chunk with the role; the echo, if any, is its content."""
        choice = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=self._echo()))
        ids = self._texts[index].prepared.prompt.token_ids if self._request.return_token_ids else UNSET
        return self._event(choice, prompt_token_ids=ids)

    def _event(self, choice: ChatChunkChoice, **fields: object) -> bytes:
        chunk = msgspec.structs.replace(self._chunk, choices=[choice], **fields)
        if self._with_usage:
            chunk.usage = usage_of([self._texts[choice.index]])
        return event_of(chunk)

    def _echo(self) -> str:
        final = self._request.messages[-1]
        return message_text(final) if self._request.echo and final.role == "assistant" else ""

    def _logprobs(self, deltas: Sequence[Delta]) -> ChatLogprobs:
        return ChatLogprobs(
            [
                token_logprob(token_id, entry, spelling=self._spelling, count=self._request.num_logprobs or 0)
                for delta in deltas
                for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True)
            ]
        )
