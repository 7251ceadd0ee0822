"""From a model folder to a transformers model in memory, on a device, in a dtype.

Weights come from safetensors alone, nothing is unpickled, no code of the folder runs, and nobody asks
the network.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.runner.base import TierUnavailable
from app.runner.memory import num_cpus
from app.runner.torch.attention.interface import PAGED, register
from app.runner.torch.card import BFLOAT16_CAPABILITY, check_room
from app.runner.torch.families import check_family
from app.runner.torch.linear import pack_linears

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be called, and how it came to be."""

    model: PreTrainedModel
    config: PreTrainedConfig
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    weight_bytes: int
    num_packed: int
    """Linear layers packed for the CPU; 0 where packing is not used."""


def load_model(config: EngineConfig, device: torch.device, *, packs_linears: bool = True) -> LoadedModel:
    """Check and load; `packs_linears` where the device is a CPU.

    Raises TierUnavailable where this runner cannot serve it, ConfigurationError where the settings contradict
    each other.
    """
    if config.quantization is not None:
        raise TierUnavailable(f"it does not quantize (asked: {config.quantization})", remedy="leave out --quantization")
    folder = Path(config.model_dir)
    if (folder / "model.gguf.index.json").is_file():
        raise TierUnavailable("it does not read the blocks of a .gguf", remedy="name the .gguf without --quantization")
    model_config = read_config(folder)
    check_family(model_config)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    dtype, reason = choose_dtype(config.dtype, model_config, device, capability=capability)
    set_threads(config, device)
    model = _read_weights(folder, model_config, dtype)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    num_packed = pack_linears(model, dtype) if packs_linears and device.type == "cpu" else 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        check_room(weight_bytes, free=free, total=total, card=torch.cuda.get_device_name(device))
    placed: Any = model
    placed.to(device)
    return LoadedModel(model.eval(), model_config, device, dtype, reason, weight_bytes, num_packed)


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json as transformers understands it, without the code that it may name."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = f"transformers {transformers.__version__} does not read its config.json ({_first_line(error)})"
        raise TierUnavailable(reason) from error


def choose_dtype(
    asked: str, config: PreTrainedConfig, device: torch.device, *, capability: tuple[int, int] | None = None
) -> tuple[torch.dtype, str]:
    """The dtype of weights, activations and KV, and why; `capability` is a card's compute capability."""
    lacks_bfloat16 = capability is not None and capability < BFLOAT16_CAPABILITY
    if asked != "auto":
        if asked not in _DTYPES:
            raise ConfigurationError(f"unknown dtype {asked!r}: choose one of auto, {', '.join(_DTYPES)}")
        if asked == "float16" and device.type == "cpu":
            raise ConfigurationError("float16 is slow and overflows on a CPU: use --dtype bfloat16 or float32")
        if asked == "bfloat16" and capability is not None and lacks_bfloat16:
            raise ConfigurationError(
                f"this card (compute capability {capability[0]}.{capability[1]}) has no bfloat16 arithmetic: "
                "use --dtype float16 or float32"
            )
        return _DTYPES[asked], "as asked"
    checkpoint = getattr(config.get_text_config(), "dtype", None) or torch.float32
    if checkpoint == torch.bfloat16 and device.type == "cpu" and not has_fast_bfloat16():
        return torch.float32, "this CPU has no bfloat16 arithmetic"
    if checkpoint == torch.bfloat16 and lacks_bfloat16:
        return torch.float32, "this card has no bfloat16 arithmetic"
    if checkpoint == torch.float16 and device.type == "cpu":
        return torch.float32, "the checkpoint's float16 is slow on a CPU"
    if checkpoint not in _DTYPES.values():
        return torch.float32, f"the checkpoint's {checkpoint} is not served"
    return checkpoint, "the checkpoint's"


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware. The questions are private to torch: no answer is no."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(ask() for name in questions if (ask := getattr(torch.cpu, name, None)) is not None)


def set_threads(config: EngineConfig, device: torch.device) -> None:
    """Intra-op threads: as asked, else one on small machines, where a second only waits for a busy core."""
    cpus = num_cpus()
    default = 1 if cpus <= 2 or device.type != "cpu" else cpus - 1
    torch.set_num_threads(default if config.num_threads is None else config.num_threads)


def _read_weights(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    register()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=PAGED,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except OSError as error:
        raise ConfigurationError(f"the weights in {folder} do not load: {_first_line(error)}") from error
    model.requires_grad_(False)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
