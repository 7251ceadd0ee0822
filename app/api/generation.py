"""Serving one generating request that has been checked: admission, its sequences, its answer, whole or as a stream.

An endpoint says what its body means and how its answer is worded; everything between is the same for all of them,
here and, before it, in `app.api.generation_run`. Whatever ends the request (its end, an error, a closed connection),
every admitted sequence leaves admission, is counted in the metrics with one finish reason, and is aborted in the engine
if it still ran.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import msgspec
from starlette.types import Send

from app.api.admission import Place
from app.api.answers import AnswerForm, AnswerHead
from app.api.aside import aside
from app.api.deadline import Deadline
from app.api.deps import ServerContext
from app.api.errors import is_expected, kind_of
from app.api.portable_plan import plan_stream
from app.api.record import RequestRecord
from app.api.respond import JSON, send_body
from app.api.resumption import INEXACT_COMMENT, RESUMED_COMMENT, resume_header
from app.api.schemas.field_rules import ignored_header
from app.api.sequence_text import Delta, SequenceAborted, SequenceText
from app.api.sse import EventStream
from app.api.translate import PreparedGeneration, PreparedSequence, num_ids
from app.core.errors import DeadlineExceeded, EngineFailed, QueueTimeout
from app.core.types import EngineLimits, EngineOutput, EngineRequest, FinishReason
from app.observability.sequence_meter import SequenceMeter

_STARTED_AT_ONCE = 32
_LOGPROB_BYTES = 32
"""About what a candidate of a log-probability takes in an answer."""
Emit = Callable[["LiveSequence", Delta], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request, ready to be admitted, and the maker of its answer's form."""

    generation: PreparedGeneration
    model: str
    """The model's name in the answer."""
    make_form: Callable[[AnswerHead, Sequence[SequenceText]], AnswerForm]
    ignored: tuple[str, ...] = ()
    """Fields without effect beside those that the table tells."""


class LiveSequence:
    """One admitted sequence with all that follows it."""

    __slots__ = ("meter", "place", "prepared", "text")

    def __init__(
        self,
        prepared: PreparedSequence,
        *,
        text: SequenceText,
        meter: SequenceMeter,
        place: Place,
    ) -> None:
        self.prepared = prepared
        self.text = text
        self.meter = meter
        self.place = place

    def close(self, reason: FinishReason) -> None:
        """Count the end; does nothing where it was counted already."""
        self.meter.finish(reason, now=time.monotonic())
        self.place.leave()


