"""An engine whose answers are what stands in its KV memory: for canaries.

Output token number k is the token that is stored at position k, read through the sequence's block table: the answer
repeats the prompt, unless the engine gave the sequence a block with somebody else's content.
"""

import sys
from typing import Any

import msgspec

import app.engine.__main__ as engine_main
from app.core.config import EngineConfig
from app.core.memory import EngineMemory
from app.core.plan import PlanEntry, RowResult, StepPlan, StepResult
from app.engine.build import Engine, build_engine
from app.runner.base import Forward, RunnerInfo


class ReplayRunner:
    """A `ModelRunner` over one token in each KV slot."""

    def __init__(self, info: RunnerInfo) -> None:
        self.info = info
        self._kv = [-1] * (info.num_kv_blocks * info.block_size)
        self._num_prompt: dict[int, int] = {}

    def forward(self, plan: StepPlan) -> Forward:
        """Store the plan's tokens."""
        for entry in plan.entries:
            if entry.start_row is not None:
                self._num_prompt[entry.row] = len(entry.start_row.prompt_token_ids)
            for position, token_id in enumerate(entry.token_ids, entry.start):
                self._kv[self._slot(entry, position)] = token_id
        return plan

    def guesses(self, plan: StepPlan, forward: Forward) -> dict[int, int]:
        """None."""
        return {}

    def sample(self, plan: StepPlan, forward: Forward, *more: Any) -> StepResult:
        """Read back."""
        return StepResult(plan.step_id, tuple(self._row(entry) for entry in plan.entries))

    def close(self) -> None:
        """Nothing to give back."""

    def _row(self, entry: PlanEntry) -> RowResult:
        if not entry.sample:
            return RowResult(entry.row)
        position = entry.start + len(entry.token_ids) - self._num_prompt[entry.row]
        return RowResult(entry.row, (self._kv[self._slot(entry, position)],))

    def _slot(self, entry: PlanEntry, position: int) -> int:
        size = self.info.block_size
        return entry.block_table[position // size] * size + position % size


def main() -> int:
    """`app.engine` with the scripted tier's runner replaced."""

    def build(config: EngineConfig, memory: EngineMemory) -> Engine:
        engine = build_engine(config, memory)
        return msgspec.structs.replace(engine, runner=ReplayRunner(engine.runner.info))

    setattr(engine_main, "build_engine", build)  # noqa: B010  # for the type checker, which knows it as it was
    return engine_main.main()


if __name__ == "__main__":
    sys.exit(main())
