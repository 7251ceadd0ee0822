"""Where and in which precision a run computes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch


def choose_dtype(wanted: Literal["auto", "bfloat16", "float32"], device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, unless a type is wanted."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Enters mixed precision: matrix products in `dtype`, weights, norms and loss in float32."""
    return nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype)
