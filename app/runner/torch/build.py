"""From a configuration to a running TorchRunner: what the tiers `any` and `cuda` share."""

from pathlib import Path
from typing import Any

import torch

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.runner.base import RunnerInfo, TierUnavailable
from app.runner.memory import KVPlan, available_memory, plan_kv
from app.runner.sampling import SAMPLER_EPOCH
from app.runner.torch.attention.split import RowAttention, attend_rows
from app.runner.torch.check import Probed, check_against_transformers, check_rows, measure_token_budget, probe_model
from app.runner.torch.digest import weights_digest
from app.runner.torch.executor import Executor
from app.runner.torch.families import VERIFIED, context_length
from app.runner.torch.head import FixedHead, Head, OutputHead
from app.runner.torch.kv_cache import KVCache, LayerShape, bytes_per_token
from app.runner.torch.loading import LoadedModel, load_model
from app.runner.torch.packing import ChunkPacker, Packer
from app.runner.torch.rows import DecodePacker, RowPacker
from app.runner.torch.runner import TorchRunner
from app.runner.torch.sampling.batch import DeviceSampler
from app.runner.torch.sizes import DECODE_SIZES, FIXED_ROWS

KERNEL_EPOCH = 1
"""Part of the fingerprint: raised when this code would bring other tokens from the same weights."""

_BLOCK_SIZES = {"cpu": 64, "cuda": 16}
_TARGET_ITL_MS = {"cpu": 250.0, "cuda": 50.0}
_ROW_DEPENDENT = "rows not independent: a prefill chunk and a decode step add up in different orders"


def build_runner(config: EngineConfig, *, tier: str, device: torch.device, reason: str) -> TorchRunner:
    """Load, check, measure. Raises TierUnavailable or ConfigurationError, with the reason."""
    loaded = load_model(config, device)
    probed = probe_model(loaded.model, device)
    kv_plan = _plan_kv(config, loaded, probed.layers)
    executor = make_executor(config, loaded, probed, kv_plan)
    if loaded.config.model_type not in VERIFIED:
        check_against_transformers(executor, loaded.model)
    independence = _ROW_DEPENDENT
    if config.deterministic:
        check_rows(executor)
        independence = f"rows independent: every pass has {FIXED_ROWS[device.type]} rows, --deterministic"
    budget = config.max_num_batched_tokens
    if budget is None:
        target_ms = _TARGET_ITL_MS[device.type] if config.target_itl_ms is None else config.target_itl_ms
        budget = measure_token_budget(executor, target_ms=target_ms, limits=kv_plan, max_num_seqs=config.max_num_seqs)
    dtype = str(loaded.dtype).removeprefix("torch.")
    info = RunnerInfo(
        tier=tier,
        tier_reason=f"{reason}, dtype {loaded.dtype_reason}; {independence}",
        device=str(device),
        dtype=dtype,
        vocab_size=probed.vocab_size,
        max_model_len=kv_plan.max_model_len,
        num_kv_blocks=kv_plan.num_blocks,
        block_size=kv_plan.block_size,
        kv_bytes=kv_plan.num_bytes,
        weight_bytes=loaded.weight_bytes,
        max_num_batched_tokens=budget,
        row_independent=config.deterministic,
        fingerprint=_fingerprint(config, loaded, tier=tier, dtype=dtype),
    )
    return TorchRunner(executor, info=info, eos_token_ids=config.eos_token_ids, sampler=_device_sampler(config, device))


def _plan_kv(config: EngineConfig, loaded: LoadedModel, layers: tuple[LayerShape, ...]) -> KVPlan:
    context = context_length(loaded.config)
    if config.max_model_len is not None and config.max_model_len > context:
        raise ConfigurationError(
            f"--max-model-len {config.max_model_len} is more than the model's context of {context} tokens: lower it"
        )
    block_size = _BLOCK_SIZES[loaded.device.type] if config.block_size is None else config.block_size
    return plan_kv(
        available_bytes=_available_bytes(loaded.device),
        bytes_per_token=bytes_per_token(layers, loaded.dtype),
        block_size=block_size,
        max_model_len=context if config.max_model_len is None else config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        requested_bytes=config.kv_cache_bytes,
        requested_blocks=config.num_kv_blocks,
        is_context_asked=config.max_model_len is not None,
    )


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()


def make_executor(
    config: EngineConfig,
    loaded: LoadedModel,
    probed: Probed,
    kv_plan: KVPlan,
    *,
    attend_rows: RowAttention = attend_rows,
) -> Executor:
    """The model behind its packer: shapes that follow the plan, or one shape for all where rows are to be equal."""
    kv_cache = KVCache(
        probed.layers,
        num_blocks=kv_plan.num_blocks,
        block_size=kv_plan.block_size,
        dtype=loaded.dtype,
        device=loaded.device,
    )
    head: Head | None = probed.head
    packer: Packer = ChunkPacker(kv_cache, device=loaded.device)
    if config.deterministic or loaded.device.type != "cpu":
        sizes = _sizes(config, loaded.device)
        rows = RowPacker(kv_cache, device=loaded.device, sizes=sizes, max_model_len=kv_plan.max_model_len)
        packer = rows if config.deterministic else DecodePacker(rows, packer)
    if config.deterministic:
        head = _fixed_head(loaded, probed.head)
    return Executor(
        loaded.model,
        head=head,
        kv_cache=kv_cache,
        packer=packer,
        vocab_size=probed.vocab_size,
        attend_rows=attend_rows,
    )


def _sizes(config: EngineConfig, device: torch.device) -> tuple[int, ...]:
    """Numbers of rows of passes and draws in static shapes."""
    return (FIXED_ROWS[device.type],) if config.deterministic else DECODE_SIZES


def _device_sampler(config: EngineConfig, device: torch.device) -> DeviceSampler | None:
    return None if device.type == "cpu" else DeviceSampler(_sizes(config, device), device)


def _fixed_head(loaded: LoadedModel, head: OutputHead | None) -> Head:
    """For the deterministic mode, as which the experts are set too: no product's shape follows the plan then."""
    if head is None:
        raise TierUnavailable(
            f"the head of {loaded.config.model_type} does not split off, so the shape of its product follows the batch",
            remedy="leave out --deterministic",
        )
    model: Any = loaded.model
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the others' products follow the router
    return FixedHead(head, FIXED_ROWS[loaded.device.type])


def _fingerprint(config: EngineConfig, loaded: LoadedModel, *, tier: str, dtype: str) -> str:
    kernels = f"{torch.backends.cpu.get_cpu_capability().lower()}-p{int(loaded.num_packed > 0)}"
    if loaded.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(loaded.device)
        kernels = f"sm{major}{minor}"
    version = torch.__version__.partition("+")[0]
    return (
        f"{tier}-{kernels}{'-fixed' if config.deterministic else ''}-torch{version}-{dtype}-k{KERNEL_EPOCH}-"
        f"s{SAMPLER_EPOCH}-{weights_digest(Path(config.model_dir))}"
    )
