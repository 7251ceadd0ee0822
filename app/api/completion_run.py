"""Serving one `POST /v1/completions`, from its first byte to its last, as a raw ASGI response.

Whatever ends the request (its end, an error, a closed connection), every admitted sequence leaves
admission, is counted in the metrics with one finish reason, and is aborted in the engine if it still ran.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from typing import cast

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.admission import Place
from app.api.body import ClientDisconnected, check_headers, read_body
from app.api.choices import ChoiceBuilder, TokenSpelling, join_choices, usage_of
from app.api.deps import ServerContext
from app.api.disconnect import run_until_disconnect
from app.api.errors import ErrorBody, error_body, is_expected, kind_of
from app.api.record import RequestRecord
from app.api.respond import JSON
from app.api.schemas.completions import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    check_completion,
)
from app.api.schemas.decode import decode_keys, decode_struct
from app.api.schemas.fields import ignored_header, sort_fields
from app.api.sequence_text import Delta, SequenceAborted, SequenceText
from app.api.sse import DONE, EventStream
from app.api.translate import PreparedCompletion, PreparedSequence, prepare_completion
from app.core.errors import EngineFailed
from app.core.types import EngineLimits, EngineOutput, FinishReason
from app.observability.sequence_meter import SequenceMeter

Emit = Callable[["LiveSequence", Delta], Awaitable[None]]


class LiveSequence:
    """One admitted sequence with all that follows it."""

    __slots__ = ("builder", "meter", "place", "prepared", "text")

    def __init__(
        self,
        prepared: PreparedSequence,
        *,
        text: SequenceText,
        builder: ChoiceBuilder,
        meter: SequenceMeter,
        place: Place,
    ) -> None:
        self.prepared = prepared
        self.text = text
        self.builder = builder
        self.meter = meter
        self.place = place

    def close(self, reason: FinishReason) -> None:
        """Count the end; does nothing where it was counted already."""
        self.meter.finish(reason, now=time.monotonic())
        self.place.leave()


class CompletionAnswer:
    """A prepared completion on its way through the engine and back."""

    def __init__(
        self,
        prepared: PreparedCompletion,
        context: ServerContext,
        *,
        limits: EngineLimits,
        record: RequestRecord,
        model: str,
        ignored: tuple[str, ...],
    ) -> None:
        self._context = context
        self._record = record
        self._seed = prepared.seed
        self._request = request = prepared.request
        self._head = CompletionResponse(
            id=f"cmpl-{record.request_id if request.request_id is None else request.request_id}",
            created=int(time.time()),
            model=model,
            choices=[],
            system_fingerprint=limits.fingerprint,
        )
        self._headers = [(b"headwater-seed", str(prepared.seed).encode())]
        if ignored:
            self._headers.append((b"headwater-ignored", ignored_header(ignored)))
        self._live = self._admit(prepared, limits)
        record.is_stream = bool(request.stream)
        record.generation = context.engine.status.generation
        record.meters = tuple(live.meter for live in self._live)

    async def send(self, send: Send) -> None:
        """Run all sequences and send the answer."""
        reason = FinishReason.ABORT
        try:
            if self._request.stream:
                await self._send_stream(send)
            else:
                await self._send_whole(send)
        except Exception as error:
            reason = _finish_reason_of(error)
            raise
        finally:
            for live in self._live:
                live.close(reason)

    def _admit(self, prepared: PreparedCompletion, limits: EngineLimits) -> list[LiveSequence]:
        context, request = self._context, self._request
        counts = [len(sequence.prompt.token_ids) for sequence in prepared.sequences]
        places = context.admission.admit(counts, max_model_len=limits.max_model_len)
        context.metrics.params_n.observe(request.num_samples)
        spelling = TokenSpelling(context.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        live: list[LiveSequence] = []
        for sequence, place in zip(prepared.sequences, places, strict=True):
            text = SequenceText(sequence, request, context.tokenizer)
            builder = ChoiceBuilder(sequence, request, text=text, tokenizer=context.tokenizer, spelling=spelling)
            meter = SequenceMeter(
                context.metrics, arrived=self._record.arrived, num_prompt_tokens=len(sequence.prompt.token_ids)
            )
            context.metrics.params_max_tokens.observe(sequence.engine_request.params.max_tokens)
            live.append(LiveSequence(sequence, text=text, builder=builder, meter=meter, place=place))
        return live

    async def _run_all(self, emit: Emit) -> None:
        """Run every sequence to its end. The first error ends the others."""
        if len(self._live) == 1:
            await self._run(self._live[0], emit)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for live in self._live:
                    group.create_task(self._run(live, emit))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _run(self, live: LiveSequence, emit: Emit) -> None:
        # Closing the generator early is what aborts the sequence, so it is closed on every way out.
        generated = cast(
            "AsyncGenerator[EngineOutput, None]", self._context.engine.generate(live.prepared.engine_request)
        )
        text, meter = live.text, live.meter
        async with aclosing(generated) as outputs:
            async for output in outputs:
                before = text.num_output_tokens
                if output.queue_seconds is not None:
                    meter.queue_seconds = output.queue_seconds
                try:
                    delta = text.feed(output)
                except Exception as error:
                    live.close(_finish_reason_of(error))
                    raise
                if delta is None:
                    continue
                meter.advance(
                    text.num_output_tokens - before,
                    now=time.monotonic(),
                    num_cached_tokens=output.num_cached_tokens,
                )
                if before == 0:
                    live.place.stop_waiting()
                if delta.finish_reason is not None:
                    live.close(delta.finish_reason)
                    await emit(live, delta)
                    return
                await emit(live, delta)
        raise EngineFailed("The engine ended this request without a reason.")

    async def _send_whole(self, send: Send) -> None:
        choices: dict[int, list[CompletionChoice]] = {live.prepared.index: [] for live in self._live}

        async def collect(live: LiveSequence, delta: Delta) -> None:
            choices[live.prepared.index].append(live.builder.build(delta))

        await self._run_all(collect)
        answer = self._head
        answer.choices = [join_choices(choices[live.prepared.index]) for live in self._live]
        answer.usage = usage_of([(live.prepared, live.text) for live in self._live])
        answer.seed = self._seed
        body = msgspec.json.encode(answer)
        headers = [
            (b"content-type", JSON.encode()),
            (b"content-length", str(len(body)).encode()),
            *self._headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        interval = self._context.limits.keep_alive_interval
        events = EventStream(send, headers=self._headers, keep_alive_interval=interval)
        encode = ChunkEncoder(self._head, self._request).encode

        async def forward(live: LiveSequence, delta: Delta) -> None:
            await events.send(encode(live, delta))

        try:
            await self._run_all(forward)
            await events.end(self._usage_event() + DONE)
        except Exception as error:
            if not events.is_started:
                raise
            self._record.error_code = kind_of(error).code
            for live in self._live:
                live.close(_finish_reason_of(error))
            await events.end(_event(error_body(error)) + DONE)
            if not is_expected(error):
                raise
        finally:
            await events.close()

    def _usage_event(self) -> bytes:
        options = self._request.stream_options
        if options is None or not options.include_usage:
            return b""
        last = msgspec.structs.replace(
            self._head,
            usage=usage_of([(live.prepared, live.text) for live in self._live]),
            seed=self._seed,
        )
        return _event(last)


class ChunkEncoder:
    """Chunks of one stream. What is the same in all of them is encoded once."""

    def __init__(self, head: CompletionResponse, request: CompletionRequest) -> None:
        self._head = head
        options = request.stream_options
        self._with_usage = options is not None and bool(options.continuous_usage_stats)
        # The plain chunk is put together from bytes around its text: most chunks of most streams are plain.
        mark = "\x00"
        sample = msgspec.structs.replace(head, choices=[CompletionChoice(index=0, text=mark)])
        before, after = _event(sample).split(msgspec.json.encode(mark))
        self._before = before.removesuffix(b'0,"text":')
        self._after = after
        self._encode = msgspec.json.Encoder().encode

    def encode(self, live: LiveSequence, delta: Delta) -> bytes:
        """One delta as an event."""
        if delta.finish_reason is None and live.builder.is_plain and not self._with_usage:
            return b'%b%d,"text":%b%b' % (self._before, live.prepared.index, self._encode(delta.text), self._after)
        chunk = msgspec.structs.replace(self._head, choices=[live.builder.build(delta)])
        if self._with_usage:
            chunk.usage = usage_of([(live.prepared, live.text)])
        return _event(chunk)


class CompletionRun(Response):
    """The response object of one completion request; it reads the body itself."""

    def __init__(self, context: ServerContext) -> None:
        self.background = None
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request. Errors before the first byte are raised, later ones become an event."""
        context, record = self._context, RequestRecord.of(scope)
        context.ready_limits()
        with ExitStack() as parsing:
            parsing.enter_context(context.admission.enter(check_headers(scope, context.limits)))
            try:
                body = await read_body(receive, context.limits)
            except ClientDisconnected:
                return
            serving = self._serve(body, record, send, parsing=parsing)
            del body  # a long answer must not hold it
            await run_until_disconnect(receive, serving)

    async def _serve(self, body: bytes, record: RequestRecord, send: Send, *, parsing: ExitStack) -> None:
        """Turn the body into an answer and send it. `parsing` is closed once the body is no longer held."""
        context = self._context
        limits = context.ready_limits()
        fields = decode_keys(body)
        ignored = sort_fields(fields, unknown=context.limits.unknown_fields)
        request = decode_struct(body, CompletionRequest, fields=fields)
        model = context.check_model(request.model)
        check_completion(request)
        prepared = await prepare_completion(request, context, limits=limits)
        answer = CompletionAnswer(prepared, context, limits=limits, record=record, model=model, ignored=ignored)
        del body, fields
        parsing.close()
        await answer.send(send)


def _finish_reason_of(error: Exception) -> FinishReason:
    return FinishReason.ABORT if isinstance(error, SequenceAborted) else FinishReason.ERROR


def _event(body: CompletionResponse | ErrorBody) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(body)
