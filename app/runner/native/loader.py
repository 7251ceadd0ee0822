"""Builds a NativeRunner from a configuration, or says in one clause why it cannot serve here."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.core.memory import EngineMemory
from app.core.plan import LogitsNeed, PlanEntry, RowStart, StepPlan
from app.core.types import SamplingParams
from app.runner.base import RunnerInfo, TierUnavailable
from app.runner.memory import KVPlan, available_memory, num_cpus, plan_kv
from app.runner.native.arena import Arena
from app.runner.native.blocks import is_in_blocks
from app.runner.native.budget import DEFAULT_TARGET_MS, tokens_for_target
from app.runner.native.build import find_or_build
from app.runner.native.families import ModelShape, read_shape
from app.runner.native.kept_weights import find_or_pack, pack_key
from app.runner.native.levels import Level, choose_level
from app.runner.native.library import Library
from app.runner.native.model import BLOCK_SIZE, NativeModel
from app.runner.native.pool import held_bytes
from app.runner.native.precision import QUANTIZATIONS, precision_of
from app.runner.native.runner import NativeRunner
from app.runner.native.weights import ModelWeights, load_weights
from app.runner.sampling import SAMPLER_EPOCH

KERNEL_EPOCH = 1
"""Part of the fingerprint: raised when the kernels bring other bits on the same level."""
_MOST_THREADS = 32
_AS_IT_IS = "int4"
"""The quantization that keeps the blocks of a .gguf."""


def load(config: EngineConfig, memory: EngineMemory) -> NativeRunner:
    """Load the model for the native tier, or map what an earlier engine left in `memory`.

    Raises TierUnavailable where this tier cannot serve it here, ConfigurationError where no tier can.
    """
    _check_settings(config)
    model_dir = Path(config.model_dir)
    shape = read_shape(model_dir)
    level = choose_level()
    library_path = find_or_build(level)
    library = Library(library_path)
    if config.block_size not in (None, BLOCK_SIZE):  # another tier takes it, and is slower: nobody means that
        raise ConfigurationError(
            f"--block-size {config.block_size}: the native tier, which serves this model here, has blocks of "
            f"{BLOCK_SIZE} tokens and no others; leave it out, or take --tier any"
        )
    num_threads = min(num_cpus(), _MOST_THREADS) if config.num_threads is None else config.num_threads
    quantization = _quantization(config, model_dir)
    precision = precision_of(quantization)
    key = pack_key(model_dir, library_path, quantization)

    def pack(make_arena: Callable[[int], Arena]) -> ModelWeights:
        return load_weights(
            model_dir, shape, library, precision=precision, num_threads=num_threads, make_arena=make_arena
        )

    weights, kept = find_or_pack(memory.weights, key, pack)
    kv = _plan_kv(config, shape, held=held_bytes(memory.kv))
    model = NativeModel(
        shape, weights, num_blocks=kv.num_blocks, max_model_len=kv.max_model_len, kv_descriptor=memory.kv
    )
    kept = msgspec.structs.replace(kept, has_kv=model.pool.is_kept, reason=kept.reason or model.pool.reason)
    info = _info(config, shape, weights, quantization, kv, level, num_threads)

    def runner_of(model: NativeModel, max_num_batched_tokens: int, *, threads: int) -> NativeRunner:
        told = msgspec.structs.replace(info, max_num_batched_tokens=max_num_batched_tokens, kept=kept)
        return NativeRunner(library, model, told, eos_token_ids=config.eos_token_ids, num_threads=threads)

    budget = config.max_num_batched_tokens
    if budget is None:  # measured in a pool of its own: the other may hold what an earlier engine computed
        probe = NativeModel(shape, weights, num_blocks=1, max_model_len=BLOCK_SIZE)
        budget = _measure_budget(runner_of(probe, BLOCK_SIZE, threads=1), config, kv, num_threads=num_threads)
    return runner_of(model, budget, threads=num_threads)


def _check_settings(config: EngineConfig) -> None:
    if config.device not in ("auto", "cpu"):
        raise TierUnavailable(f"it runs on the CPU and the device is {config.device}")
    if config.dtype not in ("auto", "bfloat16"):
        raise TierUnavailable(f"it computes in bfloat16 and the dtype is {config.dtype}", remedy="--dtype auto")
    if config.quantization is not None and config.quantization not in QUANTIZATIONS:
        remedy = f"--quantization {' or '.join(QUANTIZATIONS)}"
        raise TierUnavailable(f"it has no quantization {config.quantization!r}", remedy=remedy)


def _quantization(config: EngineConfig, model_dir: Path) -> str | None:
    """What was asked, or what the folder's weights are."""
    if not is_in_blocks(model_dir):
        return config.quantization
    if config.quantization in (None, _AS_IT_IS):
        return _AS_IT_IS
    raise ConfigurationError(
        f"{model_dir} holds a .gguf as it is, which serves no {config.quantization}: "
        f"--quantization {_AS_IT_IS}, or name the .gguf file"
    )


