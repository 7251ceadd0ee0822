"""Builds what the loop needs out of the Start message: runner, scheduler, and the limits to announce."""

import logging
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import msgspec

from app.core.config import EngineConfig
from app.core.memory import EngineMemory, KeptMemory
from app.core.types import EngineLimits
from app.grammar.constraints import Constraints
from app.kv.record import KEY_BYTES, BlockRecord
from app.runner.base import ModelRunner, RunnerInfo
from app.runner.choose import load_runner
from app.scheduler import Scheduler, SchedulerConfig

logger = logging.getLogger("headwater.engine")


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


def build_engine(config: EngineConfig, memory: EngineMemory | None = None) -> Engine:
    """Load the model, or find it in `memory`. Raises ConfigurationError where a restart would fail the same way."""
    began = time.monotonic()
    memory = EngineMemory() if memory is None else memory
    runner = load_runner(config, memory)
    scheduler_config = _scheduler_config(config, runner.info)
    record = _open_record(memory, runner.info)
    scheduler = Scheduler(scheduler_config, record=record)
    # Without a record nobody takes out the entries of blocks that are written anew: nothing of the pool may be kept.
    kept = msgspec.structs.replace(
        runner.info.kept, has_kv=record is not None, num_adopted_blocks=scheduler.num_adopted_blocks
    )
    limits = _limits(scheduler_config, runner.info, kept, load_seconds=time.monotonic() - began)
    return Engine(runner, scheduler, limits, Path(config.model_dir))


def _open_record(memory: EngineMemory, info: RunnerInfo) -> BlockRecord | None:
    """The record of a pool that outlives engines; None where this one's does not."""
    if memory.blocks is None or not info.kept.has_kv:
        return None
    facts = f"{info.fingerprint} {info.num_kv_blocks} {info.block_size} {info.kv_bytes}"
    key = blake2b(facts.encode(), digest_size=KEY_BYTES).digest()
    try:
        return BlockRecord.open(memory.blocks, info.num_kv_blocks, key=key)
    except OSError as error:
        logger.warning("sealed KV blocks are not recorded for the next engine: %s", error)
        return None


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


def _limits(config: SchedulerConfig, info: RunnerInfo, kept: KeptMemory, *, load_seconds: float) -> EngineLimits:
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
        kept=kept,
    )
