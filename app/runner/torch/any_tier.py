"""The tier `any`: every transformers decoder that lets an attention be brought, on the CPU or where asked."""

import torch

from app.core.config import EngineConfig
from app.core.memory import EngineMemory
from app.runner.torch.build import build_runner
from app.runner.torch.card import find_card
from app.runner.torch.runner import TorchRunner


def load(config: EngineConfig, _memory: EngineMemory | None = None) -> TorchRunner:
    """Load the model for this tier.

    Raises TierUnavailable where this tier cannot serve it here, ConfigurationError where no tier can.
    """
    device = find_card() if config.device == "cuda" else torch.device("cpu")
    return build_runner(config, tier="any", device=device, reason=f"a transformers decoder on {device.type}")
