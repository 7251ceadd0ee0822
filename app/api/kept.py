"""What is kept of resumable streams while they run and for a while after: their tokens, to compute nothing twice.

Invariants: a stream is found by whoever may have it and by nobody else, since its key holds the owner (API key and
cache salt) beside the request; streams that ended are bounded in number, bytes and time, the oldest dropped first.
Streams that run are bounded in bytes, each and together: one that has too many log-probabilities loses the older half,
and where all have too much, the largest is no longer kept. Whoever goes on with it brings its tokens, or has them drawn
again. One event loop's thread; no locks.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from app.core.types import EngineOutput, FinishReason, TokenLogprobs

RESUME_WINDOW = 60.0
MAX_STREAMS = 1024
MAX_BYTES = 64 * 1024 * 1024
MAX_STREAM_BYTES = 8 * 1024 * 1024
"""Of one that runs."""
MAX_RUNNING_BYTES = 64 * 1024 * 1024
"""Of all that run."""
_ID_BYTES = 40
_LOGPROBS_BYTES = 240
_CANDIDATE_BYTES = 68
"""Two places in tuples, an int, a float."""


class StreamKey(NamedTuple):
    """Whose answer to what."""

    owner: str
    """As in `EngineRequest.cache_salt`: the API key's id and the request's own salt."""
    request_id: str
    created: int
    seed: int
    prompts: bytes
    parameters: bytes


class ChoiceRecord:
    """One choice's tokens as the engine brought them."""

    __slots__ = ("finish", "first_known", "logprobs", "stop_token_id", "token_ids")

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        """Begins with tokens of which only the ids are known."""
        self.token_ids = list(token_ids)
        self.first_known = len(token_ids)
        """The position from which on all is known that the engine said."""
        self.logprobs: list[TokenLogprobs] = []
        """From there, where the request asks for them."""
        self.finish: FinishReason | None = None
        self.stop_token_id: int | None = None

    def copy(self) -> "ChoiceRecord":
        """For a second stream that goes on from here."""
        copied = ChoiceRecord(self.token_ids)
        copied.logprobs, copied.first_known = list(self.logprobs), self.first_known
        copied.finish, copied.stop_token_id = self.finish, self.stop_token_id
        return copied

    def add(self, output: EngineOutput) -> None:
        """Take what the engine brought."""
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.finish, self.stop_token_id = output.finish_reason, output.stop_token_id

    def forget_older_logprobs(self) -> None:
        """The older half; of its tokens only the ids are known from then on."""
        count = (len(self.logprobs) + 1) // 2
        del self.logprobs[:count]
        self.first_known += count

    def clear(self) -> None:
        """Keep nothing."""
        self.token_ids, self.logprobs, self.first_known = [], [], 0

    def since(self, position: int, request_id: str) -> EngineOutput | None:
        """What comes after so many tokens, as one output; None where that is nothing."""
        token_ids = tuple(self.token_ids[position:])
        if not token_ids and self.finish is None:
            return None
        logprobs = tuple(self.logprobs[position - self.first_known :])
        return EngineOutput(
            request_id, token_ids, logprobs, finish_reason=self.finish, stop_token_id=self.stop_token_id
        )

    def knows(self, position: int) -> bool:
        """Whether it reaches so far and has all that comes after."""
        return self.first_known <= position <= len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """About, in memory."""
        num_candidates = len(self.logprobs[0].top_token_ids) if self.logprobs else 0
        return len(self.token_ids) * _ID_BYTES + len(self.logprobs) * (
            _LOGPROBS_BYTES + num_candidates * _CANDIDATE_BYTES
        )


class StreamRecord(NamedTuple):
    """One stream."""

    key: StreamKey
    choices: tuple[ChoiceRecord, ...]

    @property
    def num_bytes(self) -> int:
        """About, in memory."""
        return sum(choice.num_bytes for choice in self.choices)


class _Ended(NamedTuple):
    until: float
    num_bytes: int


