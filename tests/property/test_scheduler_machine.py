"""Hypothesis looks for a sequence of calls that breaks the scheduler, and shrinks what it finds."""

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from app.core.types import EngineRequest, FinishReason
from tests.fakes import make_request
from tests.property.driver import Driver, make_config
from tests.property.traffic import EOS_TOKEN_IDS, NUM_DOCUMENTS, VOCAB_SIZE, document, handed_over


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, hand-overs, aborts, failures, crashes and steps in any order, on engines of any small size."""

    requests = Bundle("requests")

    @initialize(
        num_kv_blocks=st.integers(1, 16),
        block_size=st.sampled_from([1, 2, 4]),
        max_model_len=st.integers(4, 40),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 32),
        is_caching=st.booleans(),
        lag=st.integers(0, 2),
        draft=st.booleans(),
    )
    def start(
        self,
        num_kv_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        budget: int,
        is_caching: bool,
        lag: int,
        draft: bool,
    ) -> None:
        config = make_config(
            num_kv_blocks=num_kv_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=EOS_TOKEN_IDS,
            enable_prefix_caching=is_caching,
        )
        self.num_added = 0
        self.driver = Driver(config, lag=lag, draft=draft)

    @rule(
        target=requests,
        document_index=st.integers(0, NUM_DOCUMENTS - 1),
        num_shared=st.integers(0, 40),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=3),
        max_tokens=st.integers(0, 12),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        salt=st.sampled_from(["", "tenant"]),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from(["", "a", "b"]),
        num_prompt_logprobs=st.sampled_from([None, None, 1]),
        num_received=st.sampled_from([0, 0, 0, 1, 5, 100]),
        is_on_probation=st.booleans(),
    )
    def add(
        self,
        document_index: int,
        num_shared: int,
        own: list[int],
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        salt: str,
        priority: int,
        tenant: str,
        num_prompt_logprobs: int | None,
        num_received: int,
        is_on_probation: bool,
    ) -> str:
        prompt = [*document(document_index)[:num_shared], *own]
        request = make_request(
            f"request-{self.num_added}",
            prompt[-(self.driver.config.max_sequence_len - 1) :],
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            cache_salt=salt,
            priority=priority,
            num_prompt_logprobs=num_prompt_logprobs,
        )
        request = msgspec.structs.replace(request, tenant=tenant)
        self.num_added += 1
        if self._fits(request):
            request = handed_over(request, num_received, config=self.driver.config)
            self.driver.add(msgspec.structs.replace(request, is_on_probation=is_on_probation))
        else:
            output = self.driver.scheduler.add(request, 0.0)
            assert output is not None and output.finish_reason is FinishReason.ERROR
        return request.request_id

    @rule(request_id=consumes(requests))
    def abort(self, request_id: str) -> None:
        if request_id in self.driver.live_ids:
            self.driver.abort(request_id)
        else:
            assert self.driver.scheduler.abort([request_id]) == 0

    @rule(request_id=requests)
    def fail(self, request_id: str) -> None:
        self.driver.fail(request_id)

    @rule()
    def crash(self) -> None:
        self.driver.crash()

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.driver.step()

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "driver"):
            self.driver.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.run_until_idle()

    def _fits(self, request: EngineRequest) -> bool:
        num_needed = len(request.prompt_token_ids) + min(request.params.max_tokens, 1)
        return num_needed <= self.driver.config.max_sequence_len


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40)
