"""Picks the tier that serves a model here. A tier's module is imported when its turn comes, never before.

`auto` prefers an NVIDIA device to the CPU: the torch tier on it is far faster than any CPU.

Invariant: a tier that is skipped is named in one log line, with the reason and what would enable it.
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import msgspec

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.core.memory import EngineMemory
from app.runner.base import ModelRunner, TierUnavailable

logger = logging.getLogger("headwater.runner")

AUTO_ORDER = ("native", "cuda", "any")
"""Without an NVIDIA device."""
DEVICE_ORDER = ("cuda", "native", "any")
"""With one, unless the CPU was asked for."""
TIER_MODULES: Mapping[str, str] = {
    "native": "app.runner.native",
    "cuda": "app.runner.torch.cuda_tier",
    "any": "app.runner.torch.any_tier",
    "scripted": "app.runner.scripted",
}
"""Each module has `load(config, memory) -> ModelRunner`; a tier that keeps nothing leaves the memory alone."""


class SkippedTier(msgspec.Struct, frozen=True):
    """A tier that could not serve, for people."""

    tier: str
    reason: str
    remedy: str | None

    def __str__(self) -> str:
        return f"{self.tier}: {self.reason}" + ("" if self.remedy is None else f"; {self.remedy}")


def has_nvidia_device(root: Path = Path("/")) -> bool:
    """Whether the driver shows a device, as far as that can be told without its libraries."""
    devices = root / "proc/driver/nvidia/gpus"
    return (root / "dev/nvidiactl").exists() or (devices.is_dir() and any(devices.iterdir()))


def auto_order(config: EngineConfig, *, has_device: Callable[[], bool] = has_nvidia_device) -> tuple[str, ...]:
    """The tiers that `auto` tries, in order."""
    if config.device == "cpu" or not has_device():
        return AUTO_ORDER
    logger.info("an NVIDIA device is here: tier cuda is tried first; --device cpu leaves it alone")
    return DEVICE_ORDER


def load_runner(config: EngineConfig, memory: EngineMemory | None = None) -> ModelRunner:
    """Load the model with the tier that was asked for, or with the first that can, into `memory` where it can.

    Raises ConfigurationError where none can, with the reasons and remedies.
    """
    memory = EngineMemory() if memory is None else memory
    if config.tier != "auto":
        return _load_named(config, memory)
    skipped: list[SkippedTier] = []
    for tier in auto_order(config):
        try:
            return _load_tier(tier, config, memory)
        except TierUnavailable as unavailable:
            skipped.append(SkippedTier(tier, unavailable.reason, unavailable.remedy))
            logger.info("tier skipped: %s", skipped[-1])
    raise ConfigurationError(f"no tier can serve {config.model_dir}: " + "; ".join(map(str, skipped)))


def _load_named(config: EngineConfig, memory: EngineMemory) -> ModelRunner:
    if config.tier not in TIER_MODULES:
        names = ", ".join(("auto", *TIER_MODULES))
        raise ConfigurationError(f"unknown tier {config.tier!r}: choose one of {names}")
    try:
        return _load_tier(config.tier, config, memory)
    except TierUnavailable as unavailable:
        remedy = unavailable.remedy or "choose another tier, or auto"
        raise ConfigurationError(
            f"tier {config.tier} cannot serve {config.model_dir}: {unavailable.reason}; {remedy}"
        ) from unavailable


def _load_tier(tier: str, config: EngineConfig, memory: EngineMemory) -> ModelRunner:
    """Import and load one tier.

    Raises TierUnavailable, also where something that it imports is missing, and ConfigurationError.
    """
    try:
        module = importlib.import_module(TIER_MODULES[tier])
        load = module.load
    except ModuleNotFoundError as error:
        raise _missing(tier, str(error.name)) from error
    except (ImportError, OSError) as error:
        raise TierUnavailable(f"its libraries do not load ({error})") from error
    except AttributeError as error:
        raise TierUnavailable("this build does not have it") from error
    try:
        return cast(ModelRunner, load(config, memory))
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigurationError(f"a file of the model cannot be read: {error}; fetch the model again") from error


def _missing(tier: str, name: str) -> TierUnavailable:
    if name.partition(".")[0] == "app":
        return TierUnavailable("this build does not have it")
    remedy = "install the extra headwater[torch]" if tier in ("cuda", "any") else f"install {name}"
    return TierUnavailable(f"the package {name} is not installed", remedy=remedy)