class GenerationAnswer:
    """A prepared request on its way through the engine and back."""

    def __init__(
        self,
        prepared: Prepared,
        context: ServerContext,
        *,
        limits: EngineLimits,
        record: RequestRecord,
        deadline: Deadline,
        ignored: Sequence[str],
        last_event_id: str = "",
    ) -> None:
        generation = prepared.generation
        self._context = context
        self._record = record
        self._deadline = deadline
        self._request = request = generation.request
        request_id = record.request_id if request.request_id is None else request.request_id
        head = AnswerHead(
            request_id, int(time.time()), prepared.model, fingerprint=limits.fingerprint, seed=generation.seed
        )
        self._portable = portable = plan_stream(
            generation, head, limits=limits, kept=context.kept, last_event_id=last_event_id
        )
        if portable is not None:
            generation, head = portable.generation, portable.head
        self._headers = [(b"headwater-seed", str(generation.seed).encode()), resume_header(limits)]
        if ignored:
            self._headers.append((b"headwater-ignored", ignored_header(ignored)))
        self._is_exact = limits.row_independent
        self._events: EventStream | None = None
        """Of a streamed answer."""
        tokenizer, ends = context.tokenizer, limits.eos_token_ids
        texts = [
            SequenceText(one, request, tokenizer, eos_token_ids=ends, reasoning=generation.reasoning)
            for one in generation.sequences
        ]
        self._form = prepared.make_form(head, texts)
        if portable is not None:
            self._form = portable.form(self._form, texts)
            self._headers += portable.headers
            texts = [text for text, start in zip(texts, portable.starts, strict=True) if not start.is_over]
        self._live = self._admit(texts, limits)
        record.is_stream = bool(request.stream)
        record.generation = context.engine.status.generation
        record.meters = tuple(live.meter for live in self._live)
        record.model = prepared.model
        record.params = generation.sequences[0].engine_request.params

    async def send(self, send: Send) -> None:
        """Run all sequences and send the answer."""
        reason = FinishReason.ABORT
        try:
            if self._portable is not None:
                self._portable.open()
                async with self._deadline.hold():
                    await self._portable.catch_up()
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
            if self._portable is not None:
                self._portable.close()

    def _admit(self, texts: Sequence[SequenceText], limits: EngineLimits) -> list[LiveSequence]:
        """Nothing may fail behind it: from here on `send` gives the places back."""
        context, arrived = self._context, self._record.arrived
        requests = [self._request_of(text.prepared) for text in texts]
        counts = [len(request.prompt_token_ids) + len(request.output_token_ids) for request in requests]
        num_param_ids = num_ids(requests[0].params) if requests else 0
        share = self._record.share
        places = context.admission.admit(
            counts, max_model_len=limits.max_model_len, num_param_ids=num_param_ids, share=share
        )
        context.metrics.params_n.observe(self._request.num_samples)
        live: list[LiveSequence] = []
        for text, place in zip(texts, places, strict=True):
            prepared = text.prepared
            num_prompt_tokens = len(prepared.prompt.token_ids)
            meter = SequenceMeter(
                context.metrics,
                arrived=arrived,
                admitted=time.monotonic(),
                num_prompt_tokens=num_prompt_tokens,
                key_id=share.tenant or None,
            )
            context.metrics.params_max_tokens.observe(prepared.engine_request.params.max_tokens)
            live.append(LiveSequence(prepared, text=text, meter=meter, place=place))
        return live

    def _request_of(self, prepared: PreparedSequence) -> EngineRequest:
        return prepared.engine_request if self._portable is None else self._portable.starts[prepared.index].request

    async def _run_all(self, emit: Emit) -> None:
        """Run every sequence to its end. The first error ends the others."""
        if len(self._live) == 1:
            async with self._deadline.hold():
                await self._run(self._live[0], emit)
            return
        try:
            async with self._deadline.hold(), asyncio.TaskGroup() as group:
                for index, live in enumerate(self._live, start=1):
                    group.create_task(self._run(live, emit))
                    if index % _STARTED_AT_ONCE == 0:
                        await asyncio.sleep(0)  # a thousand of them would hold up everybody else
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _run(self, live: LiveSequence, emit: Emit) -> None:
        # Closing the generator early is what aborts the sequence, so it is closed on every way out.
        text, meter = live.text, live.meter
        is_waiting = True
        async with aclosing(self._outputs_of(live)) as outputs:
            async for output in outputs:
                before = text.num_output_tokens
                if output.was_handed_over:
                    await self._note_hand_over()
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
                if is_waiting:
                    is_waiting = False
                    live.place.stop_waiting()
                    self._deadline.note_output()
                if delta.finish_reason is not None:
                    live.close(delta.finish_reason)
                    await emit(live, delta)
                    return
                await emit(live, delta)
        raise EngineFailed("The engine ended this request without a reason.")

    def _outputs_of(self, live: LiveSequence) -> AsyncGenerator[EngineOutput, None]:
        engine, prepared = self._context.engine, live.prepared
        if self._portable is not None:
            return self._portable.outputs(prepared.index, engine)
        return cast("AsyncGenerator[EngineOutput, None]", engine.generate(prepared.engine_request))

    async def _note_hand_over(self) -> None:
        self._context.metrics.count_hand_over(is_exact=self._is_exact)
        generation = self._context.engine.status.generation
        self._record.note("headwater.hand_over", generation=generation, exact=self._is_exact)
        if not self._is_exact and self._events is not None:
            await self._events.send(INEXACT_COMMENT)

    async def _note_resumption(self, events: EventStream) -> None:
        if self._portable is None or (source := self._portable.source) is None:
            return
        self._record.resumed = source.name.lower()
        self._context.metrics.count_resumption(self._record.resumed)
        if not self._is_exact:
            await events.send(RESUMED_COMMENT)

    async def _send_whole(self, send: Send) -> None:
        form = self._form

        async def collect(live: LiveSequence, delta: Delta) -> None:
            await aside(_num_bytes_of(live, delta), form.collect, live.prepared.index, delta)

        await self._run_all(collect)
        num_bytes = sum(_num_prompt_bytes(live) for live in self._live)
        body = await aside(num_bytes, lambda: msgspec.json.encode(form.whole()))
        headers = [
            (b"content-type", JSON.encode()),
            (b"content-length", str(len(body)).encode()),
            *self._headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send_body(send, body)

    async def _send_stream(self, send: Send) -> None:
        interval = self._context.limits.keep_alive_interval
        self._events = events = EventStream(send, headers=self._headers, keep_alive_interval=interval)
        event = self._form.event

        async def forward(live: LiveSequence, delta: Delta) -> None:
            data = await aside(_num_bytes_of(live, delta), event, live.prepared.index, delta)
            if data:  # none where all is held back, or the client has it
                await events.send(data)

        try:
            await self._note_resumption(events)
            await self._run_all(forward)
            await events.end(self._form.end())
        except Exception as error:
            if not events.is_started:
                raise
            self._record.error_code, self._record.has_failed_late = kind_of(error).code, True
            for live in self._live:
                live.close(_finish_reason_of(error))
            await events.end(self._form.failure(error))
            if not is_expected(error):
                raise
        finally:
            await events.close()


def _num_bytes_of(live: LiveSequence, delta: Delta) -> int:
    """About what a delta is in an answer; the first one brings what is said of the prompt."""
    is_first = live.text.num_output_tokens == len(delta.token_ids)
    return len(delta.text) + (_num_prompt_bytes(live) if is_first else 0)


def _num_prompt_bytes(live: LiveSequence) -> int:
    """About what is said of the prompt where its log-probabilities are asked for."""
    num_candidates = 1 + (live.prepared.engine_request.params.num_prompt_logprobs or 0)
    return _LOGPROB_BYTES * num_candidates * len(live.text.prompt_logprobs)


def _finish_reason_of(error: Exception) -> FinishReason:
    is_abort = isinstance(error, SequenceAborted | DeadlineExceeded | QueueTimeout)
    return FinishReason.ABORT if is_abort else FinishReason.ERROR
