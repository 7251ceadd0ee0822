"""Who is let in, and when the others should come back.

Two doors. `enter` opens before the body is read, from the headers alone: it bounds what is being parsed
and sends clients away at once while the server is full. `admit` opens when the tokens are counted, before
the engine hears of them. Both refuse with 429 and a Retry-After from the measured drain rate. `check_wait` is for
both, where the operator bounds the wait for a first output.

Where there are keys, each has a bound of its own, and none may fill the house: a key holds at most four times what
is left free (the dynamic thresholds of Choudhury and Hahne, 1998, for shared buffers), so that one key alone gets
80 % and whoever comes next finds room. In which order admitted sequences run is the scheduler's affair.

Invariants: every sequence admitted is given back exactly once, whatever ends it; the counts are 0 when
nothing is in flight. One event loop's thread; no locks.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app.api.share import Share
from app.api.waiting import Waiting
from app.core.errors import InvalidRequest, TooManyRequests
from app.observability.metrics import Metrics

_MIN_RETRY_AFTER = 1
_MAX_RETRY_AFTER = 30
_UNKNOWN_RETRY_AFTER = 5
"""Seconds, where nothing has drained yet."""
_RATE_SECONDS = 10.0
_CONTEXTS_WAITING = 32
_KEY_SHARE = 4
"""Times what is free that one key may hold."""
_NOBODYS = Share()


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What may be in flight."""

    max_live_sequences: int = 1024
    max_waiting_tokens: int | None = None
    """Prompt tokens of sequences without a first output. None: 32 times the context length. A single
    request may exceed it when nothing else waits."""
    max_parsing_bytes: int = 128 * 1024 * 1024
    """Bodies being read, parsed and tokenized, together."""
    max_live_per_key: int | None = None
    """Sequences that one key has in flight, where the key itself has no number."""
    max_expected_wait: float | None = None
    """Seconds that a request may be expected to wait for its first output. None: nobody is refused for it."""
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

    __slots__ = ("_admission", "_is_live", "_is_waiting", "_num_waiting_tokens", "_tenant")

    def __init__(self, admission: "Admission", num_prompt_tokens: int, *, tenant: str) -> None:
        self._admission = admission
        self._tenant = tenant
        self._num_waiting_tokens = num_prompt_tokens
        self._is_live = self._is_waiting = True

    def stop_waiting(self) -> None:
        """The sequence gave its first output."""
        self._stop_waiting(has_output=True)

    def leave(self) -> None:
        """The sequence is over. Later calls do nothing."""
        if self._is_live:
            self._is_live = False
            self._stop_waiting(has_output=False)
            self._admission.drain_sequence(tenant=self._tenant)

    def _stop_waiting(self, *, has_output: bool) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._admission.drain_tokens(self._num_waiting_tokens, tenant=self._tenant, has_output=has_output)


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
        self._waiting = Waiting(clock)
        self.num_live_sequences = 0
        self.num_waiting_tokens = 0
        self.num_parsing_bytes = 0
        self._live_of: Counter[str] = Counter()
        self._waiting_of: Counter[str] = Counter()

    def check_wait(self, share: Share = _NOBODYS) -> None:
        """Refuse now what would be given up later: a request that waits in vain makes others wait. TooManyRequests."""
        most = self._limits.max_expected_wait
        if most is not None and (wait := self._waiting.seconds_for(share.tenant)) > most:
            self._count_rejection("expected_wait", share)
            raise TooManyRequests(
                f"A request would wait about {wait:.1f} s for its first output; at most {most:g} s is taken on. "
                "Try again later.",
                retry_after=max(_MIN_RETRY_AFTER, min(_MAX_RETRY_AFTER, math.ceil(wait - most))),
            )

    @contextmanager
    def enter(self, share: Share = _NOBODYS) -> Iterator["BodyRoom"]:
        """Room for a body while it is read and turned into tokens. Raises TooManyRequests."""
        if self.num_live_sequences >= self._limits.max_live_sequences:
            self._refuse_sequences(1, share)
        self._check_key(share, 1)
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

    def admit(
        self,
        num_prompt_tokens: list[int],
        *,
        max_model_len: int,
        num_param_ids: int = 0,
        share: Share = _NOBODYS,
    ) -> list[Place]:
        """A place for each sequence, given the token counts of their prompts and of each one's parameters.

        Raises TooManyRequests, or InvalidRequest where the request alone exceeds what could ever be live.
        """
        limits = self._limits
        num_sequences = len(num_prompt_tokens)
        if num_sequences > (most := self._most_of(share)):
            whose = "this server takes" if most == limits.max_live_sequences else "this API key may have"
            raise InvalidRequest(
                f"`n` times the number of prompts is {num_sequences}; {whose} at most {most} at once.",
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
            self._refuse_sequences(num_sequences, share)
        self._check_key(share, num_sequences)
        self.check_wait(share)
        max_waiting = limits.max_waiting_tokens
        if max_waiting is None:
            max_waiting = _CONTEXTS_WAITING * max_model_len
        num_new = sum(num_prompt_tokens)
        excess = self._excess_tokens(share, num_new, max_waiting)
        if self.num_waiting_tokens > 0 and excess > 0:
            self._count_rejection("max_waiting_tokens", share)
            raise TooManyRequests(
                f"{self.num_waiting_tokens} prompt tokens wait already; the limit is {max_waiting}. Try again later.",
                retry_after=self._token_rate.seconds_for(excess),
            )
        self.num_live_sequences += num_sequences
        self.num_waiting_tokens += num_new
        self._waiting.begin(num_sequences, tenant=share.tenant)
        if share.tenant:
            self._live_of[share.tenant] += num_sequences
            self._waiting_of[share.tenant] += num_new
            self._metrics.set_key_live(share.tenant, self._live_of[share.tenant])
        return [Place(self, count, tenant=share.tenant) for count in num_prompt_tokens]

    def drain_tokens(self, num_tokens: int, *, tenant: str, has_output: bool) -> None:
        """A sequence with so many prompt tokens waits no longer: it has an output, or is gone without."""
        self._waiting.end(tenant=tenant, has_output=has_output)
        if num_tokens:
            self.num_waiting_tokens -= num_tokens
            _take_off(self._waiting_of, tenant, num_tokens)
            self._token_rate.add(num_tokens)

    def drain_sequence(self, *, tenant: str) -> None:
        """One sequence is over."""
        self.num_live_sequences -= 1
        self._sequence_rate.add(1)
        if tenant:
            _take_off(self._live_of, tenant, 1)
            self._metrics.set_key_live(tenant, self._live_of[tenant])

    def _most_of(self, share: Share) -> int:
        """Sequences that a request of this key can ever have in flight."""
        most = self._limits.max_live_sequences
        if not share.tenant:
            return most
        own = self._limits.max_live_per_key if share.max_live is None else share.max_live
        most = max(1, most * _KEY_SHARE // (1 + _KEY_SHARE))
        return most if own is None else min(most, own)

    def _check_key(self, share: Share, num_new: int) -> None:
        """Refuse what is too much for this key, though not for the server."""
        if not share.tenant:
            return
        live = self._live_of[share.tenant]
        own = self._limits.max_live_per_key if share.max_live is None else share.max_live
        free = self._limits.max_live_sequences - self.num_live_sequences - num_new
        fair = max(_KEY_SHARE * free, 1)
        most = fair if own is None else min(own, fair)
        if live + num_new > most:
            self._count_rejection("key_concurrency" if most == own else "key_share", share)
            raise TooManyRequests(
                f"{live} sequences of this API key are in flight; it may have {most} now. Try again later.",
                retry_after=self._sequence_rate.seconds_for(live + num_new - most),
            )

    def _excess_tokens(self, share: Share, num_new: int, max_waiting: int) -> int:
        """Waiting tokens that must drain before `num_new` may come; 0 or less: none."""
        excess = self.num_waiting_tokens + num_new - max_waiting
        waiting = self._waiting_of[share.tenant]
        if share.tenant and waiting:
            excess = max(excess, waiting + num_new + _KEY_SHARE * excess)
        return excess

    def _refuse_sequences(self, num_new: int, share: Share) -> None:
        excess = self.num_live_sequences + num_new - self._limits.max_live_sequences
        self._count_rejection("max_live_sequences", share)
        raise TooManyRequests(
            f"{self.num_live_sequences} sequences are in flight; "
            f"the limit is {self._limits.max_live_sequences}. Try again later.",
            retry_after=self._sequence_rate.seconds_for(excess),
        )

    def _count_rejection(self, reason: str, share: Share) -> None:
        self._metrics.count_rejection(reason)
        if share.tenant:
            self._metrics.count_key_rejection(share.tenant)


def _take_off(counts: Counter[str], tenant: str, amount: int) -> None:
    """Subtract; tenants with nothing are not kept."""
    if tenant:
        counts[tenant] -= amount
        if not counts[tenant]:
            del counts[tenant]
