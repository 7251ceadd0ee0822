"""Puts the figures of a step together. Pure."""

import msgspec

from app.core.plan import StepPlan
from app.core.types import StepStats
from app.scheduler import SchedulerCounts


class StepWork(msgspec.Struct, frozen=True):
    """What a step computed. Nothing: a message between steps, with the last step's id and 0 seconds."""

    step_id: int
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    seconds: float = 0.0


def count_work(plan: StepPlan, seconds: float) -> StepWork:
    """An entry that samples from one token decodes; all other tokens are prefill."""
    num_decode_tokens = sum(1 for entry in plan.entries if entry.sample and len(entry.token_ids) == 1)
    return StepWork(plan.step_id, plan.num_tokens - num_decode_tokens, num_decode_tokens, seconds)


def step_stats(work: StepWork, counts: SchedulerCounts, *, num_kv_blocks: int) -> StepStats:
    """The figures that go with a step's outputs."""
    return StepStats(
        step_id=work.step_id,
        step_seconds=work.seconds,
        num_prefill_tokens=work.num_prefill_tokens,
        num_decode_tokens=work.num_decode_tokens,
        num_running=counts.num_running,
        num_waiting=counts.num_waiting,
        num_kv_blocks_used=counts.num_kv_blocks_used,
        num_kv_blocks=num_kv_blocks,
        total_preemptions=counts.total_preemptions,
        total_prefix_query_tokens=counts.total_prefix_query_tokens,
        total_prefix_hit_tokens=counts.total_prefix_hit_tokens,
        num_kv_blocks_shared=counts.num_kv_blocks_shared,
        num_kv_blocks_cached=counts.num_kv_blocks_cached,
    )
