"""Who is let in, and when the others should come back.

Two doors. `enter` opens before the body is read, from the headers alone: it bounds what is being parsed
and sends clients away at once while the server is full. `admit` opens when the tokens are counted, before
the engine hears of them. Both refuse with 429 and a Retry-After from the measured drain rate.

Invariants: every sequence admitted is given back exactly once, whatever ends it; the counts are 0 when
nothing is in flight. One event loop's thread; no locks.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app.core.errors import InvalidRequest, TooManyRequests
from app.observability.metrics import Metrics

_MIN_RETRY_AFTER = 1
_MAX_RETRY_AFTER = 30
_UNKNOWN_RETRY_AFTER = 5
"""Seconds, where nothing has drained yet."""
_RATE_SECONDS = 10.0
_CONTEXTS_WAITING = 32


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What may be in flight."""

    max_live_sequences: int = 1024
    max_waiting_tokens: int | None = None
    """Prompt tokens of sequences without a first output. None: 32 times the context length. A single
    request may exceed it when nothing else waits."""
    max_parsing_bytes: int = 128 * 1024 * 1024
    """Bodies being read, parsed and tokenized, together."""
    max_request_ids: int = 4_000_000
    """Token ids that the sequences of one request carry: each has its prompt and its parameters for itself."""


class DrainRate:
    """Events a second, averaged with a decay of ten seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rate = 0.0
        self._at = clock()

    def add(self, amount: int) -> None:
        """`amount` drained now."""
        self._rate = self.per_second() + amount / _RATE_SECONDS
        self._at = self._clock()

    def per_second(self) -> float:
        """The rate as of now."""
        return self._rate * math.exp((self._at - self._clock()) / _RATE_SECONDS)

    def seconds_for(self, amount: int) -> int:
        """Whole seconds until about `amount` will have drained, within the bounds of Retry-After."""
        rate = self.per_second()
        if rate <= 0.0:
            return _UNKNOWN_RETRY_AFTER
        return max(_MIN_RETRY_AFTER, min(_MAX_RETRY_AFTER, math.ceil(amount / rate)))


class Place:
    """One admitted sequence's share of the counts."""

    __slots__ = ("_admission", "_is_live", "_num_waiting_tokens")

    def __init__(self, admission: "Admission", num_prompt_tokens: int) -> None:
        self._admission = admission
        self._num_waiting_tokens = num_prompt_tokens
        self._is_live = True

    def stop_waiting(self) -> None:
        """The sequence gave its first output."""
        self._admission.drain_tokens(self._num_waiting_tokens)
        self._num_waiting_tokens = 0

    def leave(self) -> None:
        """The sequence is over. Later calls do nothing."""
        if self._is_live:
            self._is_live = False
            self.stop_waiting()
            self._admission.drain_sequence()


class BodyRoom:
    """What one body takes of the room for all. It grows with what arrives: what a header claims costs nobody."""

    __slots__ = ("_admission", "num_bytes")

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """More of the body has come. Raises TooManyRequests."""
        self._admission.take_bytes(num_bytes, is_first=self._admission.num_parsing_bytes == self.num_bytes)
        self.num_bytes += num_bytes


class Admission:
    """Counts what is in flight and refuses what would be too much."""

    def __init__(
        self, limits: AdmissionLimits, *, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self._sequence_rate = DrainRate(clock)
        self._token_rate = DrainRate(clock)
        self.num_live_sequences = 0
        self.num_waiting_tokens = 0
        self.num_parsing_bytes = 0

    @contextmanager
    def enter(self) -> Iterator["BodyRoom"]:
        """Room for a body while it is read and turned into tokens. Raises TooManyRequests."""
        if self.num_live_sequences >= self._limits.max_live_sequences:
            self._refuse_sequences(1)
        room = BodyRoom(self)
        try:
            yield room
        finally:
            self.num_parsing_bytes -= room.num_bytes

    def take_bytes(self, num_bytes: int, *, is_first: bool) -> None:
        """Room for bytes of a body that have arrived. Raises TooManyRequests; one body alone is always read."""
        total = self.num_parsing_bytes + num_bytes
        if total > self._limits.max_parsing_bytes and not is_first:
            self._metrics.count_rejection("max_parsing_bytes")
            raise TooManyRequests(
                "Too many request bodies are being read. Try again shortly.", retry_after=_MIN_RETRY_AFTER
            )
        self.num_parsing_bytes = total

    def admit(self, num_prompt_tokens: list[int], *, max_model_len: int, num_param_ids: int = 0) -> list[Place]:
        """A place for each sequence, given the token counts of their prompts and of each one's parameters.

        Raises TooManyRequests, or InvalidRequest where the request alone exceeds what could ever be live.
        """
        limits = self._limits
        num_sequences = len(num_prompt_tokens)
        if num_sequences > limits.max_live_sequences:
            raise InvalidRequest(
                f"`n` times the number of prompts is {num_sequences}; "
                f"this server takes at most {limits.max_live_sequences} at once.",
                param="n",
            )
        num_ids = sum(num_prompt_tokens) + num_sequences * num_param_ids
        if num_ids > limits.max_request_ids:
            raise InvalidRequest(
                f"The {num_sequences} sequences of this request carry {num_ids} token ids, prompts and parameters "
                f"together; at most {limits.max_request_ids} are taken. Lower `n` or send fewer prompts.",
                param="n",
            )
        if self.num_live_sequences + num_sequences > limits.max_live_sequences:
            self._refuse_sequences(num_sequences)
        max_waiting = limits.max_waiting_tokens
        if max_waiting is None:
            max_waiting = _CONTEXTS_WAITING * max_model_len
        excess = self.num_waiting_tokens + sum(num_prompt_tokens) - max_waiting
        if self.num_waiting_tokens > 0 and excess > 0:
            self._metrics.count_rejection("max_waiting_tokens")
            raise TooManyRequests(
                f"{self.num_waiting_tokens} prompt tokens wait already; the limit is {max_waiting}. Try again later.",
                retry_after=self._token_rate.seconds_for(excess),
            )
        self.num_live_sequences += num_sequences
        self.num_waiting_tokens += sum(num_prompt_tokens)
        return [Place(self, count) for count in num_prompt_tokens]

    def drain_tokens(self, num_tokens: int) -> None:
        """These prompt tokens wait no longer."""
        if num_tokens:
            self.num_waiting_tokens -= num_tokens
            self._token_rate.add(num_tokens)

    def drain_sequence(self) -> None:
        """One sequence is over."""
        self.num_live_sequences -= 1
        self._sequence_rate.add(1)

    def _refuse_sequences(self, num_new: int) -> None:
        excess = self.num_live_sequences + num_new - self._limits.max_live_sequences
        self._metrics.count_rejection("max_live_sequences")
        raise TooManyRequests(
            f"{self.num_live_sequences} sequences are in flight; "
            f"the limit is {self._limits.max_live_sequences}. Try again later.",
            retry_after=self._sequence_rate.seconds_for(excess),
        )