class KeptStreams:
    """Streams that can be gone on with."""

    def __init__(
        self,
        *,
        window: float = RESUME_WINDOW,
        max_streams: int = MAX_STREAMS,
        max_bytes: int = MAX_BYTES,
        max_stream_bytes: int = MAX_STREAM_BYTES,
        max_running_bytes: int = MAX_RUNNING_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`window`: seconds that a stream is kept after its end; 0 keeps none."""
        self._window = window
        self._max_streams = max_streams
        self._max_bytes = max_bytes
        self._max_stream_bytes = max_stream_bytes
        self._max_running_bytes = max_running_bytes
        self._clock = clock
        self._records: dict[StreamKey, StreamRecord] = {}
        self._ended: OrderedDict[StreamKey, _Ended] = OrderedDict()
        """In the order in which they ended."""
        self._running: dict[StreamKey, int] = {}
        """Bytes of each."""
        self._timer: asyncio.TimerHandle | None = None
        self.num_bytes = 0
        """Of streams that ended."""
        self.num_running_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def open(self, record: StreamRecord) -> None:
        """The stream runs; it takes the place of one with the same key."""
        self._forget(record.key)
        self._records[record.key] = record
        self._running[record.key] = 0
        self._grow(record, record.num_bytes)

    def add(self, record: StreamRecord, index: int, output: EngineOutput) -> None:
        """Take what the engine brought of one choice. Nothing happens where the stream is not kept."""
        if not self._is_running(record):
            return
        choice = record.choices[index]
        before = choice.num_bytes
        choice.add(output)
        self._grow(record, choice.num_bytes - before)

    def close(self, record: StreamRecord) -> None:
        """The stream ended, however it did. Nothing happens where another one took its place."""
        if not self._is_running(record):
            return
        num_bytes = self._running.pop(record.key)
        self.num_running_bytes -= num_bytes
        self._ended[record.key] = _Ended(self._clock() + self._window, num_bytes)
        self.num_bytes += num_bytes
        self.expire()

    def drop(self, record: StreamRecord) -> None:
        """The stream ended and is not kept: what it said is no part of any answer."""
        if self._records.get(record.key) is record:
            self._forget(record.key)

    def find(self, key: StreamKey) -> StreamRecord | None:
        """The stream of this key, running or kept."""
        self.expire()
        return self._records.get(key)

    def expire(self) -> None:
        """Drop what is too old or too much."""
        now = self._clock()
        while self._ended:
            key, oldest = next(iter(self._ended.items()))
            is_too_much = len(self._ended) > self._max_streams or self.num_bytes > self._max_bytes
            if oldest.until > now and not is_too_much:
                self._wake_at(oldest.until - now)
                return
            self._forget(key)

    def _is_running(self, record: StreamRecord) -> bool:
        return record.key in self._running and self._records[record.key] is record

    def _grow(self, record: StreamRecord, num_bytes: int) -> None:
        """Count it, and let go of what is too much."""
        running = self._running
        running[record.key] += num_bytes
        self.num_running_bytes += num_bytes
        if running[record.key] > self._max_stream_bytes:
            for choice in record.choices:
                choice.forget_older_logprobs()
            self.num_running_bytes += record.num_bytes - running[record.key]
            running[record.key] = record.num_bytes
            if running[record.key] > self._max_stream_bytes:
                self._forget(record.key)
        while self.num_running_bytes > self._max_running_bytes:
            self._forget(max(running, key=running.__getitem__))

    def _forget(self, key: StreamKey) -> None:
        record = self._records.pop(key, None)
        if record is not None and key in self._running:
            self.num_running_bytes -= self._running.pop(key)
            for choice in record.choices:  # whoever fills it may hold it long
                choice.clear()
        if (ended := self._ended.pop(key, None)) is not None:
            self.num_bytes -= ended.num_bytes

    def _wake_at(self, seconds: float) -> None:
        """What a server holds of its clients' texts goes in time, also where no other stream ends."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.expire()
