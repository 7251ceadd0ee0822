"""How long a decode step of the scheduler takes, alone: schedule + apply, with a result made up beforehand.

    python -m loadtest.bench_scheduler [--sequences 256] [--context 1024] [--steps 500]

Prints the median and the 99th percentile in milliseconds. The goal is a median under 0.5 ms for 256 sequences.
"""

import argparse
import statistics
import sys
import time

from app.core.plan import RowResult, StepPlan, StepResult
from app.core.types import EngineRequest, SamplingParams
from app.scheduler import Scheduler, SchedulerConfig


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time schedule + apply over decoding sequences.")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--block-size", type=int, default=64)
    args = parser.parse_args()
    scheduler = _decoding_scheduler(args.sequences, context=args.context, steps=args.steps, block_size=args.block_size)
    times = sorted(_timed_step(scheduler) * 1e3 for _ in range(args.steps))
    sys.stdout.write(
        f"schedule + apply, {args.sequences} sequences of {args.context}+ tokens, blocks of {args.block_size}: "
        f"median {statistics.median(times):.3f} ms, p99 {times[int(len(times) * 0.99)]:.3f} ms\n"
    )


def _decoding_scheduler(num_sequences: int, *, context: int, steps: int, block_size: int) -> Scheduler:
    """A scheduler whose sequences all have their prompts computed."""
    blocks_per_sequence = -(-(context + steps + 2) // block_size)
    config = SchedulerConfig(
        num_kv_blocks=num_sequences * blocks_per_sequence,
        block_size=block_size,
        max_model_len=blocks_per_sequence * block_size,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=num_sequences * context,
        vocab_size=50_000,
        eos_token_ids=(0, 2),
    )
    scheduler = Scheduler(config)
    params = SamplingParams(seed=1, max_tokens=steps + 2)
    for index in range(num_sequences):
        prompt = tuple((index * 31 + position * 7) % 49_000 + 3 for position in range(context))
        scheduler.add(EngineRequest(request_id=f"request-{index}", prompt_token_ids=prompt, params=params), 0.0)
    _timed_step(scheduler)
    if scheduler.counts().num_running != num_sequences:
        raise RuntimeError(f"{scheduler.counts().num_running} sequences run instead of {num_sequences}")
    return scheduler


def _timed_step(scheduler: Scheduler) -> float:
    """One step; returns the seconds that the scheduler took of it."""
    begin = time.perf_counter()
    plan = scheduler.schedule(0.0)
    planned = time.perf_counter()
    if plan is None:
        raise RuntimeError("the scheduler has no work: raise --steps or lower them")
    result = _result(plan)
    answered = time.perf_counter()
    scheduler.apply(plan, result, 0.0)
    return planned - begin + time.perf_counter() - answered


def _result(plan: StepPlan) -> StepResult:
    token = (plan.step_id * 13) % 49_000 + 3
    return StepResult(plan.step_id, tuple(RowResult(entry.row, (token,)) for entry in plan.entries))


if __name__ == "__main__":
    main()
