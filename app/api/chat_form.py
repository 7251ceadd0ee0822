"""The answers of `/v1/chat/completions`: messages, deltas, log-probabilities with bytes.

`top_logprobs` holds the most likely tokens and nothing else, as OpenAI has it: the token that was drawn is
among them only where it is one of them.
"""

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import UNSET

from app.api.answers import (
    LOWEST,
    AnswerHead,
    TokenSpelling,
    event_of,
    failure_events,
    prompt_logprobs_of,
    usage_of,
)
from app.api.chat_prompt import message_text, prepare_chat, render, require_template, sort_variables
from app.api.deps import ServerContext
from app.api.generation import Prepared
from app.api.schemas.chat import (
    AssistantMessage,
    ChatCandidate,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    ChatTokenLogprob,
    check_chat,
)
from app.api.schemas.decode import decode_struct
from app.api.schemas.field_rules import UnknownFields
from app.api.schemas.fields import CHAT
from app.api.sequence_text import Delta, SequenceText
from app.api.sse import DONE
from app.core.types import EngineLimits, TokenLogprobs
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
        request = decode_struct(body, ChatRequest, fields=fields)
        model = context.check_model(request.model)
        check_chat(request)
        variables = sort_variables(request, require_template(context), unknown=unknown)
        rendered = await render(request, fields["messages"], context, variables=variables)
        generation = await prepare_chat(request, rendered, context, limits=limits, tenant=tenant)

        def make_form(head: AnswerHead, texts: Sequence[SequenceText]) -> ChatForm:
            return ChatForm(head, request, texts, tokenizer=context.tokenizer)

        return Prepared(generation, model=model, make_form=make_form, ignored=variables.ignored)


class ChatForm:
    """One answer. Of a stream's chunks, what is the same in all of them is encoded once."""

    def __init__(
        self, head: AnswerHead, request: ChatRequest, texts: Sequence[SequenceText], *, tokenizer: Tokenizer
    ) -> None:
        self._head = head
        self._request = request
        self._texts = texts
        self._tokenizer = tokenizer
        self._spelling = TokenSpelling(tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self._collected: list[list[Delta]] = [[] for _ in texts]
        self._begun = [False for _ in texts]
        options = request.stream_options
        self._ends_with_usage = options is not None and bool(options.include_usage)
        self._with_usage = options is not None and bool(options.continuous_usage_stats)
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
        if delta.finish_reason is None and self._is_plain:
            content = self._encode(delta.text)
            return b'%b%b%d,"delta":{"content":%b%b' % (opening, self._before, index, content, self._after)
        choice = ChatChunkChoice(index=index, delta=ChatDelta(content=delta.text))
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason.value
            choice.stop_reason = delta.stop_reason
            choice.delta = ChatDelta(content=delta.text) if delta.text else ChatDelta()
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

    def _choice(self, index: int, deltas: Sequence[Delta]) -> ChatChoice:
        last = deltas[-1]
        choice = ChatChoice(
            index=index,
            message=AssistantMessage(content="".join([self._echo(), *[delta.text for delta in deltas]])),
            finish_reason="" if last.finish_reason is None else last.finish_reason.value,
            stop_reason=last.stop_reason,
        )
        if self._request.logprobs:
            choice.logprobs = self._logprobs(deltas)
        if self._request.return_token_ids:
            choice.token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        return choice

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
                self._token(token_id, entry)
                for delta in deltas
                for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True)
            ]
        )

    def _token(self, token_id: int, entry: TokenLogprobs) -> ChatTokenLogprob:
        spelling, count = self._spelling, self._request.num_logprobs or 0
        top = [
            ChatCandidate(spelling.text(other), max(logprob, LOWEST), spelling.raw(other))
            for other, logprob in zip(entry.top_token_ids[:count], entry.top_logprobs, strict=False)
        ]
        return ChatTokenLogprob(spelling.text(token_id), max(entry.logprob, LOWEST), spelling.raw(token_id), top)
