"""The native tier: a decoder of the llama shape on the CPU, in C, without torch.

`load(config)` gives a ModelRunner or raises TierUnavailable. Each row's order of reduction is fixed by
shape: a row's tokens depend on nothing that shares its batch, on no chunking, cache hit or thread count.
"""

from typing import TYPE_CHECKING

from app.core.config import EngineConfig
from app.core.memory import EngineMemory

if TYPE_CHECKING:
    from app.runner.native.runner import NativeRunner

__all__ = ["load"]


def load(config: EngineConfig, memory: EngineMemory | None = None) -> "NativeRunner":
    """Load the model for this tier, or find it in `memory`.

    Raises TierUnavailable, or ConfigurationError where no tier can serve it.
    """
    from app.runner.native.loader import load as load_model  # numpy and all: `python -m ...build` needs none of it

    return load_model(config, EngineMemory() if memory is None else memory)
