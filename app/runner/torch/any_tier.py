"""The tier `any`: every transformers decoder that lets an attention be brought, on the CPU or where asked."""

import torch

from app.core.config import EngineConfig
from app.core.memory import EngineMemory
from app.runner.base import TierUnavailable
from app.runner.torch.build import build_runner
from app.runner.torch.runner import TorchRunner


def load(config: EngineConfig, _memory: EngineMemory | None = None) -> TorchRunner:
    """Load the model for this tier.

    Raises TierUnavailable where this tier cannot serve it here, ConfigurationError where no tier can.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise TierUnavailable("no CUDA device answers", remedy="--device cpu")
    device = torch.device("cuda" if config.device == "cuda" else "cpu")
    return build_runner(config, tier="any", device=device, reason=f"a transformers decoder on {device.type}")
