"""The tier `cuda`: the same runner as `any`, on the first NVIDIA device, with static input buffers."""

import torch

from app.core.config import EngineConfig
from app.core.memory import EngineMemory
from app.runner.base import TierUnavailable
from app.runner.torch.build import build_runner
from app.runner.torch.card import find_card
from app.runner.torch.runner import TorchRunner


def load(config: EngineConfig, _memory: EngineMemory | None = None) -> TorchRunner:
    """Load the model for this tier.

    Raises TierUnavailable where this tier cannot serve it here, ConfigurationError where no tier can.
    """
    if config.device == "cpu":
        raise TierUnavailable("the device asked for is the CPU")
    device = find_card()
    return build_runner(config, tier="cuda", device=device, reason=torch.cuda.get_device_name(device))
