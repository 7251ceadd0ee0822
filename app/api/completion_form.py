"""The answers of `/v1/completions`: choices with text, log-probabilities, echo and token ids.

Log-probabilities follow vLLM: `top_logprobs` holds the token itself first, then the most likely ones.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from app.api.answers import (
    LOWEST,
    AnswerHead,
    TokenSpelling,
    event_of,
    failure_events,
    prompt_logprobs_of,
    usage_of,
)
from app.api.aside import aside
from app.api.deps import ServerContext
from app.api.generation import Prepared
from app.api.schemas.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    check_completion,
    check_prompt_count,
)
from app.api.schemas.decode import decode_struct
from app.api.schemas.field_rules import UnknownFields
from app.api.schemas.fields import COMPLETIONS
from app.api.sequence_text import Delta, SequenceText
from app.api.sse import DONE
from app.api.translate import prepare_completion
from app.core.types import EngineLimits, TokenLogprobs
from app.text.tokenizer import Tokenizer


class CompletionEndpoint:
    """`POST /v1/completions`."""

    table = COMPLETIONS

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
        """Check the body and turn it into sequences."""
        request = await aside(len(body), _decode, body, fields)
        model = context.check_model(request.model)
        check_completion(request)
        generation = await prepare_completion(request, context, limits=limits, num_bytes=len(body), tenant=tenant)

        def make_form(head: AnswerHead, texts: Sequence[SequenceText]) -> CompletionForm:
            return CompletionForm(head, request, texts, tokenizer=context.tokenizer)

        return Prepared(generation, model=model, make_form=make_form)


def _decode(body: bytes, fields: Mapping[str, msgspec.Raw]) -> CompletionRequest:
    if "prompt" in fields:
        check_prompt_count(fields["prompt"])
    return decode_struct(body, CompletionRequest, fields=fields)


class CompletionForm:
    """One answer. Of a stream's chunks, what is the same in all of them is encoded once."""

    def __init__(
        self, head: AnswerHead, request: CompletionRequest, texts: Sequence[SequenceText], *, tokenizer: Tokenizer
    ) -> None:
        spelling = TokenSpelling(tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self._texts = texts
        self._builders = [ChoiceBuilder(text, request, tokenizer=tokenizer, spelling=spelling) for text in texts]
        self._collected: list[list[CompletionChoice]] = [[] for _ in texts]
        self._seed = head.seed
        self._head = CompletionResponse(
            id=f"cmpl-{head.request_id}",
            created=head.created,
            model=head.model,
            choices=[],
            system_fingerprint=head.fingerprint,
        )
        options = request.stream_options
        self._ends_with_usage = options is not None and bool(options.include_usage)
        self._with_usage = options is not None and bool(options.continuous_usage_stats)
        # The plain chunk is put together from bytes around its text: most chunks of most streams are plain.
        mark = "\x00"
        sample = msgspec.structs.replace(self._head, choices=[CompletionChoice(index=0, text=mark)])
        before, self._after = event_of(sample).split(msgspec.json.encode(mark))
        self._before = before.removesuffix(b'0,"text":')
        self._encode = msgspec.json.Encoder().encode

    def event(self, index: int, delta: Delta) -> bytes:
        """One delta as a chunk."""
        builder = self._builders[index]
        if delta.finish_reason is None and builder.is_plain and not self._with_usage:
            return b'%b%d,"text":%b%b' % (self._before, index, self._encode(delta.text), self._after)
        chunk = msgspec.structs.replace(self._head, choices=[builder.build(delta)])
        if self._with_usage:
            chunk.usage = usage_of([self._texts[index]])
        return event_of(chunk)

    def end(self) -> bytes:
        """Usage and seed, where asked for, and [DONE]."""
        if not self._ends_with_usage:
            return DONE
        return event_of(msgspec.structs.replace(self._head, usage=usage_of(self._texts), seed=self._seed)) + DONE

    def failure(self, error: Exception) -> bytes:
        """The error, and [DONE]."""
        return failure_events(error)

    def collect(self, index: int, delta: Delta) -> None:
        """Keep a delta for `whole`."""
        self._collected[index].append(self._builders[index].build(delta))

    def whole(self) -> CompletionResponse:
        """All choices, joined."""
        choices = [join_choices(parts) for parts in self._collected]
        return msgspec.structs.replace(self._head, choices=choices, usage=usage_of(self._texts), seed=self._seed)


class ChoiceBuilder:
    """Makes one sequence's choices, one for each delta, whether they are streamed or joined."""

    def __init__(
        self, text: SequenceText, request: CompletionRequest, *, tokenizer: Tokenizer, spelling: TokenSpelling
    ) -> None:
        self._sequence = text.prepared
        self._request = request
        self._text = text
        self._tokenizer = tokenizer
        self._spelling = spelling
        self._num_chars = 0
        self._is_first = True
        self.is_plain = request.logprobs is None and not request.return_token_ids and not request.echo
        """Whether a choice between the first and the last is text and nothing else."""

    def build(self, delta: Delta) -> CompletionChoice:
        """The delta as a choice; the first one carries the echo and all that belongs to the prompt."""
        choice = CompletionChoice(
            index=self._sequence.index,
            text=delta.text,
            finish_reason=None if delta.finish_reason is None else delta.finish_reason.value,
            stop_reason=delta.stop_reason,
        )
        if self._request.logprobs is not None:
            choice.logprobs = CompletionLogprobs([], [], [], [])
        if self._request.return_token_ids:
            choice.token_ids = list(delta.token_ids)
        if self._is_first:
            self._is_first = False
            self._add_prompt(choice)
        if choice.logprobs is not None:
            self._add_logprobs(choice.logprobs, delta.token_ids, delta.logprobs)
        return choice

    def _add_prompt(self, choice: CompletionChoice) -> None:
        prompt, request = self._sequence.prompt, self._request
        if request.echo:
            shown = prompt.text
            if shown is None:
                shown = self._tokenizer.decode(prompt.token_ids, request.skip_special_tokens is not False)
            choice.text = shown + choice.text
            if choice.logprobs is not None:
                self._add_logprobs(choice.logprobs, prompt.token_ids, (None, *self._text.prompt_logprobs))
        if request.return_token_ids:
            choice.prompt_token_ids = prompt.token_ids
        if request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs_of(
                prompt.token_ids, self._text.prompt_logprobs, request.prompt_logprobs, tokenizer=self._tokenizer
            )

    def _add_logprobs(
        self,
        logprobs: CompletionLogprobs,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
    ) -> None:
        count = self._request.logprobs or 0
        for token_id, entry in zip(token_ids, entries, strict=True):
            begun, inside = self._spelling.chars(token_id)
            logprobs.tokens.append(self._spelling.text(token_id))
            logprobs.text_offset.append(max(0, self._num_chars - inside))
            self._num_chars += begun
            if entry is None:
                logprobs.token_logprobs.append(None)
                logprobs.top_logprobs.append(None)
                continue
            own = max(entry.logprob, LOWEST)
            top = {self._spelling.text(token_id): own}
            for other, logprob in zip(entry.top_token_ids[:count], entry.top_logprobs, strict=False):
                top.setdefault(self._spelling.text(other), max(logprob, LOWEST))
            logprobs.token_logprobs.append(own)
            logprobs.top_logprobs.append(top)


def join_choices(choices: Iterable[CompletionChoice]) -> CompletionChoice:
    """The whole choice from its deltas, of which there is at least one."""
    parts = list(choices)
    first, last = parts[0], parts[-1]
    first.text = "".join([part.text for part in parts])
    first.finish_reason, first.stop_reason = last.finish_reason, last.stop_reason
    for part in parts[1:]:
        if first.logprobs is not None and part.logprobs is not None:
            first.logprobs.tokens += part.logprobs.tokens
            first.logprobs.token_logprobs += part.logprobs.token_logprobs
            first.logprobs.top_logprobs += part.logprobs.top_logprobs
            first.logprobs.text_offset += part.logprobs.text_offset
        if first.token_ids is not msgspec.UNSET and part.token_ids is not msgspec.UNSET:
            first.token_ids += part.token_ids
    return first
