"""Builds what the loop needs out of the Start message: runner, scheduler, and the limits to announce."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
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
    eos_token_ids = config.eos_token_ids
    if eos_token_ids is None:
        eos_token_ids = read_eos_token_ids(Path(config.model_dir))
    runner = load_runner(msgspec.structs.replace(config, eos_token_ids=eos_token_ids))
    scheduler_config = _scheduler_config(config, runner.info, eos_token_ids=eos_token_ids)
    limits = _limits(scheduler_config, runner.info, load_seconds=time.monotonic() - began)
    return Engine(runner, Scheduler(scheduler_config), limits, Path(config.model_dir))


def read_eos_token_ids(model_dir: Path) -> tuple[int, ...]:
    """EOS ids of generation_config.json, else of config.json, else none. Raises ConfigurationError."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_bytes()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ConfigurationError(f"{path} is no JSON object ({error}): fetch the model again") from None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(token_id, int) for token_id in ids):
                raise ConfigurationError(f"{path} has eos_token_id = {found!r}, no token id: fetch the model again")
            return tuple(int(token_id) for token_id in ids)
    return ()


def _scheduler_config(config: EngineConfig, info: RunnerInfo, *, eos_token_ids: tuple[int, ...]) -> SchedulerConfig:
    return SchedulerConfig(
        num_kv_blocks=info.num_kv_blocks,
        block_size=info.block_size,
        max_model_len=info.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        min_prefill_tokens=info.block_size,
        vocab_size=info.vocab_size,
        eos_token_ids=eos_token_ids,
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
