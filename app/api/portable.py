"""How a stream goes on after its connection, perhaps on another server: from its request and the client's cursor.

Each choice is brought to where the client stands by feeding its tokens through the text state once more, unsent, and
goes on from there. The tokens come from this process where it has them still, else from the client, else they are
drawn again: a token depends on weights, request, seed and position alone, so they are the same ones. What the client
has is checked by digest: it gets the next words of its own answer, or an error.

Invariant: what is kept of a stream is given to its owner alone, by its key in `app.api.kept`.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import IntEnum
from typing import cast

import msgspec

from app.api.answers import AnswerForm, AnswerHead
from app.api.cursor import LAST_EVENT_ID, ChoiceCursor, Cursor
from app.api.errors import ResumeConflict, ResumeDiverged
from app.api.kept import ChoiceRecord, KeptStreams, StreamKey, StreamRecord
from app.api.resumable_form import ResumableForm
from app.api.sequence_text import SequenceText
from app.api.translate import PreparedGeneration
from app.client.engine_client import EngineClient
from app.core.types import EngineOutput, EngineRequest, TokenLogprobs

_PART_TOKENS = 64
_UNKNOWN_LOGPROBS = TokenLogprobs(0.0, 1, (), ())
"""Of tokens whose events are not sent again."""


class Source(IntEnum):
    """Where the tokens come from that the client has already, cheapest first."""

    JOURNAL = 0
    TOKENS = 1
    DECODE = 2


@dataclass(frozen=True, slots=True)
class Start:
    """Where one choice begins."""

    request: EngineRequest
    """What is asked of the engine."""
    record: ChoiceRecord
    at: ChoiceCursor | None = None
    """Where the client stands; None: it has nothing of this choice."""
    source: Source | None = None
    replayed: tuple[int, ...] = ()
    """Tokens up to there, known before the engine is asked."""
    pending: EngineOutput | None = None
    """What is known beyond."""

    @property
    def is_over(self) -> bool:
        """The client has all of it."""
        return self.at is not None and self.at.is_finished

    @property
    def num_silent(self) -> int:
        """Tokens that the engine draws again."""
        return self.at.position if self.at is not None and self.source is Source.DECODE else 0


class PortableStream:
    """One resumable stream, new or gone on with. Between `open` and `close` its tokens are kept for another one."""

    def __init__(
        self,
        generation: PreparedGeneration,
        head: AnswerHead,
        *,
        cursor: Cursor,
        starts: Sequence[Start],
        kept: KeptStreams,
    ) -> None:
        self.generation = generation
        self.head = head
        """Both with the seed and the names of the cursor."""
        self.cursor = cursor
        self.starts = tuple(starts)
        self._form: ResumableForm | None = None
        self._texts: tuple[SequenceText, ...] = ()
        self._kept = kept
        self._record = StreamRecord(stream_key(generation, cursor), tuple(start.record for start in starts))

    @property
    def source(self) -> Source | None:
        """The dearest of its choices; None for a new stream. Where the client has all tokens, none is needed."""
        if all(start.at is None for start in self.starts):
            return None
        return max([start.source for start in self.starts if start.source is not None], default=Source.JOURNAL)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the response says of where it goes on from."""
        return [] if self.source is None else [(b"headwater-resumed", self.source.name.lower().encode())]

    def form(self, form: AnswerForm, texts: Sequence[SequenceText]) -> ResumableForm:
        """The form of its events."""
        self._form = ResumableForm(form, texts, start=self.cursor)
        self._texts = tuple(texts)
        for start, text in zip(self.starts, texts, strict=True):
            if start.at is None:
                continue
            text.settle_cached_tokens(start.at.num_cached_tokens)
            if start.is_over:
                text.num_output_tokens = start.at.position
                text.num_reasoning_tokens = start.at.num_reasoning_tokens
            elif text.prepared.engine_request.params.num_prompt_logprobs is not None:
                text.prompt_logprobs += [_UNKNOWN_LOGPROBS] * (len(start.request.prompt_token_ids) - 1)
        return self._form

    async def catch_up(self) -> None:
        """Say, unsent, what is known of what the client has. Raises ResumeConflict where it has something else."""
        for index, (start, text) in enumerate(zip(self.starts, self._texts, strict=True)):
            asks_logprobs = text.prepared.engine_request.params.num_logprobs is not None
            logprobs = (_UNKNOWN_LOGPROBS,) * len(start.replayed) if asks_logprobs else ()
            for part in _in_parts(EngineOutput(start.request.request_id, start.replayed, logprobs)):
                self._say_again(index, part)
                await asyncio.sleep(0)

    def _say_again(self, index: int, part: EngineOutput) -> None:
        start, delta = self.starts[index], self._texts[index].feed(part)
        if delta is None:  # of a choice of which nothing is known
            return
        assert self._form is not None
        try:
            self._form.event(index, delta)
        except ResumeDiverged as error:
            whose = "`resume_token_ids`" if start.source is Source.TOKENS else f"`{LAST_EVENT_ID}`"
            raise ResumeConflict(
                f"{whose}: {error.message} Send what the stream's events said.",
                param=LAST_EVENT_ID,
                code="text_differs",
            ) from error

    async def outputs(self, index: int, engine: EngineClient) -> AsyncGenerator[EngineOutput, None]:
        """What the choice's text must be fed, from where it stands. Close it to abort the sequence."""
        start = self.starts[index]
        if start.pending is not None:
            for part in _in_parts(start.pending):
                yield part
                await asyncio.sleep(0)
            if start.pending.finish_reason is not None:
                return
        num_silent = start.num_silent
        generated = cast("AsyncGenerator[EngineOutput, None]", engine.generate(start.request))
        async with aclosing(generated) as outputs:
            async for output in outputs:
                self._kept.add(self._record, index, output)
                if 0 < num_silent <= len(output.token_ids):
                    again, output = _divide(output, num_silent)
                    yield again
                    num_silent = 0
                else:
                    num_silent = max(0, num_silent - len(output.token_ids))
                yield output

    def open(self) -> None:
        """The stream begins."""
        self._kept.open(self._record)

    def close(self) -> None:
        """The stream is over, however it ended."""
        if self._form is not None and self._form.has_diverged:
            self._kept.drop(self._record)
        else:
            self._kept.close(self._record)


def stream_key(generation: PreparedGeneration, cursor: Cursor) -> StreamKey:
    """Under which the stream is kept."""
    owner = generation.sequences[0].engine_request.cache_salt
    return StreamKey(owner, cursor.request_id, cursor.created, cursor.seed, cursor.prompts, cursor.parameters)


def _in_parts(output: EngineOutput) -> Iterator[EngineOutput]:
    """A few tokens at a time: between two parts, which become text, other requests have their turn."""
    while len(output.token_ids) > _PART_TOKENS:
        part, output = _divide(output, _PART_TOKENS)
        yield part
    yield output


def _divide(output: EngineOutput, count: int) -> tuple[EngineOutput, EngineOutput]:
    """The first `count` tokens without an end, and the rest with it."""
    first = msgspec.structs.replace(
        output,
        token_ids=output.token_ids[:count],
        logprobs=output.logprobs[:count],
        finish_reason=None,
        stop_token_id=None,
    )
    rest = msgspec.structs.replace(
        output, token_ids=output.token_ids[count:], logprobs=output.logprobs[count:], was_handed_over=False
    )
    return first, rest
