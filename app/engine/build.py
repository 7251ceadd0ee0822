"""Builds what the loop needs out of the Start message: runner, scheduler, and the limits to announce."""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from app.core.config import EngineConfig
from app.core.types import EngineLimits
from app.grammar.constraints import Constraints
from app.runner.base import ModelRunner, RunnerInfo
from app.runner.choose import load_runner
from app.scheduler import Scheduler, SchedulerConfig


class Engine(msgspec.Struct, frozen=True):
    """A loaded engine."""

    runner: ModelRunner
    scheduler: Scheduler
    limits: EngineLimits
    model_dir: Path

    def grammars(self, *, wake: Callable[[], None], note_preparing: Callable[[str | None], None]) -> Constraints:
        """The grammars of its sequences; see `Constraints` for what is called from another thread."""
        limits = self.limits
        return Constraints(
            self.model_dir,
            vocab_size=limits.vocab_size,
            eos_token_ids=limits.eos_token_ids,
            wake=wake,
            note_preparing=note_preparing,
        )


def build_engine(config: EngineConfig) -> Engine:
    """Load the model. Raises ConfigurationError where a restart would fail the same way."""
    began = time.monotonic()
    runner = load_runner(config)
    scheduler_config = _scheduler_config(config, runner.info)
    limits = _limits(scheduler_config, runner.info, load_seconds=time.monotonic() - began)
    return Engine(runner, Scheduler(scheduler_config), limits, Path(config.model_dir))


def _scheduler_config(config: EngineConfig, info: RunnerInfo) -> SchedulerConfig:
    return SchedulerConfig(
        num_kv_blocks=info.num_kv_blocks,
        block_size=info.block_size,
        max_model_len=info.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        min_prefill_tokens=info.block_size,
        vocab_size=info.vocab_size,
        eos_token_ids=config.eos_token_ids,
        enable_prefix_caching=config.enable_prefix_caching,
    )


def _limits(config: SchedulerConfig, info: RunnerInfo, *, load_seconds: float) -> EngineLimits:
    return EngineLimits(
        max_model_len=config.max_sequence_len,
        vocab_size=info.vocab_size,
        eos_token_ids=config.eos_token_ids,
        num_kv_blocks=info.num_kv_blocks,
        block_size=info.block_size,
        kv_bytes=info.kv_bytes,
        weight_bytes=info.weight_bytes,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        device=info.device,
        dtype=info.dtype,
        tier=info.tier,
        tier_reason=info.tier_reason,
        row_independent=info.row_independent,
        fingerprint=info.fingerprint,
        load_seconds=load_seconds,
    )
