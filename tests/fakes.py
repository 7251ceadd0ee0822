"""A model runner without tensors, and what it must bring forth: the scheduler's oracle.

`FakeRunner` keeps a Python list as KV memory. It writes each token's KV to its slot and reads the whole
context back through the block table, so that an error in allocation, sharing, preemption, chunking or
rows changes the tokens. A slot's KV depends on the token, its position and the KV before it, as in a
decoder: the same tokens behind another prefix are other KV. `continuation` computes the same without
scheduler, blocks or rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from app.core.plan import LogitsNeed, PlanEntry, RowResult, RowStart, StepPlan, StepResult
from app.core.types import EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from app.runner.base import RunnerInfo, StepMasks

_NO_KV = 1_000_003


def make_request(
    request_id: str,
    prompt_token_ids: Iterable[int],
    *,
    max_tokens: int = 8,
    seed: int = 1,
    output_token_ids: Iterable[int] = (),
    cache_salt: str = "",
    priority: int = 0,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    stop_token_ids: tuple[int, ...] = (),
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
) -> EngineRequest:
    """A request with what a test does not care about filled in."""
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt_token_ids),
        output_token_ids=tuple(output_token_ids),
        cache_salt=cache_salt,
        priority=priority,
        params=SamplingParams(
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=stop_token_ids,
            num_logprobs=num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
        ),
    )


def kv_of(token_ids: Sequence[int]) -> list[int]:
    """The KV of each position, as a decoder without any cache would compute it."""
    values: list[int] = []
    for position, token_id in enumerate(token_ids):
        values.append(_kv(values[-1] if values else _NO_KV, token_id, position))
    return values


def _kv(previous: int, token_id: int, position: int) -> int:
    return hash((previous, token_id, position))


def next_token(seed: int, context: Sequence[int], *, vocab_size: int) -> int:
    """The token that follows a context, given the KV of all its positions."""
    return hash((seed, *context)) % vocab_size


def token_logprobs(context: Sequence[int], token_id: int) -> TokenLogprobs:
    """Logprobs of a token after a context: made up, but different for each context and token."""
    return TokenLogprobs(-float(hash((token_id, *context)) % 10_000), 1, (token_id,), (-1.0,))


@dataclass(frozen=True)
class Continuation:
    """All that a request's outputs must add up to."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_token_id: int | None


def continuation(
    request: EngineRequest, *, vocab_size: int, eos_token_ids: tuple[int, ...], max_sequence_len: int
) -> Continuation:
    """What a request brings where it is alone, never chunked, never preempted and finds nothing cached."""
    params = request.params
    prompt = list(request.prompt_token_ids)
    token_ids = [*prompt, *request.output_token_ids]
    logprobs: list[TokenLogprobs] = []
    eos = () if params.ignore_eos else eos_token_ids
    while True:
        num_output = len(token_ids) - len(prompt)
        last = token_ids[-1]
        if num_output > params.min_tokens and (last in eos or last in params.stop_token_ids):
            reason, stop_token_id = FinishReason.STOP, None if last in eos else last
            break
        if num_output >= params.max_tokens or len(token_ids) >= max_sequence_len:
            reason, stop_token_id = FinishReason.LENGTH, None
            break
        context = kv_of(token_ids)
        drawn = next_token(params.seed, context, vocab_size=vocab_size)
        logprobs.append(token_logprobs(context, drawn))
        token_ids.append(drawn)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    if params.num_prompt_logprobs is not None and not request.output_token_ids:
        context = kv_of(prompt)
        prompt_logprobs = tuple(token_logprobs(context[:p], prompt[p]) for p in range(1, len(prompt)))
    return Continuation(
        tuple(token_ids[len(prompt) + len(request.output_token_ids) :]),
        tuple(logprobs) if params.num_logprobs is not None else (),
        prompt_logprobs,
        reason,
        stop_token_id,
    )


@dataclass
class _Row:
    start: RowStart
    num_computed_tokens: int
    block_table: tuple[int, ...] = ()


@dataclass
class FakeForward:
    """The contexts of a step, read back from KV memory after it was written."""

    contexts: list[list[int]] = field(default_factory=list)


