"""Where and in which precision a run computes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from app.training.recipe import TrainTable


def choose_dtype(train: TrainTable, device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, unless the recipe says otherwise."""
    if train.dtype != "auto":
        return torch.bfloat16 if train.dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Enters mixed precision: matrix products in `dtype`, weights, norms and loss in float32."""
    return nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype)
