"""An engine client in the API process that says what its script says: for tests of everything around it.

It keeps to the protocol: a sequence ends with a finish reason, closing the iterator aborts it. Tests in
another thread steer it by plain attributes, which it reads at each step.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from app.client.engine_client import EngineState, EngineStatus
from app.core.errors import EngineFailed, EngineUnavailable
from app.core.types import EngineLimits, EngineOutput, EngineRequest, FinishReason, StepStats, TokenLogprobs

END = 1
"""The EOS id of the tokenizer in `tests.text_tokenizers.byte_level`."""


def fake_limits(*, vocab_size: int, max_model_len: int = 256) -> EngineLimits:
    """Limits of a small model."""
    return EngineLimits(
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=(END,),
        num_kv_blocks=64,
        block_size=16,
        kv_bytes=0,
        weight_bytes=0,
        max_num_seqs=64,
        max_num_batched_tokens=64,
        device="cpu",
        dtype="float32",
        tier="scripted",
        tier_reason="a test",
        row_independent=True,
        fingerprint="fp-test",
        load_seconds=0.0,
    )


def fake_logprobs(token_id: int, position: int, count: int, vocab_size: int) -> TokenLogprobs:
    """Made-up log-probabilities: at even positions the token itself is the most likely one."""
    best = -0.1 - token_id / 1000
    if position % 2 == 0:
        top = [token_id, (token_id + 1) % vocab_size, (token_id + 2) % vocab_size]
        own, rank = best, 1
    else:
        top = [(token_id + 1) % vocab_size, token_id, (token_id + 2) % vocab_size]
        own, rank = best - 1, 2
    top += [(token_id + more) % vocab_size for more in range(3, count)]
    return TokenLogprobs(own, rank, tuple(top[:count]), tuple(best - index for index in range(len(top)))[:count])


@dataclass
class FakeEngine:
    """Outputs `script`, then EOS, one token a step; after tokens that were handed over it goes on behind them."""

    script: tuple[int, ...]
    limits_when_ready: EngineLimits
    state: EngineState = EngineState.READY
    generation: int = 1
    tokens_per_output: int = 1
    num_cached_tokens: int = 0
    queue_seconds: float | None = 0.001
    hold_at: int | None = None
    """Output tokens after which every sequence waits until this is None again."""
    fail_at: int | None = None
    """Output tokens after which every sequence fails in the way of `failure`."""
    failure: str = "output"
    """output (an error output), raise, unavailable, abort, or defect (an exception of no known class)."""
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    live: set[str] = field(default_factory=set)
    num_steps: int = 0

    @property
    def status(self) -> EngineStatus:
        stats = StepStats(self.num_steps, 0.001, 0, 1, len(self.live), 0, len(self.live), 64, 3, 100, 40)
        return EngineStatus(
            self.state,
            self.generation,
            "as the test says",
            stats,
            len(self.live),
            takes_requests=self.state is EngineState.READY,
        )

    @property
    def limits(self) -> EngineLimits | None:
        return None if self.state is EngineState.STARTING else self.limits_when_ready

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        if self.state is not EngineState.READY:
            raise EngineUnavailable("no engine")
        self.requests.append(request)
        self.live.add(request.request_id)
        finished = False
        try:
            async for output in self._outputs(request):
                finished = output.finish_reason is not None
                if finished:
                    self.live.discard(request.request_id)
                yield output
        except _EndsByOutput:
            finished = True
            self.live.discard(request.request_id)
            reason = FinishReason.ABORT if self.failure == "abort" else FinishReason.ERROR
            yield EngineOutput(request.request_id, finish_reason=reason, error="The logits are not finite.")
        finally:
            self.live.discard(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)

    async def _outputs(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        params = request.params
        for part in self._prompt_logprobs(request):
            yield EngineOutput(request.request_id, prompt_logprobs=part)
        await self._pass(0)
        if params.max_tokens == 0:
            yield self._output(request, (), 0, FinishReason.LENGTH)
            return
        made = len(request.output_token_ids)
        while True:
            batch: list[int] = []
            reason: FinishReason | None = None
            while len(batch) < self.tokens_per_output and reason is None:
                token_id = self._next(request, made)
                batch.append(token_id)
                made += 1
                reason = self._finish(request, token_id, made)
            self.num_steps += 1
            yield self._output(request, tuple(batch), made, reason)
            if reason is not None:
                return
            await self._pass(made)

    async def _pass(self, made: int) -> None:
        while self.hold_at is not None and made >= self.hold_at:  # noqa: ASYNC110  # set by another thread
            await asyncio.sleep(0.002)
        await asyncio.sleep(0)
        if self.fail_at is not None and made >= self.fail_at:
            self._fail()

    def _fail(self) -> None:
        if self.failure == "raise":
            raise EngineFailed("The test fails this request.")
        if self.failure == "unavailable":
            raise EngineUnavailable("The test took the engine away.", retry_after=7)
        if self.failure == "defect":
            raise ZeroDivisionError("a secret of the server")
        raise _EndsByOutput

    def _next(self, request: EngineRequest, made: int) -> int:
        params = request.params
        if made < len(self.script):
            return self.script[made]
        can_end = made >= params.min_tokens and not params.ignore_eos
        return END if can_end else self.script[made % len(self.script)]

    def _finish(self, request: EngineRequest, token_id: int, made: int) -> FinishReason | None:
        params = request.params
        if made > params.min_tokens and (token_id in params.stop_token_ids or self._is_end(request, token_id)):
            return FinishReason.STOP
        return FinishReason.LENGTH if made == params.max_tokens else None

    def _is_end(self, request: EngineRequest, token_id: int) -> bool:
        return token_id == END and not request.params.ignore_eos

    def _output(
        self, request: EngineRequest, token_ids: tuple[int, ...], made: int, reason: FinishReason | None
    ) -> EngineOutput:
        params, size = request.params, self.limits_when_ready.vocab_size
        logprobs: tuple[TokenLogprobs, ...] = ()
        if params.num_logprobs is not None:
            first = len(request.prompt_token_ids) + made - len(token_ids)
            logprobs = tuple(
                fake_logprobs(token_id, first + index, params.num_logprobs, size)
                for index, token_id in enumerate(token_ids)
            )
        last = token_ids[-1] if token_ids else None
        stop = last if reason is FinishReason.STOP and last in params.stop_token_ids else None
        return EngineOutput(
            request.request_id,
            token_ids,
            logprobs,
            finish_reason=reason,
            stop_token_id=stop,
            num_cached_tokens=self.num_cached_tokens,
            queue_seconds=self.queue_seconds,
        )

    def _prompt_logprobs(self, request: EngineRequest) -> list[tuple[TokenLogprobs, ...]]:
        """In two prefill chunks."""
        count, size = request.params.num_prompt_logprobs, self.limits_when_ready.vocab_size
        if count is None:
            return []
        ids = request.prompt_token_ids
        entries = [fake_logprobs(ids[position], position, count, size) for position in range(1, len(ids))]
        half = len(entries) // 2
        return [tuple(entries[:half]), tuple(entries[half:])]

    async def start(self) -> None:
        self.state = EngineState.READY

    async def wait_ready(self, timeout: float) -> EngineLimits:
        return self.limits_when_ready

    async def drain(self, timeout: float) -> None:
        self.state = EngineState.DRAINING

    async def stop(self) -> None:
        self.state = EngineState.FAILED


class _EndsByOutput(Exception):
    """The sequence ends by an output that says so."""
