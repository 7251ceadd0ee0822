"""The native tier: a decoder of the llama shape on the CPU, in C, without torch.

`load(config)` gives a ModelRunner or raises TierUnavailable. Each row's order of reduction is fixed by
shape: a row's tokens depend on nothing that shares its batch, on no chunking, cache hit or thread count.
"""

from app.runner.native.load import load

__all__ = ["load"]
