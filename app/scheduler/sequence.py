"""One token stream inside the engine: its tokens, how far they are computed, where it runs.

Only the scheduler changes a `Sequence`. Invariants:
- 0 <= num_computed_tokens <= len(token_ids), and smaller where the sequence still reads a next token;
- it has a row and blocks exactly while it runs, or until a step that it was aborted in has come back.
"""

from app.core.plan import LogitsNeed, RowStart
from app.core.types import EngineRequest, TokenLogprobs
from app.kv.manager import BlockTable
from app.scheduler.finish import FinishRules

NO_ROW = -1


class Sequence:
    """What the scheduler knows of one request."""

    __slots__ = (
        "_next_prompt_logprob",
        "added_at",
        "arrival",
        "blocks",
        "is_aborted",
        "is_in_flight",
        "is_new_row",
        "is_on_probation",
        "is_scoring",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "queue_seconds",
        "request",
        "request_id",
        "row",
        "rules",
        "token_ids",
        "was_admitted",
    )

    def __init__(
        self, request: EngineRequest, *, arrival: int, added_at: float, rules: FinishRules, blocks: BlockTable
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.arrival = arrival
        """Rises by one with each sequence."""
        self.added_at = added_at
        self.queue_seconds: float | None = None
        """How long it waited for its first admission, until an output has said so."""
        self.rules = rules
        self.blocks = blocks
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        """Prompt and output tokens."""
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        """Tokens, from the start, whose KV is in the cache."""
        self.num_cached_tokens = 0
        """Prompt tokens that the prefix cache saved at first admission."""
        self.row = NO_ROW
        self.is_new_row = False
        """The runner has not been told of the row yet."""
        self.is_in_flight = False
        """It is part of a step whose result has not come back."""
        self.is_aborted = False
        self.is_on_probation = request.is_on_probation
        """It runs in steps of its own until it has brought a token."""
        self.was_admitted = False
        """It has run: where it waits again, it was preempted."""
        self.is_scoring = request.params.max_tokens == 0
        """It reads no next token and ends when its prompt is computed."""
        # Tokens that were handed over came after all prompt logprobs had been delivered.
        reads_prompt = request.params.num_prompt_logprobs is not None and not request.output_token_ids
        self._next_prompt_logprob = 1 if reads_prompt else self.num_prompt_tokens

    @property
    def queue_key(self) -> tuple[int, int]:
        """Order among a tenant's waiting sequences, or among preempted ones: by priority, then as they came."""
        return (0 if self.was_admitted else self.request.priority, self.arrival)

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that may come from the prefix cache: those whose logits nobody waits for.

        Never all of them, because the last one's logits give the next token.
        """
        if self._next_prompt_logprob < self.num_prompt_tokens:
            return self._next_prompt_logprob - 1
        return len(self.token_ids) - 1

    def logits_need(self, end: int, *, sample: bool) -> LogitsNeed:
        """Which logits a chunk that ends before position `end` must bring."""
        if self._next_prompt_logprob < self.num_prompt_tokens and end >= self._next_prompt_logprob:
            return LogitsNeed.ALL
        return LogitsNeed.LAST if sample else LogitsNeed.NONE

    def row_start(self) -> RowStart:
        """What the runner must know when the sequence gets a row."""
        output_token_ids = tuple(self.token_ids[self.num_prompt_tokens :])
        return RowStart(self.request_id, self.request.params, self.request.prompt_token_ids, output_token_ids)

    def take_prompt_logprobs(self, start: int, logprobs: tuple[TokenLogprobs, ...]) -> tuple[TokenLogprobs, ...]:
        """Of a chunk's prompt logprobs, positions start + 1 onwards, those not delivered before a preemption."""
        fresh = logprobs[max(0, self._next_prompt_logprob - (start + 1)) :]
        self._next_prompt_logprob += len(fresh)
        return fresh

    def take_queue_seconds(self) -> float | None:
        """How long it waited, the first time that it is asked."""
        seconds, self.queue_seconds = self.queue_seconds, None
        return seconds

    def leave_row(self) -> None:
        """Forget where it ran and what was computed there."""
        self.row = NO_ROW
        self.num_computed_tokens = 0