class FakeRunner:
    """A `ModelRunner` over a Python list. Requests named in `failing` answer with an error."""

    def __init__(self, *, num_kv_blocks: int, block_size: int, vocab_size: int = 50, max_model_len: int = 1024) -> None:
        self.info = RunnerInfo(
            tier="fake",
            tier_reason="a test asked for it",
            device="cpu",
            dtype="none",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            num_kv_blocks=num_kv_blocks,
            block_size=block_size,
            kv_bytes=0,
            weight_bytes=0,
            max_num_batched_tokens=64,
            row_independent=True,
            fingerprint="fake",
        )
        self.failing: set[str] = set()
        self.num_computed_tokens = 0
        """Tokens computed since construction: what sharing prefixes is to keep small."""
        self._kv: list[int | None] = [None] * (num_kv_blocks * block_size)
        self._rows: dict[int, _Row] = {}

    def forward(self, plan: StepPlan) -> FakeForward:
        for row in plan.released_rows:
            del self._rows[row]
        return FakeForward([self._forward_entry(entry) for entry in plan.entries])

    def guesses(self, plan: StepPlan, forward: FakeForward) -> dict[int, int]:
        return {}

    def sample(self, plan: StepPlan, forward: FakeForward, masks: StepMasks | None = None) -> StepResult:
        """It knows no grammars."""
        assert masks is None
        pairs = zip(plan.entries, forward.contexts, strict=True)
        return StepResult(plan.step_id, tuple(self._sample_entry(entry, context) for entry, context in pairs))

    def forget_rows(self) -> None:
        """Another engine takes over the KV memory: rows went with the last one."""
        self._rows.clear()

    def close(self) -> None:
        """Nothing to give back."""

    def _forward_entry(self, entry: PlanEntry) -> list[int]:
        if entry.start_row is not None:
            assert entry.row not in self._rows, "a row began while another sequence has it"
            self._rows[entry.row] = _Row(entry.start_row, entry.start)
        row = self._rows[entry.row]
        num_old = len(entry.block_table) - entry.num_new_blocks
        assert entry.start == row.num_computed_tokens, "a step skipped or repeated tokens"
        assert entry.block_table[:num_old] == row.block_table, "num_new_blocks is not what was appended"
        row.block_table = entry.block_table
        end = entry.start + len(entry.token_ids)
        assert len(entry.block_table) == -(-end // self.info.block_size), "the block table does not cover the step"
        for position, token_id in enumerate(entry.token_ids, start=entry.start):
            previous = self._read(entry, position - 1) if position else _NO_KV
            self._kv[self._slot(entry, position)] = _kv(previous, token_id, position)
        self.num_computed_tokens += len(entry.token_ids)
        row.num_computed_tokens = end - entry.num_draft_tokens
        return [self._read(entry, position) for position in range(end)]

    def _sample_entry(self, entry: PlanEntry, context: list[int]) -> RowResult:
        row = self._rows[entry.row]
        if row.start.request_id in self.failing:
            return RowResult(entry.row, error="logits are not finite")
        prompt_logprobs = self._prompt_logprobs(entry, row, context)
        if not entry.sample:
            return RowResult(entry.row, prompt_logprobs=prompt_logprobs)
        assert entry.logits is not LogitsNeed.NONE, "a token is to be drawn from logits that nobody asked for"
        token_ids, logprobs = self._draw(entry, row, context)
        row.num_computed_tokens += len(token_ids) - 1
        if row.start.params.num_logprobs is None:
            logprobs = []
        return RowResult(entry.row, tuple(token_ids), len(token_ids) - 1, tuple(logprobs), prompt_logprobs)

    def _draw(self, entry: PlanEntry, row: _Row, context: list[int]) -> tuple[list[int], list[TokenLogprobs]]:
        """Draw a token, and one more for each draft that is the token drawn before it."""
        num_known = len(context) - entry.num_draft_tokens
        drafts = entry.token_ids[len(entry.token_ids) - entry.num_draft_tokens :]
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for index in range(entry.num_draft_tokens + 1):
            seen = context[: num_known + index]
            token_ids.append(next_token(row.start.params.seed, seen, vocab_size=self.info.vocab_size))
            logprobs.append(token_logprobs(seen, token_ids[-1]))
            if index < len(drafts) and drafts[index] != token_ids[-1]:
                break
        return token_ids, logprobs

    def _prompt_logprobs(self, entry: PlanEntry, row: _Row, context: list[int]) -> tuple[TokenLogprobs, ...]:
        if entry.logits is not LogitsNeed.ALL:
            return ()
        prompt = row.start.prompt_token_ids
        last = min(len(context), len(prompt) - 1)
        return tuple(token_logprobs(context[:p], prompt[p]) for p in range(entry.start + 1, last + 1))

    def _slot(self, entry: PlanEntry, position: int) -> int:
        block_size = self.info.block_size
        return entry.block_table[position // block_size] * block_size + position % block_size

    def _read(self, entry: PlanEntry, position: int) -> int:
        value = self._kv[self._slot(entry, position)]
        assert value is not None, "a step reads a slot that nobody wrote"
        return value
