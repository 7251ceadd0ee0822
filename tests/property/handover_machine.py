"""Hypothesis looks for an order of requests, steps, deaths, aborts and resumptions that a client would notice.

`python -m loadtest faults machine` runs it for long.
"""

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.fakes import make_request
from tests.property.driver import make_config
from tests.property.handover_world import World
from tests.property.traffic import EOS_TOKEN_IDS, NUM_DOCUMENTS, VOCAB_SIZE, document


class HandOverMachine(RuleBasedStateMachine):
    """Scheduler, pool and journal, on engines of any small size."""

    requests = Bundle("requests")
    totals: Counter[str] | None = None
    """Where given: what happened, summed over all machines."""

    @initialize(
        num_kv_blocks=st.integers(4, 16),
        block_size=st.sampled_from([1, 2, 4]),
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
        max_num_seqs: int,
        budget: int,
        is_caching: bool,
        lag: int,
        draft: bool,
    ) -> None:
        config = make_config(
            num_kv_blocks=num_kv_blocks,
            block_size=block_size,
            max_model_len=32,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=EOS_TOKEN_IDS,
            enable_prefix_caching=is_caching,
        )
        self.world = World(config, lag=lag, draft=draft)

    @rule(
        target=requests,
        document_index=st.integers(0, NUM_DOCUMENTS - 1),
        num_shared=st.integers(0, 20),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=3),
        max_tokens=st.integers(0, 12),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        num_logprobs=st.sampled_from([None, 1]),
        num_prompt_logprobs=st.sampled_from([None, None, 1]),
        is_poison=st.sampled_from([False, False, False, False, True]),
    )
    def add(
        self,
        document_index: int,
        num_shared: int,
        own: list[int],
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        num_logprobs: int | None,
        num_prompt_logprobs: int | None,
        is_poison: bool,
    ) -> str:
        prompt = [*document(document_index)[:num_shared], *own]
        request = make_request(
            "",
            prompt[-(self.world.config.max_sequence_len - 1) :],
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            num_logprobs=num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
        )
        self._count("requests")
        return self.world.add(request, is_poison=is_poison)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @rule(count=st.integers(1, 8))
    def receive(self, count: int) -> None:
        self.world.receive(count)

    @rule(request_id=requests)
    def consume(self, request_id: str) -> None:
        if request_id in self.world.clients:
            self.world.consume(request_id)

    @rule()
    def killed_from_outside(self) -> None:
        self.world.die(is_self_inflicted=False)

    @rule(request_id=consumes(requests))
    def abort(self, request_id: str) -> None:
        if request_id in self.world.clients:
            self._count("aborted")
            self.world.abort(request_id)

    @rule(target=requests, request_id=consumes(requests), hands_back=st.booleans())
    def resume(self, request_id: str, hands_back: bool) -> str:
        client = self.world.clients.get(request_id)
        if client is None or client.is_over:
            return request_id
        return self.world.resume(request_id, hands_back=hands_back)

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "world"):
            self._count("rules")
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run_until_idle()
            world = self.world
            for name, count in (
                ("steps", world.num_steps),
                ("deaths", world.num_deaths),
                ("resumed", world.num_resumed),
                ("tokens lost on the wire", world.num_lost),
                ("convicted", sum(bool(client.error) for client in world.clients.values())),
            ):
                self._count(name, count)

    def _count(self, name: str, count: int = 1) -> None:
        if self.totals is not None:
            self.totals[name] += count


def run_machine(*, num_examples: int, num_rules: int = 40) -> "Counter[str]":
    """Many machines; what happened. Raises what a machine raises, shrunk."""
    totals: Counter[str] = Counter()
    machine = type("Counted", (HandOverMachine,), {"totals": totals})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=num_rules,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return totals
