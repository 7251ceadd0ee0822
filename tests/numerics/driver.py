"""Runs requests through the real scheduler and a runner, and compares token ids with a reference's."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from app.core.types import EngineOutput, EngineRequest, FinishReason, SamplingParams
from app.runner.base import ModelRunner
from app.scheduler.config import SchedulerConfig
from app.scheduler.scheduler import Scheduler

CLOSE = 1e-4
"""Where the reference's two best logits lie nearer than this, another token is allowed (and printed)."""


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(seed=0, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


@dataclass
class Driver:
    """One scheduler over one runner; the prefix cache lives as long as the driver."""

    runner: ModelRunner
    budget: int = 4096
    num_kv_blocks: int | None = None
    max_num_seqs: int = 64
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        info = self.runner.info
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_kv_blocks=info.num_kv_blocks if self.num_kv_blocks is None else self.num_kv_blocks,
                block_size=info.block_size,
                max_model_len=info.max_model_len,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.budget,
                vocab_size=info.vocab_size,
            )
        )

    def run(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[int]]:
        """Output ids of each prompt, all submitted at once."""
        outputs = self.run_outputs(prompts, params)
        return [[token_id for output in one for token_id in output.token_ids] for one in outputs]

    def run_outputs(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[EngineOutput]]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        outputs: dict[str, list[EngineOutput]] = {str(index): [] for index in range(len(prompts))}
        for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            request = EngineRequest(request_id=str(index), prompt_token_ids=tuple(prompt), params=one)
            assert self.scheduler.add(request, 0.0) is None
        while self.scheduler.has_work:
            plan = self.scheduler.schedule(0.0)
            assert plan is not None, "the scheduler has work and plans none"
            result = self.runner.sample(plan, self.runner.forward(plan))
            for output in self.scheduler.apply(plan, result, 0.0):
                outputs[output.request_id].append(output)
        for one_outputs in outputs.values():
            assert one_outputs[-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP), one_outputs[-1].error
        return list(outputs.values())


def assert_same(got: Sequence[int], expected: Sequence[int], margins: Sequence[float], *, what: str) -> None:
    """Equal up to the first position, if any, where the reference itself was nearly undecided."""
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        if one != other:
            assert margins[index] < CLOSE, f"{what}: token {index} is {one}, the reference's {other}"
            print(f"{what}: parted at token {index}, margin {margins[index]:.1e}")  # noqa: T201
            return