def _plan_kv(config: EngineConfig, shape: ModelShape, *, held: int) -> KVPlan:
    """`held`: bytes that the pool has already."""
    if config.max_model_len is not None and config.max_model_len > shape.max_positions:
        raise ConfigurationError(
            f"--max-model-len {config.max_model_len} is beyond the model's context of {shape.max_positions} tokens"
        )
    return plan_kv(
        available_bytes=available_memory() + held,
        bytes_per_token=shape.kv_bytes_per_token,
        block_size=BLOCK_SIZE,
        max_model_len=shape.max_positions if config.max_model_len is None else config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        requested_bytes=config.kv_cache_bytes,
        requested_blocks=config.num_kv_blocks,
        is_context_asked=config.max_model_len is not None,
    )


def _info(
    config: EngineConfig,
    shape: ModelShape,
    weights: ModelWeights,
    quantization: str | None,
    kv: KVPlan,
    level: Level,
    num_threads: int,
) -> RunnerInfo:
    """All but the token budget and what is kept."""
    dtype = "bfloat16" if quantization is None else quantization
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    if num_threads > (cores := num_cpus()):
        threads += f" on {cores} core{'s' if cores > 1 else ''} (--num-threads {cores} is faster)"
    return RunnerInfo(
        tier="native",
        tier_reason=f"{shape.model_type} model, {level.name} kernels, {threads}{_blocks(weights)}",
        device="cpu",
        dtype=dtype,
        vocab_size=shape.vocab_size,
        max_model_len=kv.max_model_len,
        num_kv_blocks=kv.num_blocks,
        block_size=BLOCK_SIZE,
        kv_bytes=kv.num_bytes,
        weight_bytes=weights.num_bytes,
        max_num_batched_tokens=BLOCK_SIZE,
        row_independent=True,
        fingerprint=f"native-{level.name}-{dtype}-k{KERNEL_EPOCH}-s{SAMPLER_EPOCH}-"
        f"{weights.digest[:16]}-{_config_digest(config)}",
    )


def _blocks(weights: ModelWeights) -> str:
    """The kinds of blocks, the most frequent first."""
    return f", weights in {' and '.join(weights.block_types)}" if weights.block_types else ""


def _config_digest(config: EngineConfig) -> str:
    """Of config.json: the same weights under another rope_theta are another model."""
    return hashlib.sha256((Path(config.model_dir) / "config.json").read_bytes()).hexdigest()[:8]


def _measure_budget(runner: NativeRunner, config: EngineConfig, kv: KVPlan, *, num_threads: int) -> int:
    """Time prefill steps in the first block of a pool that nobody else uses."""

    def run_step(num_tokens: int) -> None:
        token_ids = tuple(np.random.default_rng(0).integers(0, runner.info.vocab_size, num_tokens).tolist())
        blocks = tuple(range(-(-num_tokens // BLOCK_SIZE)))
        start = RowStart("probe", SamplingParams(seed=0, max_tokens=1, temperature=0.0), token_ids, ())
        entry = PlanEntry(
            row=0, start=0, token_ids=token_ids, num_draft_tokens=0, block_table=blocks, num_new_blocks=len(blocks),
            logits=LogitsNeed.NONE, sample=False, start_row=start,
        )  # fmt: skip
        runner.forward(StepPlan(step_id=0, entries=(entry,)))

    try:
        target_ms = DEFAULT_TARGET_MS if config.target_itl_ms is None else config.target_itl_ms
        return tokens_for_target(run_step, target_ms=target_ms, most_tokens=kv.max_model_len, num_threads=num_threads)
    finally:
        runner.close()
